"""What the model computes at the places that a candidate shows, under one variant.

Where the candidate shows its whole residual stream, every layer is run on the candidate's own
input ("layer by layer"): differences stay in the layer that makes them, so that neither rounding
nor a flipped expert choice is carried on. Otherwise the model is run from the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refimpl.decoding.kv import GrowingCache
from refimpl.golden.candidate import ObservedText, Place
from refimpl.reference.block import decoder_layer
from refimpl.reference.model import ReferenceModel
from refimpl.reference.numerics import Array
from refimpl.reference.trace import Trace


def predictions(
    model: ReferenceModel, text: ObservedText, trace: Trace | None = None
) -> Iterator[tuple[Place, Array]]:
    """(place, full rows (T, W)) in order of computation, for the places that `text` shows.

    Args:
        trace: records of the run; filled by the time the last place is given.
    """
    wanted = {o.place for o in text.observations}
    run = _from_tokens if text.hidden is None else _layer_by_layer
    for place, rows in run(model, text, wanted, trace):
        if place in wanted:
            yield place, rows


def _layer_by_layer(
    model: ReferenceModel, text: ObservedText, wanted: set[Place], trace: Trace | None
) -> Iterator[tuple[Place, Array]]:
    assert text.hidden is not None
    w = model.weights
    ids = np.asarray(text.tokens, dtype=np.int64)
    positions = np.arange(len(ids))
    yield ("hidden", -1), w.embedding(ids)
    for spec in w.layers[: model.config.num_hidden_layers]:
        rows = text.hidden[spec.index]
        yield ("hidden", spec.index), run_layer(model, spec.index, rows, positions, trace)
    last = text.hidden[-1].astype(w.numerics.dtype)
    if ("logits", None) in wanted:
        yield ("logits", None), model.head(last)
    yield from _mtp(model, ids, last, wanted)


def run_layer(
    model: ReferenceModel, layer: int, rows: Array, positions: Array, trace: Trace | None = None
) -> Array:
    """One trunk layer over a whole prompt: residual stream (T, H), positions (T,) -> (T, H)."""
    w = model.weights
    spec = w.layers[layer]
    kv = GrowingCache(spec.num_attention_groups, spec.head_dim, w.numerics.dtype, len(positions))
    w.trace = trace
    try:
        return decoder_layer(w, spec, rows.astype(w.numerics.dtype), positions, kv)
    finally:
        w.trace = None


def _from_tokens(
    model: ReferenceModel, text: ObservedText, wanted: set[Place], trace: Trace | None
) -> Iterator[tuple[Place, Array]]:
    ids = np.asarray(text.tokens, dtype=np.int64)
    layers = sorted({i for name, i in wanted if name == "hidden" and i is not None})
    if layers and trace is None:
        trace = Trace(record=frozenset({"hidden"}))
    step = model.prefill(ids, model.new_cache(len(ids)), all_logits=True, trace=trace)
    for i in layers:
        assert trace is not None
        yield ("hidden", i), trace.rows("hidden", i + 1)
    yield ("logits", None), step.logits
    yield from _mtp(model, ids, step.hidden, wanted)


def _mtp(
    model: ReferenceModel, ids: Array, hidden: Array, wanted: set[Place]
) -> Iterator[tuple[Place, Array]]:
    if not any(name.startswith("mtp_") for name, _ in wanted):
        return
    for k, (logits, rows) in enumerate(model.mtp_teacher_forced(ids, hidden)):
        yield (f"mtp_forced_hidden_{k}", None), rows
        yield (f"mtp_forced_logits_{k}", None), logits

"""Run a model over a prompt and write down everything it computes.

Axes as in `refimpl.golden.files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Backend, Cache, Step, Tokens
from refimpl.errors import InputError
from refimpl.reference.trace import Trace

Array = NDArray[Any]
_RECORDED = ("hidden", "attn_out", "ffn_out", "route_idx", "route_w", "route_margin", "final")


class TracedBackend(Backend, Protocol):
    """A backend that can also record its activations and run its MTP layers over a text."""

    def prefill(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        trace: Trace | None = None,
    ) -> Step:
        """As `Backend.prefill`, filling `trace`."""

    def mtp_teacher_forced(self, tokens: Tokens, hidden: Array) -> list[tuple[Array, Array]]:
        """Logits (T-1-k, V) and block outputs (T-1-k, H) of every MTP layer k."""


def golden_arrays(
    model: TracedBackend, tokens: Sequence[int], new: int = 0, chunk: int | None = None
) -> dict[str, Array]:
    """Everything a golden file holds, for a prompt and `new` greedy tokens.

    Args:
        chunk: prefill this many tokens at a time (None = all at once).

    Raises:
        InputError: ids out of range, negative counts, or prompt and new tokens beyond the
            model's context.
    """
    config, total = model.config, len(tokens) + new
    depth = config.num_nextn_predict_layers if new else 0
    if new < 0:
        raise InputError(f"new is {new}, expected 0 or more tokens after the prompt")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}, expected 1 or more tokens at a time")
    if total + depth > config.max_position_embeddings:
        raise InputError(
            f"prompt {len(tokens)} + new {new} + drafts {depth} tokens exceed the model's "
            f"context of {config.max_position_embeddings}"
        )
    trace = Trace(record=frozenset(_RECORDED))
    cache = model.new_cache(total + depth)
    step = chunk or len(tokens)
    steps = [
        model.prefill(tokens[i : i + step], cache, all_logits=True, trace=trace)
        for i in range(0, len(tokens), step)
    ]
    logits = np.concatenate([s.logits for s in steps])
    arrays = {"prompt": np.asarray(tokens, dtype=np.int64)}
    arrays.update(_activations(trace, config.num_hidden_layers, config.moe_layers))
    arrays["logits"] = logits
    if new:
        arrays.update(_greedy(model, cache, logits[-1], new))
    if config.num_nextn_predict_layers:
        hidden = np.concatenate([s.hidden for s in steps])
        for k, (forced, rows) in enumerate(model.mtp_teacher_forced(tokens, hidden)):
            arrays[f"mtp_forced_logits_{k}"] = forced
            arrays[f"mtp_forced_hidden_{k}"] = rows
        arrays.update(_speculation(model, tokens, new, step))
    return arrays


def _activations(trace: Trace, layers: int, moe_layers: Sequence[int]) -> dict[str, Array]:
    arrays = {
        "hidden": np.stack([trace.rows("hidden", i) for i in range(layers + 1)]),
        "final": trace.rows("final", 0),
        "attn_out": np.stack([trace.rows("attn_out", i) for i in range(layers)]),
        "ffn_out": np.stack([trace.rows("ffn_out", i) for i in range(layers)]),
        "moe_layers": np.asarray(moe_layers, dtype=np.int64),
    }
    if moe_layers:
        for name in ("route_idx", "route_w", "route_margin"):
            arrays[name] = np.stack([trace.rows(name, i) for i in moe_layers])
    return arrays


def _greedy(model: Backend, cache: Cache, last: Array, new: int) -> dict[str, Array]:
    """`new` greedy tokens after the prompt, stop tokens ignored; `last` (V,) its last logits."""
    rows = [last]
    for _ in range(new - 1):
        rows.append(model.decode([int(np.argmax(rows[-1]))], cache).logits[0])
    logits = np.stack(rows)
    return {"greedy": np.argmax(logits, axis=-1), "greedy_logits": logits}


def _speculation(model: Backend, tokens: Sequence[int], new: int, chunk: int) -> dict[str, Array]:
    """Draft from every MTP layer and verify, until `new` tokens are settled (0: draft once)."""
    depth = model.config.num_nextn_predict_layers
    cache = model.new_cache(len(tokens) + (new + depth if new else 0))
    drafts: list[int] = []
    for i in range(0, len(tokens), chunk):
        part = tokens[i : i + chunk]
        step = model.prefill(part, cache)
        following = [*tokens[i + 1 : i + len(part) + 1]]
        if len(following) < len(part):
            following.append(int(np.argmax(step.logits[-1])))
        last = i + len(part) == len(tokens)
        choose = _Recorder()
        drafts = model.draft(cache, step.hidden, following, depth if last else 0, choose)
    newest = following[-1]
    arrays = {"draft_chain": np.asarray(drafts), "draft_chain_logits": np.stack(choose.rows)}
    accepted: list[int] = []
    while sum(accepted) + len(accepted) < new:
        step = model.decode([newest, *drafts], cache)
        picks = np.argmax(step.logits, axis=-1)
        right = [d == p for d, p in zip(drafts, picks[:-1], strict=True)]
        a = [*right, False].index(False)
        accepted.append(a)
        cache.rollback(depth - a)
        newest = int(picks[a])
        if sum(accepted) + len(accepted) < new:
            following = [*drafts[:a], newest]
            drafts = model.draft(cache, step.hidden[: a + 1], following, depth, _Recorder())
    return {**arrays, "spec_accepted": np.asarray(accepted, dtype=np.int64)}


class _Recorder:
    """Chooses greedily and keeps the logits it was shown."""

    def __init__(self) -> None:
        self.rows: list[Array] = []

    def __call__(self, logits: Array) -> int:
        self.rows.append(np.array(logits))
        return int(np.argmax(logits))

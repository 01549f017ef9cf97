"""Golden outputs of a few layers, so that a checkpoint too large to run can be verified in parts.

A piece runs trunk layers first..stop-1 on given rows of the residual stream and reads only their
tensors. Its file has the arrays of `refimpl.golden.files`, cut to those layers and rows, and

* `layers` (2,): first and stop; `hidden[0]` is the input of layer `first`,
* `positions` (R,): which rows of the prompt were kept,
* with the last layer `final` and `logits`, or in place of the logits `topk_ids`, `topk_logits`
  (R, K), best first, and `log_normaliser` (R,): log probability = logit - log_normaliser.

Axes: T prompt, R kept rows, H hidden_size, V vocabulary, L trunk layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.open import open_checkpoint, read_config
from refimpl.checkpoint.stored import StoredSource, Wanted
from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.golden.files import read_golden, read_npy
from refimpl.golden.hypotheses import run_layer
from refimpl.inventory import TensorSpec
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace

if TYPE_CHECKING:
    from refimpl.engine.model import EngineModel

Array = NDArray[Any]
_RANGE = re.compile(r"(\d{1,4})?(:)?(\d{1,4})?")
_BY_LAYER = ("attn_out", "ffn_out")
_ROUTES = ("route_idx", "route_w", "route_margin")
_BY_ROW = ("final", "logits", "topk_ids", "topk_logits", "log_normaliser")


def parse_layers(text: str, config: ModelConfig) -> tuple[int, int]:
    """'A:B' (A to B-1), 'A:', ':B' or 'A' as (first, stop).

    Raises:
        InputError: no such range of trunk layers.
    """
    match = _RANGE.fullmatch(text)
    count = config.num_hidden_layers
    if match and (match[1] or match[2]):
        first = int(match[1] or 0)
        stop = int(match[3]) if match[3] else count if match[2] else first + 1
        if first < stop <= count:
            return first, stop
    raise InputError(f"layers is {text!r}, expected A:B with 0 <= A < B <= {count} (trunk layers)")


def open_layers(
    path: Path, layers: str, embeddings: bool | None
) -> tuple[StoredSource, tuple[int, int]]:
    """A checkpoint opened for a range of layers; other shards may be missing.

    Args:
        embeddings: whether the embedding table is needed; None: all tensors are (by the engine,
            which reads of them what it uses).

    Raises:
        InputError: no such layers.
        CheckpointError, ConfigError: a tensor of these layers is missing or unusable.
    """
    config = read_config(path)
    first, stop = parse_layers(layers, config)
    if embeddings is None:
        return open_checkpoint(path), (first, stop)
    wanted = tensors_of_layers(config, first, stop, embeddings)
    return open_checkpoint(path, wanted=wanted), (first, stop)


def tensors_of_layers(config: ModelConfig, first: int, stop: int, embeddings: bool) -> Wanted:
    """Which tensors layers first..stop-1 need: their own, with the last one norm and head too.

    Args:
        embeddings: whether the embedding table is needed (layer 0 without a file of inputs).
    """

    def wanted(spec: TensorSpec) -> bool:
        if spec.layer is not None:
            return first <= spec.layer < stop
        if spec.key == "embed_tokens":
            return embeddings
        return spec.key == "rope_freqs" or stop == config.num_hidden_layers

    return wanted


def read_hidden(path: Path, layer: int, rows: int, width: int) -> Array:
    """The input of a layer, (T, H), from .npy rows, a golden file, or the piece before.

    Raises:
        InputError: the file does not hold it, or not for this prompt.
    """
    found = _from_golden(path, layer) if path.suffix == ".npz" else read_npy(path)
    if found.shape != (rows, width) or found.dtype.kind != "f":
        raise InputError(
            f"{path}: rows of shape {found.shape}, expected ({rows}, {width}): one for every token"
        )
    return found


def _from_golden(path: Path, layer: int) -> Array:
    arrays, _ = read_golden(path)
    hidden = arrays.get("hidden")
    if hidden is None or hidden.ndim != 3:
        raise InputError(f"{path}: holds no array `hidden` of (layers + 1, tokens, hidden size)")
    first = int(arrays["layers"][0]) if "layers" in arrays else 0
    if not first <= layer < first + len(hidden):
        last = first + len(hidden) - 1
        raise InputError(f"{path}: holds inputs of layers {first} to {last}, not of layer {layer}")
    rows: Array = hidden[layer - first]
    return rows


def piece_arrays(
    model: ReferenceModel | EngineModel,
    tokens: Sequence[int],
    layers: tuple[int, int],
    hidden_in: Array | None = None,
    last: int | None = None,
    topk: int | None = None,
) -> dict[str, Array]:
    """Run layers first..stop-1 over a prompt and write down what they compute.

    Args:
        hidden_in: (T, H), the input of layer `first`; None computes the embeddings (first = 0).
        last: keep only this many rows at the end of the prompt.
        topk: keep only this many logits of each row.

    Raises:
        InputError: no input for a layer other than the first, or impossible counts.
    """
    config, (first, stop), count = model.config, layers, len(tokens)
    if hidden_in is None and first:
        raise InputError(f"layer {first} needs its input; give it with --hidden-in FILE")
    if last is not None and not 1 <= last <= count:
        raise InputError(f"last is {last}, the prompt has {count} tokens")
    if topk is not None and not 1 <= topk <= config.vocab_size:
        raise InputError(f"topk is {topk}, the vocabulary has {config.vocab_size} entries")
    _check_tokens(tokens, config)
    keep = slice(0 if last is None else count - last, None)
    trace = Trace(record=frozenset({"hidden", "final", *_BY_LAYER, *_ROUTES}))
    if isinstance(model, ReferenceModel):
        logits = _run_reference(model, tokens, range(first, stop), hidden_in, trace, keep)
    else:
        logits = _run_engine(model, tokens, range(first, stop), hidden_in, trace, keep)
    moe = [i for i in config.moe_layers if first <= i < stop]
    arrays = {
        "prompt": np.asarray(tokens, dtype=np.int64),
        "layers": np.array([first, stop]),
        "positions": np.arange(count)[keep],
        "hidden": np.stack([trace.rows("hidden", i)[keep] for i in range(first, stop + 1)]),
        "moe_layers": np.asarray(moe, dtype=np.int64),
    }
    for name in _BY_LAYER:
        arrays[name] = np.stack([trace.rows(name, i)[keep] for i in range(first, stop)])
    for name in _ROUTES if moe else ():
        arrays[name] = np.stack([trace.rows(name, i)[keep] for i in moe])
    if logits is not None:
        arrays["final"] = trace.rows("final", 0)[-len(logits) :]
        arrays |= {"logits": logits} if topk is None else reduced(logits, topk)
    return arrays


def _check_tokens(tokens: Sequence[int], config: ModelConfig) -> None:
    bad = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
    if bad is not None:
        raise InputError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")


def _run_reference(
    model: ReferenceModel, tokens: Sequence[int], layers: range, hidden_in: Array | None,
    trace: Trace, keep: slice,
) -> Array | None:  # fmt: skip
    """Fill the trace; logits (R, V) of the kept rows if the trunk's last layer is among them."""
    w, positions = model.weights, np.arange(len(tokens))
    h = w.embedding(np.asarray(tokens)) if hidden_in is None else hidden_in.astype(w.numerics.dtype)
    trace.keep("hidden", layers.start, h)
    for layer in layers:
        h = run_layer(model, layer, h, positions, trace)
        trace.keep("hidden", layer + 1, h)
    if layers.stop < model.config.num_hidden_layers:
        return None
    final = w.norm(h[keep], "norm", None)
    trace.keep("final", 0, final)
    return w.linear(final, "lm_head", None)


def _run_engine(
    model: EngineModel, tokens: Sequence[int], layers: range, hidden_in: Array | None,
    trace: Trace, keep: slice,
) -> Array | None:  # fmt: skip
    """The same."""
    h = hidden_in
    if h is None:
        h = model.source.rows("embed_tokens", None, list(tokens), np.float32)
    step = model.run_layers(h, tokens, model.new_cache(len(tokens)), layers, trace)
    return step.logits[keep] if layers.stop == model.config.num_hidden_layers else None


def reduced(logits: Array, topk: int) -> dict[str, Array]:
    """The `topk` largest logits of each row, (R, V) -> `topk_ids`, `topk_logits` (R, K) and
    `log_normaliser` (R,)."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :topk]
    peak = logits.max(axis=-1, keepdims=True)
    return {
        "topk_ids": ids,
        "topk_logits": np.take_along_axis(logits, ids, -1),
        "log_normaliser": peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=-1)),
    }


def aligned(
    a: Mapping[str, Array], b: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array], int]:
    """Two golden files cut to the layers, rows and logits that both hold, and the first layer.

    Files that are no pieces are left as they are.

    Raises:
        InputError: no layer or no row is in both.
    """
    files = dict(a), dict(b)
    if "layers" not in a and "layers" not in b:
        return *files, 0
    ranges = [_layers(x) for x in files]
    first, stop = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if first >= stop:
        raise InputError(f"the files hold layers {ranges[0]} and {ranges[1]}: none in common")
    rows = [x["positions"] if "positions" in x else np.arange(_row_count(x)) for x in files]
    common = np.intersect1d(rows[0], rows[1])
    if not len(common):
        raise InputError("the files hold different rows of the prompt; none is in both")
    cut = [
        _cut(x, r[0], (first, stop), np.searchsorted(at, common))
        for x, r, at in zip(files, ranges, rows, strict=True)
    ]
    _same_logits(*cut)
    return cut[0], cut[1], first


def _layers(x: Mapping[str, Array]) -> tuple[int, int]:
    if "layers" in x:
        return int(x["layers"][0]), int(x["layers"][1])
    return 0, len(x["hidden"]) - 1 if "hidden" in x else 1 << 12


def _row_count(x: Mapping[str, Array]) -> int:
    return x["hidden"].shape[1] if "hidden" in x else len(x["logits"])


def _cut(
    x: Mapping[str, Array], start: int, layers: tuple[int, int], rows: Array
) -> dict[str, Array]:
    out = {"prompt": x["prompt"]} if "prompt" in x else {}
    low, high = layers[0] - start, layers[1] - start
    if "hidden" in x:
        out["hidden"] = x["hidden"][low : high + 1][:, rows]
    out |= {name: x[name][low:high][:, rows] for name in _BY_LAYER if name in x}
    if "moe_layers" in x:
        kept = (x["moe_layers"] >= layers[0]) & (x["moe_layers"] < layers[1])
        out["moe_layers"] = x["moe_layers"][kept]
        out |= {name: x[name][kept][:, rows] for name in _ROUTES if name in x and kept.any()}
    return out | {name: x[name][rows] for name in _BY_ROW if name in x}


def _same_logits(a: dict[str, Array], b: dict[str, Array]) -> None:
    """Where one file holds top-k logits and the other all, give the other the same selection."""
    for one, other in ((a, b), (b, a)):
        if "topk_ids" in one and "logits" in other and "topk_ids" not in other:
            ids, logits = one.pop("topk_ids"), other.pop("logits")
            other["topk_logits"] = np.take_along_axis(logits, ids, -1)
            other["log_normaliser"] = reduced(logits, 1)["log_normaliser"]

"""Compare two golden files layer by layer and name the first place where they part.

Axes as in `refimpl.golden.files`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import InputError
from refimpl.golden.files import stored_precision

Array = NDArray[Any]

# Largest tolerated |difference| in units of max(1, rms of the first file's array), by the less
# precise run: float64 and float32 as the golden tests demand, float16 and bf16 a few units in the
# last place.
TOLERANCE = {"float64": 1e-9, "float32": 5e-5, "float16": 1e-2, "bf16": 5e-2}
_AFTER_PROMPT = ("greedy", "greedy_logits", "spec_accepted")
_LAYERED = ("attn_out", "ffn_out", "hidden")
_SHOWN = 4
_MAX_LAYERS = 4096


@dataclass(frozen=True)
class Difference:
    """How far one array (or one layer of it) is from its counterpart.

    `nmse` is mean squared difference over mean square; `kl_mean`, `kl_p95` (nats), `top1`,
    `top5` (share of rows) are filled for logits. `first` lists the first offending values as
    (index, first file, second file). `margin` is the routing margin of the first row whose
    experts differ: a small one means a near tie that rounding may decide.
    """

    name: str
    layer: int | None
    max: float
    rms: float
    nmse: float
    departs: bool
    kl_mean: float | None = None
    kl_p95: float | None = None
    top1: float | None = None
    top5: float | None = None
    margin: float | None = None
    first: list[tuple[list[int], float, float]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The array, with its layer if it has one."""
        if self.layer is None:
            return self.name
        if self.name == "hidden":
            return "embeddings" if self.layer < 0 else f"layer {self.layer} output"
        return f"layer {self.layer} {self.name}"


@dataclass(frozen=True)
class Comparison:
    """All differences in order of computation, and the verdict.

    `missing` names the arrays that only one file holds, or both with another number of new tokens.
    """

    differences: list[Difference]
    tolerance: float
    missing: list[str]

    @property
    def first_departure(self) -> Difference | None:
        """The first place, in order of computation, outside the tolerance."""
        return next((d for d in self.differences if d.departs), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`; what is not finite, which JSON cannot say, is None."""
        first = self.first_departure
        return {
            "equal": first is None,
            "tolerance": self.tolerance,
            "first_departure": None if first is None else _plain(first),
            "differences": [_plain(d) for d in self.differences],
            "not_in_both_files": self.missing,
        }


def _plain(d: Difference) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {"place": d.place, **{k: finite(v) for k, v in asdict(d).items()}}


def compare(
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    dtypes: tuple[str | None, str | None] = (None, None),
    tolerance: float | None = None,
    first_layer: int = 0,
) -> Comparison:
    """Compare the arrays that both files hold.

    Args:
        dtypes: precision of each run by name; None = what its arrays show.
        tolerance: overrides the table by precision, a number from 0 on.
        first_layer: the layer that the layered arrays begin with (pieces of a model).

    Raises:
        InputError: nothing in common, different prompts, shapes that do not match, or a tolerance
            that is no number.
    """
    if any("prompt" in x and x["prompt"].dtype.kind not in "iu" for x in (a, b)):
        raise InputError("array `prompt` does not hold integers")
    if "prompt" in a and "prompt" in b and not np.array_equal(a["prompt"], b["prompt"]):
        raise InputError("the two files were made from different prompts; compare like with like")
    common = [n for n in _order(a) if n in b and not _another_length(n, a, b)]
    if not common:
        raise InputError("the two files have no array in common; expected at least `logits`")
    for name in common:
        if a[name].shape != b[name].shape:
            raise InputError(
                f"array `{name}` has shape {a[name].shape} in one file and {b[name].shape} in "
                "the other; are they of the same model?"
            )
        if a[name].dtype.kind not in "fiub" or b[name].dtype.kind not in "fiub":
            raise InputError(f"array `{name}` does not hold numbers")
    for x in (a, b):
        _check_layers(x, first_layer)
    moe_a, moe_b = a.get("moe_layers"), b.get("moe_layers")
    if moe_a is not None and moe_b is not None and not np.array_equal(moe_a, moe_b):
        raise InputError("the two files have different MoE layers; are they of the same model?")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance:g}, expected a number from 0 on")
    if tolerance is None:
        names = [d or stored_precision(x) for d, x in zip(dtypes, (a, b), strict=True)]
        tolerance = max(TOLERANCE.get(n, TOLERANCE["float32"]) for n in names)
    if "route_idx" in common:
        a, b = _by_expert(a), _by_expert(b)
    with np.errstate(all="ignore"):  # an infinite value is a departure, not a mishap
        differences = list(_differences(a, b, common, tolerance, first_layer))
    missing = {*(set(a) ^ set(b)), *(n for n in a if n in b and _another_length(n, a, b))}
    return Comparison(differences, tolerance, sorted(missing))


def _check_layers(x: Mapping[str, Array], first_layer: int) -> None:
    """Refuse arrays by layer that do not fit together (a file may come from any program)."""
    layered = {n: x[n] for n in (*_LAYERED, "route_idx", "route_w") if n in x}
    for name, array in layered.items():
        if array.ndim != 3:
            raise InputError(f"array `{name}` has {array.ndim} axes, expected layer, token, value")
    counts = {n: len(y) - (n == "hidden") for n, y in layered.items() if n in _LAYERED}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} in `{name}`" for name, count in counts.items())
        raise InputError(f"a file has arrays of different numbers of layers: {said}")
    moe = x.get("moe_layers", np.zeros(0, dtype=np.int64))
    stop = first_layer + min(counts.values(), default=_MAX_LAYERS)
    if moe.ndim != 1 or moe.dtype.kind not in "iu" or ((moe < first_layer) | (moe >= stop)).any():
        raise InputError(f"array `moe_layers` is not a list of layers {first_layer} to {stop - 1}")


def _another_length(name: str, a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """True for what depends on the number of new tokens, if that differs: not comparable."""
    return name in _AFTER_PROMPT and len(a[name]) != len(b[name])


def _by_expert(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same with each row's experts in the order of their ids: any order is the same sum."""
    ids, weights = arrays["route_idx"], arrays.get("route_w")
    order = np.argsort(ids, axis=-1, kind="stable")
    found = {**arrays, "route_idx": np.take_along_axis(ids, order, -1)}
    if weights is not None:
        if weights.shape != ids.shape:
            raise InputError(
                f"array `route_w` has shape {weights.shape}, `route_idx` {ids.shape}; expected a "
                "weight for every expert"
            )
        found["route_w"] = np.take_along_axis(weights, order, -1)
    return found


def _order(arrays: Mapping[str, Array]) -> list[str]:
    """Array names in the order in which a model computes them; indices have no magnitude."""
    topk = ["topk_ids", "topk_logits", "log_normaliser"]
    rest = ["final", "logits", *topk, "greedy", "greedy_logits"]
    known = [*_LAYERED, "route_idx", "route_w", *rest]
    mtp = sorted((n for n in arrays if n.startswith("mtp_")), key=lambda n: (n[-1], n))
    later = sorted(n for n in arrays if n.startswith(("draft_", "spec_")))
    return [n for n in [*known, *mtp, *later] if n in arrays]


def _differences(
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    common: list[str],
    tolerance: float,
    first_layer: int,
) -> Iterator[Difference]:
    layered = [n for n in common if n in (*_LAYERED, "route_idx", "route_w")]
    if "hidden" in common:
        before = first_layer - 1
        yield _difference("hidden", before, a["hidden"][0], b["hidden"][0], tolerance)
    moe = [int(i) for i in a.get("moe_layers", np.zeros(0))]
    for at in range(_layer_count(a, layered, first_layer)):
        layer = first_layer + at
        for name in ("attn_out", "route_idx", "route_w", "ffn_out", "hidden"):
            if name not in layered:
                continue
            if name.startswith("route"):
                if layer in moe and moe.index(layer) < len(a[name]):
                    i = moe.index(layer)
                    found = _difference(name, layer, a[name][i], b[name][i], tolerance)
                    yield _with_margin(found, a, i) if name == "route_idx" else found
                continue
            i = at + 1 if name == "hidden" else at
            yield _difference(name, layer, a[name][i], b[name][i], tolerance)
    for name in common:
        if name not in layered:
            yield _difference(name, None, a[name], b[name], tolerance)


def _with_margin(found: Difference, a: Mapping[str, Array], moe_layer: int) -> Difference:
    if not found.departs or "route_margin" not in a:
        return found
    row = found.first[0][0][0]
    return replace(found, margin=float(a["route_margin"][moe_layer, row]))


def _layer_count(arrays: Mapping[str, Array], layered: list[str], first_layer: int) -> int:
    counts = {"hidden": -1, "attn_out": 0, "ffn_out": 0}
    found = [len(arrays[n]) + extra for n, extra in counts.items() if n in layered]
    if "moe_layers" in arrays and len(arrays["moe_layers"]):
        found.append(int(arrays["moe_layers"].max()) + 1 - first_layer)
    return max(found, default=0)


def _difference(name: str, layer: int | None, a: Array, b: Array, tolerance: float) -> Difference:
    if a.dtype.kind in "iub":
        wrong = a != b
        return Difference(
            name, layer, float(wrong.any()), float(np.sqrt(wrong.mean())) if a.size else 0.0,
            float(wrong.mean()) if a.size else 0.0, bool(wrong.any()), first=_first(wrong, a, b),
        )  # fmt: skip
    x, y = a.astype(np.float64), b.astype(np.float64)
    delta = np.abs(x - y)
    scale = max(1.0, float(np.sqrt(np.mean(x**2)))) if x.size else 1.0
    wrong = ~(delta <= tolerance * scale)  # a NaN is an offence
    square = float(np.mean(x**2)) if x.size else 0.0
    rms = float(np.sqrt(np.mean(delta**2))) if x.size else 0.0
    logits = "logits" in name and "topk" not in name and x.ndim == 2 and x.size
    return Difference(
        name,
        layer,
        float(delta.max()) if x.size else 0.0,
        rms,
        rms**2 / square if square else rms**2,
        bool(wrong.any()),
        first=_first(wrong, x, y),
        **(_distribution(x, y) if logits else {}),
    )


def _first(wrong: Array, a: Array, b: Array) -> list[tuple[list[int], float, float]]:
    where = np.argwhere(wrong)[:_SHOWN]
    return [([int(i) for i in w], float(a[tuple(w)]), float(b[tuple(w)])) for w in where]


def _distribution(x: Array, y: Array) -> dict[str, float]:
    """KL(softmax x || softmax y) over rows and agreement of the leading tokens: (T, V) each."""
    p, q = _log_softmax(x), _log_softmax(y)
    kl = np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)  # (T,); rounding may go below 0
    best_x, best_y = np.argmax(x, axis=-1), np.argmax(y, axis=-1)
    five = np.argsort(-y, axis=-1, kind="stable")[:, :5]
    return {
        "kl_mean": float(kl.mean()),
        "kl_p95": float(np.percentile(kl, 95)),
        "top1": float((best_x == best_y).mean()),
        "top5": float((five == best_x[:, None]).any(axis=-1).mean()),
    }


def _log_softmax(x: Array) -> Array:
    z = x - x.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

"""Which arithmetic a run uses: float64, float32, or float32 with bf16 roundings.

The bf16 mode copies the vendor's own PyTorch code (modeling_step3p5.py of the published
checkpoint): products accumulate in float32 and are rounded to bf16 at the named points
below and nowhere else. The router and the whole of a routed expert stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import InputError

Array = NDArray[Any]

ROUNDING_POINTS = {
    "embedding": "embedding rows",
    "linear": "every projection except router and routed experts; the logits",
    "norm": "result of every RMSNorm (float32 inside)",
    "rope_table": "cos and sin, computed in float32",
    "rope_product": "each of the two products of the rotation",
    "rope_sum": "their sum",
    "attention": "softmax(QK)V, float32 inside",
    "gate_sigmoid": "sigmoid of the head-wise gate",
    "gate_product": "gate times attention output",
    "silu": "silu of the gate branch in dense and shared FFN",
    "glu_product": "gate branch times up branch in dense and shared FFN",
    "expert_output": "routed expert's output times its weight",
    "expert_sum": "running sum over experts, ascending, one rounding per expert",
    "ffn_sum": "routed plus shared",
    "residual": "both residual additions",
}


def round_bf16(x: Array) -> Array:
    """Nearest bf16 values (ties to even), returned as float32; any shape."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    out = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(x), out, x).astype(np.float32)


def round_groups(x: Array, bits: int = 8, group: int = 64) -> Array:
    """Nearest values of an affine quantisation, (rows, n) -> (rows, n): every `group` values of
    a row (all of a shorter one) share a scale and a minimum, as in mlx's quantised files."""
    size = group if x.shape[-1] % group == 0 else x.shape[-1]
    groups = x.reshape(len(x), -1, size)
    low = groups.min(axis=-1, keepdims=True)
    step = (groups.max(axis=-1, keepdims=True) - low) / x.dtype.type((1 << bits) - 1)
    step = np.where(step > 0, step, x.dtype.type(1))
    rounded: Array = (low + np.round((groups - low) / step) * step).reshape(x.shape)
    return rounded


@dataclass(frozen=True)
class Numerics:
    """Arithmetic type and the points where results are rounded to bf16."""

    name: str
    dtype: np.dtype[Any]
    bf16_points: frozenset[str] = frozenset()

    def at(self, point: str, x: Array) -> Array:
        """`x` as it leaves the named rounding point (unchanged outside the bf16 mode)."""
        return round_bf16(x) if point in self.bf16_points else x


def numerics(name: str, points: Iterable[str] = ROUNDING_POINTS) -> Numerics:
    """The arithmetic called `float64`, `float32` or `bf16`.

    Raises:
        InputError: for any other name.
    """
    if name in ("float64", "float32"):
        return Numerics(name, np.dtype(name))
    if name == "bf16":
        return Numerics(name, np.dtype(np.float32), frozenset(points))
    raise InputError(f"dtype '{name}' is unknown; choose float64, float32 or bf16")

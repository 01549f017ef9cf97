"""SwiGLU with its activation clamp. Axes: T rows, I width."""

from __future__ import annotations

import math

import numpy as np

from refimpl.reference.attention import sigmoid
from refimpl.reference.numerics import Array, Numerics
from refimpl.reference.variant import NORMATIVE, Variant


def swiglu(
    gate: Array,
    up: Array,
    limit: float,
    numerics: Numerics | None = None,
    variant: Variant = NORMATIVE,
) -> Array:
    """min(silu(gate), L) * clip(up, -L, L): (T, I), (T, I) -> (T, I).

    The clamp comes after silu and bounds the gate branch from above only, the up branch on both
    sides (`swiglu_limits`, `swiglu_limits_shared`; infinity = no clamp). `numerics` is given
    where results are rounded (dense and shared FFN), None inside a routed expert.
    """
    before_silu = variant.clamp_before_silu and math.isfinite(limit)
    if before_silu:
        gate = np.minimum(gate, gate.dtype.type(limit))
    activated = gate * sigmoid(gate)
    if numerics is not None:
        activated = numerics.at("silu", activated)
    if math.isfinite(limit):
        bound = gate.dtype.type(limit)
        if not before_silu:
            activated = np.minimum(activated, bound)
        up = np.minimum(up, bound) if variant.clamp_up_above_only else np.clip(up, -bound, bound)
    product = activated * up
    return product if numerics is None else numerics.at("glu_product", product)

"""Rotary position embedding: half-split, partial, llama3-scaled.

Axes: T positions, n heads, D head_dim, R rotary_dim (the first R lanes of D rotate).
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.config import LayerSpec, RopeScaling
from refimpl.reference.numerics import Array


def frequencies(spec: LayerSpec) -> Array:
    """Angular frequencies of a layer, (R/2,) float64: theta^(-2i/R) over their divisors.

    The exponent uses R, not head_dim. Divisors come from `rope_scaling` (llama3) or, for GGUF
    files, from the tensor `rope_freqs.weight`.
    """
    r = spec.rotary_dim
    base = spec.rope_theta ** (-np.arange(0, r, 2, dtype=np.float64) / r)  # (R/2,)
    if spec.rope_divisors is not None:
        return base / np.asarray(spec.rope_divisors[: r // 2], dtype=np.float64)
    if spec.rope_scaling is None:
        return base
    return base / llama3_divisors(base, spec.rope_scaling)


def llama3_divisors(base: Array, scaling: RopeScaling) -> Array:
    """Divisors of llama3 scaling for base frequencies (R/2,): 1 for short wavelengths,
    `factor` for long ones, interpolated between; static, whatever the prompt's length."""
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base  # (R/2,)
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def angles(positions: Array, freqs: Array) -> tuple[Array, Array]:
    """cos and sin of position * frequency: (T,), (R/2,) -> two of (T, R/2), float64."""
    phase = positions.astype(np.float64)[:, None] * freqs[None, :]
    return np.cos(phase), np.sin(phase)


def lanes(spec: LayerSpec, interleaved: bool = False, last: bool = False) -> tuple[Array, Array]:
    """Indices of the first and second element of each rotated pair, each (R/2,).

    Pairs are (i, i + R/2) within the first R lanes. `interleaved` ((2i, 2i+1)) and `last`
    (rotate the last R lanes) are known mistakes.
    """
    half = spec.rotary_dim // 2
    first = np.arange(half)
    pair = (2 * first, 2 * first + 1) if interleaved else (first, first + half)
    offset = spec.head_dim - spec.rotary_dim if last else 0
    return pair[0] + offset, pair[1] + offset

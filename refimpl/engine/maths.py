"""Vector mathematics of the engine: exp, sigmoid, RMSNorm, SwiGLU, rotation.

All functions take integer addresses of float32 values. Sums are formed in 16 lanes and then in a
fixed tree, whatever the thread count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.jit import njit
from refimpl.engine.loads import load, load_f32, store, store_f32
from refimpl.engine.vec import (
    F32x8,
    F32x16,
    I32x16,
    convert,
    device,
    fma,
    reduce_add,
    reinterpret,
    shift_left,
    splat,
    vmax,
    vmin,
    vround,
    zeros,
)

# e^x = 2^n e^r with n = round(x / ln 2); ln 2 in two parts, e^r - 1 - r by its Taylor series up to
# r^7 (|r| <= ln 2 / 2: relative error below 1e-8).
_LOG2E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))
_ONE, _ZERO = np.float32(1), np.float32(0)


@njit(forceinline=True)
def vexp(x: Any) -> Any:
    """e^x of an F32x16, x clamped to -87..88; not-a-number stays."""
    x = vmin(splat(F32x16, _HIGHEST), vmax(splat(F32x16, _LOWEST), x))
    n = vround(x * splat(F32x16, _LOG2E))
    r = fma(n, splat(F32x16, -_LN2_HIGH), x)
    r = fma(n, splat(F32x16, -_LN2_LOW), r)
    p = fma(splat(F32x16, _C7), r, splat(F32x16, _C6))
    p = fma(p, r, splat(F32x16, _C5))
    p = fma(p, r, splat(F32x16, _C4))
    p = fma(p, r, splat(F32x16, _C3))
    p = fma(p, r, splat(F32x16, _C2))
    p = fma(p, r * r, r) + splat(F32x16, _ONE)
    power = shift_left(convert(I32x16, n) + splat(I32x16, 127), 23)
    return p * reinterpret(F32x16, power)


@njit(forceinline=True)
def exp_one(x: Any) -> Any:
    """e^x of one float32, the same bits as `vexp`."""
    return reduce_add(vexp(splat(F32x16, x))) / np.float32(16)


@njit(forceinline=True)
def vsigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) of an F32x16."""
    one = splat(F32x16, _ONE)
    return one / (one + vexp(zeros(F32x16) - x))


@njit(forceinline=True)
def sigmoid_one(x: Any) -> Any:
    """1 / (1 + e^-x) of one float32."""
    return _ONE / (_ONE + exp_one(-x))


@device(types.void)
def rms_norm(x, scale, n, eps, out):
    """out = x / sqrt(mean(x^2) + eps) * scale over n values (a multiple of 32)."""
    a, b = zeros(F32x16), zeros(F32x16)
    for i in range(0, 4 * n, 128):
        low, high = load(F32x16, x + i), load(F32x16, x + i + 64)
        a, b = fma(low, low, a), fma(high, high, b)
    mean = reduce_add(a + b) / np.float32(n)
    factor = splat(F32x16, _ONE / np.sqrt(mean + eps))
    for i in range(0, 4 * n, 64):
        store(out + i, load(F32x16, x + i) * factor * load(F32x16, scale + i))


@device(types.void)
def swiglu(gate, up, n, limit, out):
    """out = min(silu(gate), limit) * clip(up, -limit, limit) over n values (a multiple of 16)."""
    high, low = splat(F32x16, limit), splat(F32x16, -limit)
    for i in range(0, 4 * n, 64):
        g, u = load(F32x16, gate + i), load(F32x16, up + i)
        silu = vmin(high, g * vsigmoid(g))
        store(out + i, silu * vmin(high, vmax(low, u)))


@device(types.void)
def rotate(x, half, cos, sin):
    """Rotate pairs (i, i + half) of a head in place by the angles whose cos and sin are given."""
    whole = half // 8 * 8
    for i in range(0, 4 * whole, 32):
        a, b = load(F32x8, x + i), load(F32x8, x + i + 4 * half)
        c, s = load(F32x8, cos + i), load(F32x8, sin + i)
        store(x + i, a * c - b * s)
        store(x + i + 4 * half, b * c + a * s)
    for i in range(4 * whole, 4 * half, 4):
        a, b = load_f32(x + i), load_f32(x + i + 4 * half)
        c, s = load_f32(cos + i), load_f32(sin + i)
        store_f32(x + i, a * c - b * s)
        store_f32(x + i + 4 * half, b * c + a * s)


@njit(forceinline=True)
def add_rows(x, y, n):
    """x += y over n values (a multiple of 16)."""
    for i in range(0, 4 * n, 64):
        store(x + i, load(F32x16, x + i) + load(F32x16, y + i))


@njit(forceinline=True)
def add_scaled(x, y, factor, n):
    """x += factor * y over n values (a multiple of 16)."""
    f = splat(F32x16, factor)
    for i in range(0, 4 * n, 64):
        store(x + i, fma(load(F32x16, y + i), f, load(F32x16, x + i)))


@njit(forceinline=True)
def fill_zero(x, n):
    """x = 0 over n values (a multiple of 16)."""
    for i in range(0, 4 * n, 64):
        store(x + i, zeros(F32x16))


@njit(forceinline=True)
def copy_rows(x, y, n):
    """y = x over n values (a multiple of 16)."""
    for i in range(0, 4 * n, 64):
        store(y + i, load(F32x16, x + i))

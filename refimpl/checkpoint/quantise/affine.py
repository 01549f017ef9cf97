"""Q4_K and Q5_K: blocks of 256 values, x = d * s * q - m * t, codes q from 0 to 15 or 31.

Layout (llama.cpp ggml-common.h, `block_q4_K`, `block_q5_K`): d and m as halves, then the 6-bit
integers s and t of eight sub-blocks of 32 in 12 bytes, then for Q5_K the codes' fifth bits, then
their low four bits.

For each sub-block the scale a and offset b <= 0 of x ~ a q + b are found by least squares: for a
few trial scales the values are rounded to codes, the codes' best (a, b) follow from the normal
equations, and the pair that explains most of the sum of squares is kept; then codes and pair are
improved in turn. Given these, d and m are rounded to halves so that the largest s and t are 63,
and each sub-block picks among the neighbouring integers (s, t) the pair of least error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.checkpoint.quantise.numerics import (
    LANES,
    ONE,
    ZERO,
    compiled,
    half_bits,
    half_value,
    inverse,
    load_tile,
    nearest,
    store_half,
    within,
)

SUB = 32
_LARGEST = np.float32(63.0)
_N = np.float32(SUB)
_TRIALS, _SPACING, _TURNS = 11, np.float32(0.2), 2  # trial widths: largest code - 1 to + 1

# Rows of the workspace, LANES values each; one array, so that the compiler knows they are apart.
_LOW, _HIGH, _SX, _INV, _SQ, _SQQ, _SQX, _A, _B, _GAIN, _ERR, _BEST, _S, _T, _S0, _T0 = (
    row * LANES for row in range(16)
)
_ROWS = 16


@compiled
def _ranges(t: Any, w: Any) -> None:
    """Per lane: the least value (at most 0), the greatest, and the sum."""
    for j in range(LANES):
        w[_LOW + j] = ZERO
        w[_HIGH + j] = t[j]
        w[_SX + j] = ZERO
    for i in range(SUB):
        for j in range(LANES):
            v = t[i * LANES + j]
            w[_LOW + j] = min(w[_LOW + j], v)
            w[_HIGH + j] = max(w[_HIGH + j], v)
            w[_SX + j] += v


@compiled
def _sums(t: Any, w: Any, top: Any) -> None:
    """Per lane: sums of q, q^2 and q x for the codes q of the trial (INV, LOW)."""
    for j in range(LANES):
        w[_SQ + j] = ZERO
        w[_SQQ + j] = ZERO
        w[_SQX + j] = ZERO
    for i in range(SUB):
        for j in range(LANES):
            v = t[i * LANES + j]
            q = nearest((v - w[_LOW + j]) * w[_INV + j], ZERO, top)
            w[_SQ + j] += q
            w[_SQQ + j] += q * q
            w[_SQX + j] += q * v


@compiled
def _fit(w: Any) -> None:
    """Per lane: the least-squares (a, b), b <= 0, of the trial's codes, kept if it is better."""
    for j in range(LANES):
        sq, sqq, sqx, sx = w[_SQ + j], w[_SQQ + j], w[_SQX + j], w[_SX + j]
        det = _N * sqq - sq * sq
        a = (_N * sqx - sx * sq) / det
        b = (sx - a * sq) / _N
        flat = not (det > ZERO and b <= ZERO)
        a = sqx / max(sqq, ONE) if flat else a
        b = ZERO if flat else b
        gain = a * sqx + b * sx
        better = gain > w[_GAIN + j]
        w[_A + j] = a if better else w[_A + j]
        w[_B + j] = b if better else w[_B + j]
        w[_GAIN + j] = gain if better else w[_GAIN + j]


@compiled
def _search(t: Any, w: Any, top: Any) -> None:
    """Per lane: the scale A and offset B of x ~ A q + B."""
    _ranges(t, w)
    for j in range(LANES):  # to begin with, all codes 0
        w[_A + j] = ZERO
        w[_B + j] = min(w[_SX + j] / _N, ZERO)
        w[_GAIN + j] = w[_B + j] * w[_SX + j]
    for k in range(_TRIALS):
        target = top - ONE + _SPACING * np.float32(k)
        for j in range(LANES):
            w[_INV + j] = target * inverse(w[_HIGH + j] - w[_LOW + j])
        _sums(t, w, top)
        _fit(w)
    for _ in range(_TURNS):
        for j in range(LANES):
            w[_LOW + j] = w[_B + j]
            w[_INV + j] = inverse(w[_A + j])
        _sums(t, w, top)
        _fit(w)


@compiled
def _errors(t: Any, w: Any, top: Any) -> None:
    """Per lane: the squared error with scale A and offset LOW."""
    for j in range(LANES):
        w[_INV + j] = inverse(w[_A + j])
        w[_ERR + j] = ZERO
    for i in range(SUB):
        for j in range(LANES):
            v = t[i * LANES + j] - w[_LOW + j]
            q = nearest(v * w[_INV + j], ZERO, top)
            e = v - q * w[_A + j]
            w[_ERR + j] += e * e


@compiled
def _integers(t: Any, w: Any, top: Any, d: Any, m: Any) -> None:
    """Per lane: the integers (S, T) of least error near (A / d, -B / m)."""
    for j in range(LANES):
        w[_S0 + j] = nearest(w[_A + j] * inverse(d[j]), ZERO, _LARGEST)
        w[_T0 + j] = nearest(-w[_B + j] * inverse(m[j]), ZERO, _LARGEST)
        w[_S + j] = w[_S0 + j]
        w[_T + j] = w[_T0 + j]
        w[_BEST + j] = np.float32(np.inf)
    for ds in range(-1, 2):
        for dt in range(-1, 2):
            for j in range(LANES):
                w[_A + j] = d[j] * within(w[_S0 + j] + np.float32(ds), ZERO, _LARGEST)
                w[_LOW + j] = -m[j] * within(w[_T0 + j] + np.float32(dt), ZERO, _LARGEST)
            _errors(t, w, top)
            for j in range(LANES):
                better = w[_ERR + j] < w[_BEST + j]
                w[_BEST + j] = w[_ERR + j] if better else w[_BEST + j]
                s = within(w[_S0 + j] + np.float32(ds), ZERO, _LARGEST)
                o = within(w[_T0 + j] + np.float32(dt), ZERO, _LARGEST)
                w[_S + j] = s if better else w[_S + j]
                w[_T + j] = o if better else w[_T + j]


@compiled
def _codes(t: Any, w: Any, top: Any, d: Any, m: Any, codes: Any) -> None:
    for j in range(LANES):
        w[_INV + j] = inverse(d[j] * w[_S + j])
        w[_LOW + j] = -m[j] * w[_T + j]
    for i in range(SUB):
        for j in range(LANES):
            v = t[i * LANES + j] - w[_LOW + j]
            codes[i * LANES + j] = np.uint8(nearest(v * w[_INV + j], ZERO, top))


@compiled
def _halves(w: Any, d: Any, m: Any, bits: Any) -> None:
    """The halves d and m of each block of eight lanes, spread over its lanes."""
    for first in range(0, LANES, 8):
        a, b = ZERO, ZERO
        for j in range(first, first + 8):
            a = max(a, w[_A + j])
            b = max(b, -w[_B + j])
        bits[first] = half_bits(a / _LARGEST)
        bits[first + 1] = half_bits(b / _LARGEST)
        for j in range(first, first + 8):
            d[j] = half_value(bits[first])
            m[j] = half_value(bits[first + 1])


@compiled
def _pack(w: Any, bits: Any, codes: Any, first: Any, five: Any, out: Any) -> None:
    """Write the block of lanes first..first+8."""
    store_half(out, 0, bits[first])
    store_half(out, 2, bits[first + 1])
    for j in range(4):
        s, t = np.uint8(w[_S + first + j]), np.uint8(w[_T + first + j])
        s4, t4 = np.uint8(w[_S + first + j + 4]), np.uint8(w[_T + first + j + 4])
        out[4 + j] = s | ((s4 >> 4) << 6)
        out[8 + j] = t | ((t4 >> 4) << 6)
        out[12 + j] = (s4 & 15) | ((t4 & 15) << 4)
    low = 48 if five else 16
    for i in range(SUB):
        high = 0
        for pair in range(4):
            c0 = codes[i * LANES + first + 2 * pair]
            c1 = codes[i * LANES + first + 2 * pair + 1]
            out[low + 32 * pair + i] = (c0 & 15) | ((c1 & 15) << 4)
            high |= ((c0 >> 4) | ((c1 >> 4) << 1)) << (2 * pair)
        if five:
            out[16 + i] = high


@compiled
def quantise_affine(x: Any, out: Any, bits_per_code: Any) -> None:
    """x (blocks, 256) float32 to Q4_K (144 bytes) or Q5_K (176 bytes) blocks."""
    top = np.float32((1 << bits_per_code) - 1)
    sub = x.reshape(-1, SUB)
    t = np.empty(SUB * LANES, np.float32)
    w = np.empty(_ROWS * LANES, np.float32)
    codes = np.empty(SUB * LANES, np.uint8)
    d, m = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    bits = np.empty(LANES, np.uint32)
    for first in range(0, sub.shape[0], LANES):
        load_tile(sub, first, SUB, t)
        _search(t, w, top)
        _halves(w, d, m, bits)
        _integers(t, w, top, d, m)
        _codes(t, w, top, d, m, codes)
        for lane in range(0, min(LANES, sub.shape[0] - first), 8):
            _pack(w, bits, codes, lane, bits_per_code == 5, out[(first + lane) // 8])

"""Q6_K, IQ4_XS and IQ4_NL: blocks of values x = d * s * c, c one of a fixed set of numbers.

Q6_K has codes -32..31 in sub-blocks of 16 with 8-bit s; IQ4_XS the 16 uneven numbers of the IQ4
types in sub-blocks of 32 with 6-bit s; IQ4_NL the same numbers, 32 to a block, and no s. d is a
half. Layouts: llama.cpp ggml-common.h (`block_q6_K`, `block_iq4_xs`, `block_iq4_nl`).

For each sub-block the scale a of x ~ a c is found by least squares: the value of greatest
magnitude is laid upon a few trial numbers near both ends of the set, all values are rounded to
it, and a = sum(c x) / sum(c^2) of the trial that explains most is kept and improved in turn.
d is rounded to a half so that the greatest |s| is the end of its range, and each sub-block picks
among the neighbouring integers s the one of least error.
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

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers of the IQ4 types, found by their author to fit weights (`kvalues_iq4nl`)."""

_BELOW, _ABOVE = -128, 120  # beyond these every value belongs to the first or the last number


def _nearest_number() -> Any:
    """For each half-step from `_BELOW` to `_ABOVE` the nearest of the IQ4 numbers.

    Two numbers part at a multiple of a half, so floor(2 x) decides; index 2 (x - _BELOW)."""
    middle = np.arange(2 * _BELOW, 2 * _ABOVE) / 2 + 0.25
    nearest_one = np.abs(middle[:, None] - np.array(IQ4)).argmin(1)
    return np.array(IQ4, np.float32)[nearest_one], nearest_one.astype(np.uint8)


_NUMBER, _CODE = _nearest_number()
_TURNS = 2

# Rows of the workspace, LANES values each; one array, so that the compiler knows they are apart.
_PEAK, _INV, _SCC, _SCX, _A, _GAIN, _ERR, _BEST, _S, _S0 = (row * LANES for row in range(10))
_ROWS = 10


@compiled
def _step(x: Any) -> Any:
    """Index of x into the tables of the IQ4 numbers."""
    x = within(x, np.float32(_BELOW), np.float32(_ABOVE - 0.5))
    return np.int32((x - np.float32(_BELOW)) * np.float32(2.0))


@compiled
def _number(x: Any, even: Any) -> Any:
    """The number of the set that is nearest to x."""
    return nearest(x, np.float32(-32.0), np.float32(31.0)) if even else _NUMBER[_step(x)]


@compiled
def _peaks(t: Any, w: Any, size: Any) -> None:
    """Per lane: the value of greatest magnitude, with its sign."""
    for j in range(LANES):
        w[_PEAK + j] = t[j]
    for i in range(size):
        for j in range(LANES):
            v = t[i * LANES + j]
            w[_PEAK + j] = v if abs(v) > abs(w[_PEAK + j]) else w[_PEAK + j]


@compiled
def _sums(t: Any, w: Any, size: Any, even: Any) -> None:
    """Per lane: sums of c^2 and c x for the numbers c nearest to x * INV."""
    for j in range(LANES):
        w[_SCC + j] = ZERO
        w[_SCX + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v = t[i * LANES + j]
            c = _number(v * w[_INV + j], even)
            w[_SCC + j] += c * c
            w[_SCX + j] += c * v


@compiled
def _fit(w: Any) -> None:
    """Per lane: the least-squares scale of the trial's numbers, kept if it is better."""
    for j in range(LANES):
        a = w[_SCX + j] / max(w[_SCC + j], ONE)
        gain = a * w[_SCX + j]
        better = gain > w[_GAIN + j]
        w[_A + j] = a if better else w[_A + j]
        w[_GAIN + j] = gain if better else w[_GAIN + j]


@compiled
def _search(t: Any, w: Any, size: Any, even: Any, trials: Any) -> None:
    """Per lane: the scale A of x ~ A c."""
    _peaks(t, w, size)
    for j in range(LANES):
        w[_A + j] = ZERO
        w[_GAIN + j] = ZERO
    for k in range(len(trials)):
        for j in range(LANES):
            w[_INV + j] = trials[k] * inverse(w[_PEAK + j])
        _sums(t, w, size, even)
        _fit(w)
    for _ in range(_TURNS):
        for j in range(LANES):
            w[_INV + j] = inverse(w[_A + j])
        _sums(t, w, size, even)
        _fit(w)


@compiled
def _errors(t: Any, w: Any, size: Any, even: Any) -> None:
    """Per lane: the squared error with scale A."""
    for j in range(LANES):
        w[_INV + j] = inverse(w[_A + j])
        w[_ERR + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v = t[i * LANES + j]
            e = v - _number(v * w[_INV + j], even) * w[_A + j]
            w[_ERR + j] += e * e


@compiled
def _halves(w: Any, subs: Any, least: Any, d: Any, bits: Any) -> None:
    """The half d of each block of `subs` lanes, spread over its lanes: the scale of greatest
    magnitude, whatever its sign, becomes the integer `least`."""
    for first in range(0, LANES, subs):
        a = ZERO
        for j in range(first, first + subs):
            a = w[_A + j] if abs(w[_A + j]) > abs(a) else a
        bits[first] = half_bits(a / least)
        for j in range(first, first + subs):
            d[j] = half_value(bits[first])


@compiled
def _integers(t: Any, w: Any, size: Any, even: Any, least: Any, d: Any) -> None:
    """Per lane: the integer S of least error near A / d."""
    most = -least - ONE
    for j in range(LANES):
        w[_S0 + j] = nearest(w[_A + j] * inverse(d[j]), least, most)
        w[_S + j] = w[_S0 + j]
        w[_BEST + j] = np.float32(np.inf)
    for ds in range(-1, 2):
        for j in range(LANES):
            w[_A + j] = d[j] * within(w[_S0 + j] + np.float32(ds), least, most)
        _errors(t, w, size, even)
        for j in range(LANES):
            better = w[_ERR + j] < w[_BEST + j]
            w[_BEST + j] = w[_ERR + j] if better else w[_BEST + j]
            s = within(w[_S0 + j] + np.float32(ds), least, most)
            w[_S + j] = s if better else w[_S + j]


@compiled
def _codes(t: Any, w: Any, size: Any, even: Any, d: Any, codes: Any) -> None:
    for j in range(LANES):
        w[_INV + j] = inverse(d[j] * w[_S + j])
    for i in range(size):
        for j in range(LANES):
            v = t[i * LANES + j] * w[_INV + j]
            if even:
                c = nearest(v, np.float32(-32.0), np.float32(31.0)) + np.float32(32.0)
                codes[i * LANES + j] = np.uint8(c)
            else:
                codes[i * LANES + j] = _CODE[_step(v)]


@compiled
def _pack_q6_k(w: Any, bits: Any, codes: Any, first: Any, out: Any) -> None:
    """Write the block of lanes first..first+16: low bits, high bits, integers, d."""
    for half in range(2):
        for i in range(32):
            column = (i % 16) * LANES + first + 8 * half + i // 16
            c0, c1, c2, c3 = (
                codes[column], codes[column + 2], codes[column + 4], codes[column + 6]
            )  # fmt: skip
            out[64 * half + i] = (c0 & 15) | ((c2 & 15) << 4)
            out[64 * half + 32 + i] = (c1 & 15) | ((c3 & 15) << 4)
            high = (c0 >> 4) | ((c1 >> 4) << 2) | ((c2 >> 4) << 4) | ((c3 >> 4) << 6)
            out[128 + 32 * half + i] = high
    for j in range(16):
        out[192 + j] = np.uint8(np.int32(w[_S + first + j]) & 255)
    store_half(out, 208, bits[first])


@compiled
def _pack_iq4(w: Any, bits: Any, codes: Any, first: Any, subs: Any, out: Any) -> None:
    """Write the block of lanes first..first+subs: d, the 6-bit integers if subs is 8, codes."""
    store_half(out, 0, bits[first])
    at = 2
    if subs == 8:
        at = 8
        high = np.int32(0)
        for j in range(0, 8, 2):
            s0 = np.int32(w[_S + first + j]) + 32
            s1 = np.int32(w[_S + first + j + 1]) + 32
            out[4 + j // 2] = (s0 & 15) | ((s1 & 15) << 4)
            high |= ((s0 >> 4) | ((s1 >> 4) << 2)) << (2 * j)
        out[2] = high & 255
        out[3] = high >> 8
    for j in range(subs):
        for i in range(16):
            low = codes[i * LANES + first + j]
            out[at + 16 * j + i] = low | (codes[(i + 16) * LANES + first + j] << 4)


@compiled
def quantise_scaled(x: Any, out: Any, size: Any, subs: Any, least: Any, trials: Any) -> None:
    """x (blocks, size * subs) float32 to blocks of Q6_K (size 16, subs 16: 210 bytes), IQ4_XS
    (32, 8: 136 bytes) or IQ4_NL (32, 1: 18 bytes).

    `least` is the least integer s, or 1 where there is none; `trials` the numbers tried for the
    peak.
    """
    even = size == 16
    sub = x.reshape(-1, size)
    t = np.empty(size * LANES, np.float32)
    w = np.empty(_ROWS * LANES, np.float32)
    codes = np.empty(size * LANES, np.uint8)
    d, bits = np.empty(LANES, np.float32), np.empty(LANES, np.uint32)
    for first in range(0, sub.shape[0], LANES):
        load_tile(sub, first, size, t)
        _search(t, w, size, even, trials)
        _halves(w, subs, least, d, bits)
        if subs == 1:
            for j in range(LANES):
                w[_S + j] = ONE
        else:
            _integers(t, w, size, even, least, d)
        _codes(t, w, size, even, d, codes)
        for lane in range(0, min(LANES, sub.shape[0] - first), subs):
            if even:
                _pack_q6_k(w, bits, codes, lane, out[(first + lane) // subs])
            else:
                _pack_iq4(w, bits, codes, lane, subs, out[(first + lane) // subs])

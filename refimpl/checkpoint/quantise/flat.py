"""Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 values, by llama.cpp's plain rules, bit for bit.

Layouts: llama.cpp ggml-common.h (`block_q8_0`, ...): the half d (Q4_1, Q5_1: and the half m), for
the 5-bit types four bytes with the codes' fifth bits, then the codes, two to a byte but for Q8_0.

The scale follows from the value of greatest magnitude alone (Q4_1, Q5_1: from the range); no
search, so the bytes equal those of llama-quantize and of the `gguf` package, which the tests
compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.checkpoint.quantise.numerics import (
    ZERO,
    compiled,
    half_bits,
    inverse,
    store_half,
)

BLOCK = 32
_HALF = np.float32(0.5)


@compiled
def _peak(x: Any) -> Any:
    """The first value of greatest magnitude, with its sign."""
    peak = ZERO
    for i in range(BLOCK):
        peak = x[i] if abs(x[i]) > abs(peak) else peak
    return peak


@compiled
def _q8_0(x: Any, out: Any) -> None:
    d = abs(_peak(x)) / np.float32(127.0)
    inv = inverse(d)
    store_half(out, 0, half_bits(d))
    for i in range(BLOCK):  # to the nearest integer, halves away from zero
        v = x[i] * inv
        size = np.floor(abs(v))
        size += np.floor(np.float32(2.0) * (abs(v) - size))
        out[2 + i] = np.uint8(np.int32(size if v >= ZERO else -size) & 255)


@compiled
def _pack(codes: Any, five: Any, at: Any, out: Any) -> None:
    """The codes from byte `at` on: with five bits first the high ones, value i in bit i."""
    if five:
        high = np.uint32(0)
        for i in range(BLOCK):
            high |= np.uint32(codes[i] >> 4) << np.uint32(i)
        for k in range(4):
            out[at + k] = np.uint8((high >> np.uint32(8 * k)) & np.uint32(255))
        at += 4
    for i in range(BLOCK // 2):
        out[at + i] = (codes[i] & 15) | ((codes[i + BLOCK // 2] & 15) << 4)


@compiled
def _centred(x: Any, steps: Any, codes: Any, out: Any) -> None:
    """Q4_0 (8 steps) and Q5_0 (16): x = d (q - steps), the peak being -steps d."""
    d = _peak(x) / np.float32(-steps)
    inv = inverse(d)
    store_half(out, 0, half_bits(d))
    for i in range(BLOCK):
        q = np.int32(x[i] * inv + (np.float32(steps) + _HALF))
        codes[i] = min(q, 2 * steps - 1)
    _pack(codes, steps == 16, 2, out)


@compiled
def _from_least(x: Any, top: Any, codes: Any, out: Any) -> None:
    """Q4_1 (top code 15) and Q5_1 (31): x = d q + m, m the least value."""
    low, high = x[0], x[0]
    for i in range(BLOCK):
        low = min(low, x[i])
        high = max(high, x[i])
    d = (high - low) / np.float32(top)
    inv = inverse(d)
    store_half(out, 0, half_bits(d))
    store_half(out, 2, half_bits(low))
    for i in range(BLOCK):
        codes[i] = min(np.int32((x[i] - low) * inv + _HALF), top)
    _pack(codes, top == 31, 4, out)


@compiled
def quantise_flat(x: Any, out: Any, kind: Any) -> None:
    """x (blocks, 32) float32 to blocks of Q8_0 (kind 80, 34 bytes), Q4_0 (40, 18 bytes), Q4_1 (41,
    20 bytes), Q5_0 (50, 22 bytes) or Q5_1 (51, 24 bytes)."""
    codes = np.empty(BLOCK, np.uint8)
    for b in range(len(x)):
        if kind == 80:
            _q8_0(x[b], out[b])
        elif kind == 41 or kind == 51:
            _from_least(x[b], 15 if kind == 41 else 31, codes, out[b])
        else:
            _centred(x[b], 8 if kind == 40 else 16, codes, out[b])

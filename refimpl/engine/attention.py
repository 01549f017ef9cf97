"""Grouped-query attention over the engine's KV caches.

Cache layout of one layer, S slots (a multiple of 16), g KV heads, D lanes: keys as
[g][S/16][D][16], sixteen positions side by side, so that scores need no horizontal sums; values as
[g][S][D]. Position p lies in slot p mod S: a ring if S is less than the context. Types: f16, f32,
and q8_0 (int8 with one float16 scale for 32 lanes, kept in an array of its own).

Keys are taken in splits of 512 absolute positions, each with a softmax of its own, and the splits
are merged in ascending order. The partition depends on positions alone, so a row's result has
the same bits for any chunking, ring size and thread count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Kv, field
from refimpl.engine.jit import cfunc, njit, overload
from refimpl.engine.maths import exp_one, sigmoid_one, vexp
from refimpl.engine.simd import Parameter, Simd
from refimpl.engine.vec import (
    F16x16,
    F32x16,
    I8x16,
    I32x16,
    convert,
    device,
    fma,
    lane_numbers,
    load,
    load_f16,
    load_f32,
    reduce_add,
    reduce_max,
    splat,
    store,
    store_f16,
    store_f32,
    store_i8,
    vabs,
    vmax,
    vround,
    where_less,
    zeros,
)

SPLIT = 512
"""Positions whose softmax is formed at once."""
HEADS = 4
"""Query heads that share one pass over the keys and values."""
_INLINE = {"forceinline": True}
_MINUS_INFINITY = np.float32(-math.inf)


@dataclass(frozen=True)
class KvType(Parameter):
    """How keys and values are kept: 'f16', 'f32' or 'q8_0'.

    Attributes:
        value_bytes: bytes of a value, without scales.
        scaled: whether 32 values share a float16 scale.
    """

    value_bytes: int
    scaled: bool = False

    def row_bytes(self, lanes: int) -> int:
        """Bytes of one head's key (or value) row."""
        return lanes * self.value_bytes + (lanes // 32 * 2 if self.scaled else 0)


KV_TYPES = {k.name: k for k in (KvType("f16", 2), KvType("f32", 4), KvType("q8_0", 1, True))}


def load_key(kv: Any, keys: int, scales: int, group: int, lane: int, lanes: int) -> Any:
    """Lane `lane` of the 16 keys of a slot group, as F32x16."""
    raise NotImplementedError("only called from compiled kernels")


def load_value(kv: Any, values: int, scales: int, slot: int, lane: int, lanes: int) -> Any:
    """Lanes `lane`..`lane`+15 of the value in a slot, as F32x16."""
    raise NotImplementedError("only called from compiled kernels")


def store_key(kv: Any, keys: int, scales: int, slot: int, row: int, lanes: int) -> Any:
    """Put a key row (float32 at `row`) into its slot."""
    raise NotImplementedError("only called from compiled kernels")


def store_value(kv: Any, values: int, scales: int, slot: int, row: int, lanes: int) -> Any:
    """Put a value row (float32 at `row`) into its slot."""
    raise NotImplementedError("only called from compiled kernels")


@overload(load_key, jit_options=_INLINE)
def _load_key(kv, keys, scales, group, lane, lanes):
    def f16(kv, keys, scales, group, lane, lanes):
        return convert(F32x16, load(F16x16, keys + (group * lanes + lane) * 32))

    def f32(kv, keys, scales, group, lane, lanes):
        return load(F32x16, keys + (group * lanes + lane) * 64)

    def q8_0(kv, keys, scales, group, lane, lanes):
        codes = convert(F32x16, load(I8x16, keys + (group * lanes + lane) * 16))
        scale = load(F16x16, scales + (group * (lanes // 32) + lane // 32) * 32)
        return codes * convert(F32x16, scale)

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


@overload(load_value, jit_options=_INLINE)
def _load_value(kv, values, scales, slot, lane, lanes):
    def f16(kv, values, scales, slot, lane, lanes):
        return convert(F32x16, load(F16x16, values + (slot * lanes + lane) * 2))

    def f32(kv, values, scales, slot, lane, lanes):
        return load(F32x16, values + (slot * lanes + lane) * 4)

    def q8_0(kv, values, scales, slot, lane, lanes):
        codes = convert(F32x16, load(I8x16, values + slot * lanes + lane))
        scale = load_f16(scales + (slot * (lanes // 32) + lane // 32) * 2)
        return codes * splat(F32x16, scale)

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


@njit(forceinline=True)
def _scale_of(row):
    """max|x| / 127 of 32 values, rounded to float16."""
    peak = reduce_max(vmax(vabs(load(F32x16, row)), vabs(load(F32x16, row + 64))))
    return peak / np.float32(127)


@njit(forceinline=True)
def _code(value, inverse):
    rounded = vround(splat(F32x16, value * inverse))
    return np.int8(reduce_max(convert(I32x16, rounded)))


@overload(store_key, jit_options=_INLINE)
def _store_key(kv, keys, scales, slot, row, lanes):
    def f16(kv, keys, scales, slot, row, lanes):
        at = keys + slot // 16 * lanes * 32 + slot % 16 * 2
        for d in range(lanes):
            store_f16(at + d * 32, load_f32(row + 4 * d))

    def f32(kv, keys, scales, slot, row, lanes):
        at = keys + slot // 16 * lanes * 64 + slot % 16 * 4
        for d in range(lanes):
            store_f32(at + d * 64, load_f32(row + 4 * d))

    def q8_0(kv, keys, scales, slot, row, lanes):
        at = keys + slot // 16 * lanes * 16 + slot % 16
        to = scales + slot // 16 * (lanes // 32) * 32 + slot % 16 * 2
        for block in range(lanes // 32):
            scale = _scale_of(row + 128 * block)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            store_f16(to + 32 * block, scale)
            for d in range(32 * block, 32 * block + 32):
                store_i8(at + d * 16, _code(load_f32(row + 4 * d), inverse))

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


@overload(store_value, jit_options=_INLINE)
def _store_value(kv, values, scales, slot, row, lanes):
    def f16(kv, values, scales, slot, row, lanes):
        for d in range(0, lanes, 16):
            half = convert(F16x16, load(F32x16, row + 4 * d))
            store(values + (slot * lanes + d) * 2, half)

    def f32(kv, values, scales, slot, row, lanes):
        for d in range(0, lanes, 16):
            store(values + (slot * lanes + d) * 4, load(F32x16, row + 4 * d))

    def q8_0(kv, values, scales, slot, row, lanes):
        for block in range(lanes // 32):
            scale = _scale_of(row + 128 * block)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            store_f16(scales + (slot * (lanes // 32) + block) * 2, scale)
            for d in range(32 * block, 32 * block + 32, 16):
                codes = vround(load(F32x16, row + 4 * d) * splat(F32x16, inverse))
                store(values + slot * lanes + d, convert(I8x16, convert(I32x16, codes)))

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


def state_bytes(heads: int, lanes: int) -> int:
    """Scratch of one `attend` call for a group of `heads` query heads."""
    padded = -(-heads // HEADS) * HEADS
    return 4 * padded * (SPLIT + 2 * (lanes + 16))


@cache
def storing(simd: Simd, kv: KvType) -> Any:
    """The compiled function (cache record, slot, key, value, lanes) that keeps a position.

    `slot` counts over all KV heads' slots; key and value are float32 rows (lanes,).
    """

    @cfunc(types.void(*[types.int64] * 5), cache=True, error_model="numpy")
    def keep_position(record, slot, key, value, lanes):
        simd  # noqa: B018  # part of the cache key
        store_key(kv, field(record, Kv.KEYS), field(record, Kv.KEY_SCALES), slot, key, lanes)
        store_value(
            kv, field(record, Kv.VALUES), field(record, Kv.VALUE_SCALES), slot, value, lanes
        )

    return keep_position


@cache
def attending(simd: Simd, kv: KvType) -> Any:
    """The compiled function for one row and one KV head, all arguments int64:

        q, heads, lanes, cache record, place, first, last, gate, out, scratch

    Positions first..last are visible. q (heads, lanes) float32, normed and rotated; `place` is
    the KV head's first slot among all heads' slots; gate (heads,) before its sigmoid; out (heads,
    lanes) float32; scratch holds `state_bytes`.
    """

    @cfunc(types.void(*[types.int64] * 10), cache=True, error_model="numpy")
    def attend(q, heads, lanes, record, place, first, last, gate, out, scratch):
        simd  # noqa: B018  # part of the cache key
        padded = (heads + HEADS - 1) // HEADS * HEADS
        state = 4 * (lanes + 16)  # per head: values, then maximum and sum
        part = scratch + 4 * padded * SPLIT
        total = part + padded * state
        for split in range(first // SPLIT, last // SPLIT + 1):
            low = max(first, split * SPLIT)
            high = min(last, split * SPLIT + SPLIT - 1)
            into = total if low == first else part
            for head in range(0, heads, HEADS):
                _split(kv, q, head, heads, lanes, record, place, low, high, split * SPLIT,
                       scratch, into + head * state, state)  # fmt: skip
            if low != first:
                for head in range(heads):
                    _merge(total + head * state, part + head * state, lanes)
        for head in range(heads):
            at = total + head * state
            factor = sigmoid_one(load_f32(gate + 4 * head)) / load_f32(at + 4 * lanes + 4)
            for d in range(0, 4 * lanes, 64):
                scaled = load(F32x16, at + d) * splat(F32x16, factor)
                store(out + head * 4 * lanes + d, scaled)

    return attend


@njit(forceinline=True)
def _merge(total, part, lanes):
    """Add a split's softmax to the running one."""
    old, new = load_f32(total + 4 * lanes), load_f32(part + 4 * lanes)
    peak = max(old, new)
    a, b = exp_one(old - peak), exp_one(new - peak)
    for d in range(0, 4 * lanes, 64):
        scaled = load(F32x16, part + d) * splat(F32x16, b)
        store(total + d, fma(load(F32x16, total + d), splat(F32x16, a), scaled))
    store_f32(total + 4 * lanes, peak)
    both = load_f32(total + 4 * lanes + 4) * a + load_f32(part + 4 * lanes + 4) * b
    store_f32(total + 4 * lanes + 4, both)


@device(types.void)
def _split(kv, q, head, heads, lanes, record, place, low, high, base, scores, state,
           state_bytes):  # fmt: skip
    """Scores, softmax and weighted values of four query heads over positions low..high of one
    split; heads beyond the last repeat it and are not used."""
    keys, key_scales = field(record, Kv.KEYS), field(record, Kv.KEY_SCALES)
    values, value_scales = field(record, Kv.VALUES), field(record, Kv.VALUE_SCALES)
    slots = field(record, Kv.SLOTS)
    q0 = q + head * 4 * lanes
    q1 = q + min(head + 1, heads - 1) * 4 * lanes
    q2 = q + min(head + 2, heads - 1) * 4 * lanes
    q3 = q + min(head + 3, heads - 1) * 4 * lanes
    factor = splat(F32x16, np.float32(1) / np.sqrt(np.float32(lanes)))
    none = splat(F32x16, _MINUS_INFINITY)
    p0 = p1 = p2 = p3 = none
    for position in range(low // 16 * 16, high + 1, 16):
        group = (place + position % slots) // 16
        s0 = s1 = s2 = s3 = zeros(F32x16)
        for d in range(lanes):
            k = load_key(kv, keys, key_scales, group, d, lanes)
            s0 = fma(splat(F32x16, load_f32(q0 + 4 * d)), k, s0)
            s1 = fma(splat(F32x16, load_f32(q1 + 4 * d)), k, s1)
            s2 = fma(splat(F32x16, load_f32(q2 + 4 * d)), k, s2)
            s3 = fma(splat(F32x16, load_f32(q3 + 4 * d)), k, s3)
        # slots outside low..high hold other positions, or nothing yet
        at = lane_numbers(I32x16) + splat(I32x16, np.int32(position - low))
        end = splat(I32x16, np.int32(high - low + 1))
        start = zeros(I32x16)
        s0 = where_less(at, start, none, where_less(at, end, s0 * factor, none))
        s1 = where_less(at, start, none, where_less(at, end, s1 * factor, none))
        s2 = where_less(at, start, none, where_less(at, end, s2 * factor, none))
        s3 = where_less(at, start, none, where_less(at, end, s3 * factor, none))
        to = scores + 4 * (position - base)
        store(to, s0)
        store(to + 4 * SPLIT, s1)
        store(to + 8 * SPLIT, s2)
        store(to + 12 * SPLIT, s3)
        p0, p1, p2, p3 = vmax(s0, p0), vmax(s1, p1), vmax(s2, p2), vmax(s3, p3)
    _softmax(scores, low, high, base, reduce_max(p0), state + 4 * lanes)
    _softmax(scores + 4 * SPLIT, low, high, base, reduce_max(p1), state + state_bytes + 4 * lanes)
    _softmax(
        scores + 8 * SPLIT, low, high, base, reduce_max(p2), state + 2 * state_bytes + 4 * lanes
    )
    _softmax(
        scores + 12 * SPLIT, low, high, base, reduce_max(p3), state + 3 * state_bytes + 4 * lanes
    )
    for d in range(0, lanes, 32):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zeros(F32x16)
        for position in range(low, high + 1):
            slot = place + position % slots
            va = load_value(kv, values, value_scales, slot, d, lanes)
            vb = load_value(kv, values, value_scales, slot, d + 16, lanes)
            at = scores + 4 * (position - base)
            w0, w1 = splat(F32x16, load_f32(at)), splat(F32x16, load_f32(at + 4 * SPLIT))
            w2 = splat(F32x16, load_f32(at + 8 * SPLIT))
            w3 = splat(F32x16, load_f32(at + 12 * SPLIT))
            a0, b0 = fma(w0, va, a0), fma(w0, vb, b0)
            a1, b1 = fma(w1, va, a1), fma(w1, vb, b1)
            a2, b2 = fma(w2, va, a2), fma(w2, vb, b2)
            a3, b3 = fma(w3, va, a3), fma(w3, vb, b3)
        to = state + 4 * d
        store(to, a0)
        store(to + 64, b0)
        store(to + state_bytes, a1)
        store(to + state_bytes + 64, b1)
        store(to + 2 * state_bytes, a2)
        store(to + 2 * state_bytes + 64, b2)
        store(to + 3 * state_bytes, a3)
        store(to + 3 * state_bytes + 64, b3)


@device(types.void)
def _softmax(scores, low, high, base, peak, out):
    """Scores to e^(score - peak); peak and their sum at `out`. Masked lanes hold minus infinity,
    whose clamped exponential must count as nothing."""
    total = zeros(F32x16)
    bound, top = zeros(I32x16), splat(I32x16, np.int32(high - low + 1))
    for position in range(low // 16 * 16, high + 1, 16):
        at = scores + 4 * (position - base)
        e = vexp(load(F32x16, at) - splat(F32x16, peak))
        lane = lane_numbers(I32x16) + splat(I32x16, np.int32(position - low))
        none = zeros(F32x16)
        e = where_less(lane, bound, none, where_less(lane, top, e, none))
        store(at, e)
        total = total + e
    store_f32(out, peak)
    store_f32(out + 4, reduce_add(total))

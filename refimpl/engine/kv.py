"""How keys and values are kept, and reading and writing them in compiled code.

Cache layout of one layer, S slots (a multiple of 16), g KV heads, D lanes: keys as
[g][S/16][D][16], sixteen positions side by side, so that scores need no horizontal sums; values as
[g][S][D]. Position p lies in slot p mod S: a ring if S is less than the context. Types: f16, f32,
and q8_0 (int8 with one float16 scale for 32 lanes, kept in arrays of their own, [g][S/16][D/32][16]
for keys and for values).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Kv, field
from refimpl.engine.jit import cfunc, njit, overload
from refimpl.engine.loads import (
    load,
    load_f32,
    load_i8,
    prefetch,
    stack,
    store,
    store_f16,
    store_f32,
    store_i8,
)
from refimpl.engine.running import add_sums, zero_sums
from refimpl.engine.simd import Parameter, Simd
from refimpl.engine.vec import (
    F16x16,
    F32x16,
    I8x16,
    I32x16,
    convert,
    reduce_max,
    splat,
    vabs,
    vmax,
    vround,
)

_INLINE = {"forceinline": True}


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


def load_key(kv: Any, keys: int, lane: int) -> Any:
    """One lane of the 16 keys of a slot group, as F32x16, q8_0 without their scales; lanes are
    counted from the array's beginning on."""
    raise NotImplementedError("only called from compiled kernels")


def load_value(kv: Any, values: int, lane: int) -> Any:
    """Lanes `lane`..`lane`+15 of a value; as `load_key`."""
    raise NotImplementedError("only called from compiled kernels")


def begin_block(kv: Any, sums: Any, total: Any) -> Any:
    """The sums to which products with 32 lanes of keys are added."""
    raise NotImplementedError("only called from compiled kernels")


def end_block(kv: Any, total: Any, part: Any, scales: int, block: int) -> Any:
    """The total with these sums, which have the scales of the keys' block."""
    raise NotImplementedError("only called from compiled kernels")


def fetch_ahead(kv: Any, array: int, value: int) -> Any:
    """Ask for the cache lines of 32 values, by the number of the first in an array."""
    raise NotImplementedError("only called from compiled kernels")


def store_key(kv: Any, keys: int, scales: int, slot: int, row: int, lanes: int) -> Any:
    """Put a key row (float32 at `row`) into its slot."""
    raise NotImplementedError("only called from compiled kernels")


def store_value(kv: Any, values: int, scales: int, slot: int, row: int, lanes: int) -> Any:
    """Put a value row (float32 at `row`) into its slot."""
    raise NotImplementedError("only called from compiled kernels")


@overload(load_key, jit_options=_INLINE)
def _load_key(kv, keys, lane):
    def f16(kv, keys, lane):
        return convert(F32x16, load(F16x16, keys + lane * 32))

    def f32(kv, keys, lane):
        return load(F32x16, keys + lane * 64)

    def q8_0(kv, keys, lane):
        return convert(F32x16, load(I8x16, keys + lane * 16))

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


@overload(load_value, jit_options=_INLINE)
def _load_value(kv, values, lane):
    def f16(kv, values, lane):
        return convert(F32x16, load(F16x16, values + lane * 2))

    def f32(kv, values, lane):
        return load(F32x16, values + lane * 4)

    def q8_0(kv, values, lane):
        return convert(F32x16, load(I8x16, values + lane))

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


@overload(begin_block, jit_options=_INLINE)
def _begin_block(kv, sums, total):
    def on(kv, sums, total):
        return total

    def anew(kv, sums, total):
        return zero_sums(sums)

    return anew if kv.parameter.scaled else on


@overload(end_block, jit_options=_INLINE)
def _end_block(kv, total, part, scales, block):
    def on(kv, total, part, scales, block):
        return part

    def scaled(kv, total, part, scales, block):
        scale = convert(F32x16, load(F16x16, scales + block * 32))
        return add_sums(total, part, scale)

    return scaled if kv.parameter.scaled else on


@overload(fetch_ahead, jit_options=_INLINE)
def _fetch_ahead(kv, array, value):
    size = kv.parameter.value_bytes

    def one(kv, array, value):
        prefetch(array + value * size)

    def two(kv, array, value):
        prefetch(array + value * size)
        prefetch(array + value * size + 64)

    return two if size == 4 else one


def block_weights(
    kv: Any, weights: int, scales: int, first: int, count: int, block: int, blocks: int, heads: int,
    stride: int, room: int,
) -> Any:  # fmt: skip
    """Where the weights of `count` positions lie for one block of 32 lanes of their values: for
    q8_0 in `room`, with the values' scales.

    Args:
        weights: of the first position and head, those of the next head `stride` bytes on.
        first: the first position's slot among all heads' slots.
    """
    raise NotImplementedError("only called from compiled kernels")


@overload(block_weights, jit_options=_INLINE)
def _block_weights(kv, weights, scales, first, count, block, blocks, heads, stride, room):
    def same(kv, weights, scales, first, count, block, blocks, heads, stride, room):
        return weights

    def scaled(kv, weights, scales, first, count, block, blocks, heads, stride, room):
        begin = first // 16 * 16
        for slot in range(begin, first + count, 16):
            scale = convert(F32x16, load(F16x16, scales + (slot // 16 * blocks + block) * 32))
            for head in range(heads):
                at = head * stride + 4 * (slot - first)
                store(room + head * stride + 4 * (slot - begin), load(F32x16, weights + at) * scale)
        return room + 4 * (first - begin)

    return scaled if kv.parameter.scaled else same


@njit(forceinline=True)
def _quantise(row, codes):
    """Write 32 values as int8 at `codes`; their scale, max|x| / 127."""
    low, high = load(F32x16, row), load(F32x16, row + 64)
    scale = reduce_max(vmax(vabs(low), vabs(high))) / np.float32(127)
    inverse = splat(F32x16, np.float32(1) / scale if scale > 0 else np.float32(0))
    store(codes, convert(I8x16, convert(I32x16, vround(low * inverse))))
    store(codes + 16, convert(I8x16, convert(I32x16, vround(high * inverse))))
    return scale


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
        codes = stack(32)
        for block in range(lanes // 32):
            store_f16(to + 32 * block, _quantise(row + 128 * block, codes))
            for i in range(32):
                store_i8(at + (32 * block + i) * 16, load_i8(codes + i))

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
        at = values + slot * lanes
        to = scales + slot // 16 * (lanes // 32) * 32 + slot % 16 * 2
        for block in range(lanes // 32):
            store_f16(to + 32 * block, _quantise(row + 128 * block, at + 32 * block))

    return {"f16": f16, "f32": f32, "q8_0": q8_0}[kv.parameter.name]


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

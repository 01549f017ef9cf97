"""Products with many rows of activations: weights unpacked once into tiles (AVX512-VNNI).

A tile holds 16 weight rows side by side, so that a vector belongs to 16 results and no horizontal
sums are needed. Its columns are cut into groups of 32 values; a group is

    8 x 64 bytes    codes, signed: vector i holds values 4 i .. 4 i + 3 of each row
    64 bytes each   one or two scales (float32): with two, one for each 16 values
    64 bytes each   -128 times the sums of those codes (int32): activations come as unsigned bytes
                    with 128 added (form `bytes`, `refimpl.engine.activations`)
    64 bytes        minus the minima (float32), for types that have them

The arithmetic is that of the kernels in place (integer sums of a group, scaled in float32); only
the order in which float32 terms are added is another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from refimpl.engine.codes import codes32
from refimpl.engine.formats import Format
from refimpl.engine.jit import cfunc, intrinsic, njit, overload
from refimpl.engine.lanes import shuffler
from refimpl.engine.simd import Parameter, Simd
from refimpl.engine.supers import super_codes
from refimpl.engine.vec import (
    F32x16,
    I8x64,
    I32x16,
    call,
    load,
    load_i64,
    pointer,
    prefetch,
    reinterpret,
    splat,
    splatted,
    stack,
    store,
    store_f32,
    zeros,
)
from refimpl.engine.x86 import dot64, emit_dot

TILE_ROWS = 16
TILE_TOKENS = 8
"""Rows of activations of one call of a product."""
UNPACK_SIGNATURE = types.void(*[types.int64] * 4)
MULTIPLY_SIGNATURE = types.void(*[types.int64] * 7)
_CODES = 512  # bytes of a group's codes
_AHEAD = 1024
_INLINE = {"forceinline": True}


def _halves(kind512: str) -> bool:
    return kind512 == "super"


def _minimum(kind512: str) -> bool:
    return kind512.endswith("_min")


def _group_bytes(kind512: str) -> int:
    return _CODES + 128 * (1 + _halves(kind512)) + 64 * _minimum(kind512)


def tile_bytes(kind512: str, columns: int) -> int:
    """Bytes of a tile of rows of `columns` values; 'super' needs most."""
    return columns // 32 * _group_bytes(kind512)


@cache
def unpacking(simd: Simd, fmt: Format) -> Any:
    """The compiled function (weights, row_bytes, columns, tile) that fills a tile."""
    return _super_unpacking(simd, fmt) if fmt.block_values == 256 else _unpacking(simd, fmt)


def _unpacking(simd: Simd, fmt: Format) -> Any:
    """Blocks of 32, eight of a row at a time."""
    block_bytes, group = fmt.block_bytes, _group_bytes(fmt.kind512)
    has_minimum = _minimum(fmt.kind512)

    @cfunc(UNPACK_SIGNATURE, cache=True, error_model="numpy")
    def unpack(w, row_bytes, columns, tile):
        codes = stack(4096)
        for first in range(0, columns // 32, 8):
            count = min(8, columns // 32 - first)
            to = tile + first * group
            for r in range(TILE_ROWS):
                block = w + r * row_bytes + first * block_bytes
                for line in range(0, 8 * block_bytes, 64):
                    prefetch(block + _AHEAD + line)
                for j in range(count):
                    low, high, scale, _, minimum = codes32(simd, fmt, block, 0)
                    at = codes + 512 * j + r % 4 * 64 + r // 4 * 16
                    store(at, low)
                    store(at + 256, high)
                    store_f32(to + j * group + _CODES + 4 * r, scale)
                    if has_minimum:
                        store_f32(to + j * group + _CODES + 128 + 4 * r, -minimum)
                    block += block_bytes
            for j in range(count):
                _place(codes + 512 * j, to + j * group, False)

    return unpack


def _super_unpacking(simd: Simd, fmt: Format) -> Any:
    """Blocks of 256."""
    block_bytes, group = fmt.block_bytes, _group_bytes(fmt.kind512)
    halves = Halves(_halves(fmt.kind512), _minimum(fmt.kind512))
    two_scales = halves.scales

    @cfunc(UNPACK_SIGNATURE, cache=True, error_model="numpy")
    def unpack(w, row_bytes, columns, tile):
        simd  # noqa: B018  # part of the cache key
        codes, scales = stack(4096), stack(1024)
        for number in range(columns // 256):
            to = tile + 8 * number * group
            for r in range(TILE_ROWS):
                block = w + r * row_bytes + number * block_bytes
                for line in range(0, block_bytes, 64):
                    prefetch(block + _AHEAD + line)
                at = r % 4 * 64 + r // 4 * 16
                _store_super(fmt, block, codes + at, scales + at)
            for j in range(8):
                _place(codes + 512 * j, to + j * group, two_scales)
            for i in range(4):
                _place_scales(halves, scales + 256 * i, i, to, group)

    return unpack


class Halves(Parameter):
    """Whether a group has two scales, and whether it has a minimum."""

    def __init__(self, scales: bool, minimum: bool) -> None:
        super().__init__(f"halves {scales} {minimum}")
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "minimum", minimum)

    scales: bool
    minimum: bool


_quarters = [shuffler(I8x64, list(range(16 * i, 16 * i + 16))) for i in range(4)]
_quarter0, _quarter1, _quarter2, _quarter3 = _quarters
_floats = [shuffler(F32x16, list(range(4 * i, 4 * i + 4))) for i in range(4)]
_floats0, _floats1, _floats2, _floats3 = _floats


def _store_super(fmt: Any, block: int, codes: int, scales: int) -> None:
    """A block's signed codes in pieces of 16 and its 16 scales in pieces of 4, 256 bytes from one
    piece to the next."""
    raise NotImplementedError("only called from compiled kernels")


@njit(forceinline=True)
def _pieces(c, to, p0, p1, p2, p3):
    store(to + 256 * p0, _quarter0(c, c))
    store(to + 256 * p1, _quarter1(c, c))
    store(to + 256 * p2, _quarter2(c, c))
    store(to + 256 * p3, _quarter3(c, c))


@overload(_store_super, jit_options=_INLINE)
def _overload_store_super(fmt, block, codes, scales):
    """In the orders of `refimpl.engine.kernels512`."""
    kind = fmt.parameter.kind512

    def store_super(fmt, block, codes, scales):
        c0, c1, c2, c3, s = super_codes(fmt, block)
        if kind == "super_min":  # sub-blocks 0 2 | 1 3 | 4 6 | 5 7
            _pieces(c0, codes, 0, 1, 4, 5)
            _pieces(c1, codes, 2, 3, 6, 7)
            _pieces(c2, codes, 8, 9, 12, 13)
            _pieces(c3, codes, 10, 11, 14, 15)
        elif kind == "super":
            offset = splat(I8x64, 32)
            _pieces(c0 - offset, codes, 0, 1, 2, 3)
            _pieces(c1 - offset, codes, 4, 5, 6, 7)
            _pieces(c2 - offset, codes, 8, 9, 10, 11)
            _pieces(c3 - offset, codes, 12, 13, 14, 15)
        else:  # first halves of 0..3, last halves of 0..3, and 4..7
            offset = splat(I8x64, -128)
            _pieces(c0 ^ offset, codes, 0, 2, 4, 6)
            _pieces(c1 ^ offset, codes, 1, 3, 5, 7)
            _pieces(c2 ^ offset, codes, 8, 10, 12, 14)
            _pieces(c3 ^ offset, codes, 9, 11, 13, 15)
        store(scales, _floats0(s, s))
        store(scales + 256, _floats1(s, s))
        store(scales + 512, _floats2(s, s))
        store(scales + 768, _floats3(s, s))

    return store_super


def _in_lanes(indices: list[int]) -> Any:
    """A shuffle of two vectors within each 16 bytes: 0..3 of the first, 4..7 of the second."""
    lanes = range(0, 16, 4)
    return shuffler(I32x16, [i + n if i < 4 else 12 + i + n for n in lanes for i in indices])


_low32, _high32 = _in_lanes([0, 4, 1, 5]), _in_lanes([2, 6, 3, 7])
_low64, _high64 = _in_lanes([0, 1, 4, 5]), _in_lanes([2, 3, 6, 7])


@njit(forceinline=True)
def _transposed(at):
    """Four vectors out of 16 rows of 16 bytes that lie in the order 0 4 8 12, 1 5 9 13, ...: the
    first four bytes of all rows, the next four, and so on."""
    a, b = load(I32x16, at), load(I32x16, at + 64)
    c, d = load(I32x16, at + 128), load(I32x16, at + 192)
    ab, cd = _low32(a, b), _low32(c, d)
    ab_high, cd_high = _high32(a, b), _high32(c, d)
    return _low64(ab, cd), _high64(ab, cd), _low64(ab_high, cd_high), _high64(ab_high, cd_high)


@njit(forceinline=True)
def _sums(total, a, b, c, d):
    """total + 128 times the sums of the bytes of each lane."""
    ones = splat(I8x64, -128)  # 128 without sign
    total = dot64(dot64(total, ones, reinterpret(I8x64, a)), ones, reinterpret(I8x64, b))
    return dot64(dot64(total, ones, reinterpret(I8x64, c)), ones, reinterpret(I8x64, d))


@njit(forceinline=True)
def _place(codes, to, two_scales):
    """A group's codes and sums."""
    a, b, c, d = _transposed(codes)
    e, f, g, h = _transposed(codes + 256)
    store(to, a)
    store(to + 64, b)
    store(to + 128, c)
    store(to + 192, d)
    store(to + 256, e)
    store(to + 320, f)
    store(to + 384, g)
    store(to + 448, h)
    first = _sums(zeros(I32x16), a, b, c, d)
    if two_scales:
        store(to + 640, zeros(I32x16) - first)
        store(to + 704, zeros(I32x16) - _sums(zeros(I32x16), e, f, g, h))
    else:
        store(to + 576, zeros(I32x16) - _sums(first, e, f, g, h))


def _place_scales(halves: Any, scales: int, i: int, to: int, group: int) -> None:
    """Scales 4 i .. 4 i + 3 of 16 blocks to their groups."""
    raise NotImplementedError("only called from compiled kernels")


@overload(_place_scales, jit_options=_INLINE)
def _overload_place_scales(halves, scales, i, to, group):
    """Of 16: two for each group, or one for each and then the minima or the same again."""
    if halves.parameter.scales:

        def two(halves, scales, i, to, group):
            a, b, c, d = _transposed(scales)
            at = to + 2 * i * group + _CODES
            store(at, a)
            store(at + 64, b)
            store(at + group, c)
            store(at + group + 64, d)

        return two
    has_minimum = halves.parameter.minimum

    def one(halves, scales, i, to, group):
        a, b, c, d = _transposed(scales)
        at = to + i % 2 * 4 * group + _CODES
        if i < 2:
            store(at, a)
            store(at + group, b)
            store(at + 2 * group, c)
            store(at + 3 * group, d)
        elif has_minimum:
            at += 128
            none = zeros(F32x16)
            store(at, none - reinterpret(F32x16, a))
            store(at + group, none - reinterpret(F32x16, b))
            store(at + 2 * group, none - reinterpret(F32x16, c))
            store(at + 3 * group, none - reinterpret(F32x16, d))

    return one


# ------------------------------------------------------------------ products


def _step(count: int, kind512: str) -> Any:
    """An intrinsic (sums, group, activations, scales) -> sums with the products of one group added:
    `count` sums (F32x16) and places of activations, their scales `scales` bytes further on and
    `shift` after them scale times sum of the codes."""
    halves, minimum = _halves(kind512), _minimum(kind512)
    integer, single = ir.IntType(32), ir.FloatType()

    def typed(typingctx, sums, group, activations, scales, shift):
        def emit(context, builder, signature, args):
            sums, group, activations, scales, shift = args

            def vector(kind: Any, at: int) -> Any:
                address = builder.add(group, ir.Constant(ir.IntType(64), at))
                return builder.load(pointer(builder, address, kind.llvm), align=1)

            def spread(kind: Any, address: Any, vector: Any) -> Any:
                value = builder.load(pointer(builder, address, kind), align=1)
                return splatted(builder, value, vector.llvm)

            parts = 2 if halves else 1
            codes = [vector(I8x64, 64 * i) for i in range(8)]
            factors = [vector(F32x16, _CODES + 64 * p) for p in range(parts)]
            base = _CODES + 64 * parts
            starts = [vector(I32x16, base + 64 * p) for p in range(parts)]
            lowest = vector(F32x16, base + 64 * parts) if minimum else None
            for m in range(count):
                x = builder.extract_value(activations, m)
                total = builder.extract_value(sums, m)
                at = builder.add(x, scales)
                scale = spread(single, at, F32x16)
                for p in range(parts):
                    dot = starts[p]
                    for i in range(8 // parts * p, 8 // parts * (p + 1)):
                        place = builder.add(x, ir.Constant(ir.IntType(64), 4 * i))
                        four = spread(integer, place, I32x16)
                        dot = emit_dot(builder, dot, builder.bitcast(four, I8x64.llvm), codes[i])
                    value = builder.sitofp(dot, F32x16.llvm)
                    factor = builder.fmul(factors[p], scale)
                    fused = [value, factor, total]
                    total = call(builder, "llvm.fma.v16f32", F32x16.llvm, fused)
                if lowest is not None:
                    fused = [lowest, spread(single, builder.add(at, shift), F32x16), total]
                    total = call(builder, "llvm.fma.v16f32", F32x16.llvm, fused)
                sums = builder.insert_value(sums, total, m)
            return sums

        i64 = types.int64
        places = types.UniTuple(i64, count)
        return (sums(sums, i64, places, i64, i64), emit)

    return intrinsic(typed)


@cache
def multiplying(simd: Simd, fmt: Format) -> Any:
    """The compiled function (tile, columns, blobs, count, offset, y, y_bytes), all int64:

    y_m[0..16) = rows of the tile times x_m for m < count <= 8, where x_m lies `offset` bytes
    after the m-th of the addresses at `blobs`, and y_m at y + m y_bytes.
    """
    return _multiplying(simd, _Kind(fmt.kind512 if _halves(fmt.kind512) or
                                    _minimum(fmt.kind512) else "quads"))  # fmt: skip


class _Kind(Parameter):
    pass


@cache
def _multiplying(simd: Simd, kind: Any) -> Any:
    name = "super_min" if _minimum(kind.name) else kind.name
    group_bytes = _group_bytes(name)
    eight, four = _step(8, name), _step(4, name)

    @cfunc(MULTIPLY_SIGNATURE, cache=True, error_model="numpy")
    def multiply(tile, columns, blobs, count, offset, y, y_bytes):
        simd, kind  # noqa: B018  # part of the cache key
        x0, x1 = _blob(blobs, 0, count) + offset, _blob(blobs, 1, count) + offset
        x2, x3 = _blob(blobs, 2, count) + offset, _blob(blobs, 3, count) + offset
        none = zeros(F32x16)
        if count <= 4:
            sums = (none, none, none, none)
            for g in range(columns // 32):
                at = 32 * g
                xs = (x0 + at, x1 + at, x2 + at, x3 + at)
                sums = four(sums, tile + g * group_bytes, xs, columns - 28 * g, columns // 8)
            s0, s1, s2, s3 = sums
        else:
            x4, x5 = _blob(blobs, 4, count) + offset, _blob(blobs, 5, count) + offset
            x6, x7 = _blob(blobs, 6, count) + offset, _blob(blobs, 7, count) + offset
            more = (none, none, none, none, none, none, none, none)
            for g in range(columns // 32):
                at = 32 * g
                all8 = (x0 + at, x1 + at, x2 + at, x3 + at, x4 + at, x5 + at, x6 + at, x7 + at)
                more = eight(more, tile + g * group_bytes, all8, columns - 28 * g, columns // 8)
            s0, s1, s2, s3, s4, s5, s6, s7 = more
            _put(y, y_bytes, 4, count, s4)
            _put(y, y_bytes, 5, count, s5)
            _put(y, y_bytes, 6, count, s6)
            _put(y, y_bytes, 7, count, s7)
        _put(y, y_bytes, 0, count, s0)
        _put(y, y_bytes, 1, count, s1)
        _put(y, y_bytes, 2, count, s2)
        _put(y, y_bytes, 3, count, s3)

    return multiply


@njit(forceinline=True)
def _blob(blobs, m, count):
    return load_i64(blobs + 8 * min(m, count - 1))


@njit(forceinline=True)
def _put(y, y_bytes, m, count, value):
    if m < count:
        store(y + m * y_bytes, value)

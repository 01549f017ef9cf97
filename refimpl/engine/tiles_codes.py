"""Weights as signed codes in tiles of 16 rows, for integer products with many activation rows.

A tile holds 16 weight rows side by side, so that a vector belongs to 16 results and no horizontal
sums are needed. Its columns are cut into groups of 32 values; a group is

    8 x 64 bytes    codes, signed: vector i holds values 4 i .. 4 i + 3 of each row
    64 bytes each   one or two scales (float32): with two, one for each 16 values
    64 bytes each   -128 times the sums of those codes (int32): activations come as unsigned bytes
                    with 128 added (form `bytes`, `refimpl.engine.activations`)
    64 bytes        minus the minima (float32), for types that have them

`filling_codes` writes one; for blocks of 256 there is a way of AVX512's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import types

from refimpl.engine.codes import codes32
from refimpl.engine.formats import Format
from refimpl.engine.jit import njit, overload
from refimpl.engine.lanes import join_i32x8, shuffler
from refimpl.engine.loads import load, prefetch, stack, store, store_f32
from refimpl.engine.simd import Parameter, Simd
from refimpl.engine.supers import super_codes
from refimpl.engine.vec import (
    F32x16,
    I8x32,
    I8x64,
    I32x8,
    I32x16,
    device,
    reinterpret,
    splat,
    zeros,
)
from refimpl.engine.x86 import dot32, dot64

TILE_ROWS = 16
GROUP = 32
"""Columns of a group."""
CODES = 8 * 64
"""Bytes of a group's codes."""
_AHEAD = 1024
_INLINE = {"forceinline": True}


@dataclass(frozen=True)
class Layout(Parameter):
    """What a group of a type's tiles holds besides codes.

    Attributes:
        scales: 1, or 2 for types with a scale for each 16 values.
        minimum: whether there are minima.
    """

    scales: int
    minimum: bool

    @property
    def group_bytes(self) -> int:
        """Codes, scales, sums, minima."""
        return CODES + 128 * self.scales + 64 * self.minimum


def layout_of(fmt: Format) -> Layout:
    """The layout of a type in blocks."""
    return Layout("codes", 1 + (fmt.kind512 == "super"), fmt.kind512.endswith("_min"))


def filling_codes(simd: Simd, fmt: Format) -> Any:
    """The function (weights, row_bytes, columns, tile) that fills a tile with `columns` values of
    16 rows, from the start of a block on."""
    supers = simd.name == "avx512" and fmt.block_values == 256
    return _filling_supers(simd, fmt) if supers else _filling(simd, fmt)


def _filling(simd: Simd, fmt: Format) -> Any:
    """Any type: eight groups of a row at a time."""
    layout = layout_of(fmt)
    group, scales, has_minimum = layout.group_bytes, layout.scales, layout.minimum
    sub_blocks, block_bytes = fmt.sub_blocks, fmt.block_bytes
    minima, ahead = CODES + 128 * scales, 8 // fmt.sub_blocks * fmt.block_bytes

    @device(types.void)
    def fill(w, row_bytes, columns, tile):
        codes = stack(4096)
        for first in range(0, columns // 32, 8):
            count = min(8, columns // 32 - first)
            to = tile + first * group
            for r in range(TILE_ROWS):
                at = w + r * row_bytes + first // sub_blocks * block_bytes
                for line in range(0, ahead, 64):
                    prefetch(at + _AHEAD + line)
                for j in range(count):
                    block = at + j // sub_blocks * block_bytes
                    low, high, s0, s1, minimum = codes32(simd, fmt, block, j % sub_blocks)
                    place = codes + 512 * j + r % 4 * 64 + r // 4 * 16
                    store(place, low)
                    store(place + 256, high)
                    here = to + j * group + CODES + 4 * r
                    store_f32(here, s0)
                    if scales == 2:
                        store_f32(here + 64, s1)
                    if has_minimum:
                        store_f32(to + j * group + minima + 4 * r, -minimum)
            for j in range(count):
                _place(simd, codes + 512 * j, to + j * group, scales)

    return fill


def _filling_supers(simd: Simd, fmt: Format) -> Any:
    """Blocks of 256 (AVX512)."""
    layout, block_bytes = layout_of(fmt), fmt.block_bytes
    group, scales_each = layout.group_bytes, layout.scales

    @device(types.void)
    def fill(w, row_bytes, columns, tile):
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
                _place(simd, codes + 512 * j, to + j * group, scales_each)
            for i in range(4):
                _place_scales(layout, scales + 256 * i, i, to, group)

    return fill


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
        if kind.endswith("_min"):  # sub-blocks 0 2 | 1 3 | 4 6 | 5 7
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
def transposed(at):
    """Four vectors out of 16 rows of 16 bytes that lie in the order 0 4 8 12, 1 5 9 13, ...: the
    first four bytes of all rows, the next four, and so on."""
    a, b = load(I32x16, at), load(I32x16, at + 64)
    c, d = load(I32x16, at + 128), load(I32x16, at + 192)
    ab, cd = _low32(a, b), _low32(c, d)
    ab_high, cd_high = _high32(a, b), _high32(c, d)
    return _low64(ab, cd), _high64(ab, cd), _low64(ab_high, cd_high), _high64(ab_high, cd_high)


@njit(forceinline=True)
def _place(simd, codes, to, scales):
    """A group's codes and sums."""
    a, b, c, d = transposed(codes)
    e, f, g, h = transposed(codes + 256)
    store(to, a)
    store(to + 64, b)
    store(to + 128, c)
    store(to + 192, d)
    store(to + 256, e)
    store(to + 320, f)
    store(to + 384, g)
    store(to + 448, h)
    none = zeros(I32x16)
    first = _sums(simd, _sums(simd, _sums(simd, _sums(simd, none, a), b), c), d)
    start = none if scales == 2 else first
    last = _sums(simd, _sums(simd, _sums(simd, _sums(simd, start, e), f), g), h)
    if scales == 2:
        store(to + CODES + 128, none - first)
        store(to + CODES + 192, none - last)
    else:
        store(to + CODES + 64, none - last)


def _sums(simd: Any, total: Any, codes: Any) -> Any:
    """total + 128 times the sums of the bytes of each lane."""
    raise NotImplementedError("only called from compiled kernels")


_first_half = shuffler(I32x16, list(range(8)))
_last_half = shuffler(I32x16, list(range(8, 16)))


@overload(_sums, jit_options=_INLINE)
def _overload_sums(simd, total, codes):
    def whole(simd, total, codes):
        return dot64(total, splat(I8x64, -128), reinterpret(I8x64, codes))  # 128 without sign

    def halves(simd, total, codes):
        ones = splat(I8x32, -128)
        low, high = _first_half(codes, codes), _last_half(codes, codes)
        low = dot32(simd, zeros(I32x8), ones, reinterpret(I8x32, low))
        return total + join_i32x8(low, dot32(simd, zeros(I32x8), ones, reinterpret(I8x32, high)))

    return whole if simd.parameter.name == "avx512" else halves


def _place_scales(layout: Any, scales: int, i: int, to: int, group: int) -> None:
    """Scales 4 i .. 4 i + 3 of 16 blocks to their groups."""
    raise NotImplementedError("only called from compiled kernels")


@overload(_place_scales, jit_options=_INLINE)
def _overload_place_scales(layout, scales, i, to, group):
    """Of 16: two for each group, or one for each and then the minima or the same again."""
    if layout.parameter.scales == 2:

        def two(layout, scales, i, to, group):
            a, b, c, d = transposed(scales)
            at = to + 2 * i * group + CODES
            store(at, a)
            store(at + 64, b)
            store(at + group, c)
            store(at + group + 64, d)

        return two
    has_minimum = layout.parameter.minimum

    def one(layout, scales, i, to, group):
        a, b, c, d = transposed(scales)
        at = to + i % 2 * 4 * group + CODES
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

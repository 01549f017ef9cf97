"""Weights as values in tiles of 16 rows: float32, or pairs of bfloat16.

    float32    column k is 64 bytes: its value in each of the 16 rows
    bfloat16   32 columns are a group of 1024 bytes: 16 x 64 bytes, the i-th with values 2 i and
               2 i + 1 of each row, which is what vdpbf16ps and the tile registers of AMX take

Types in blocks become bfloat16 by way of their codes (`refimpl.engine.tiles_codes`), which are
turned from rows to columns four to a lane instead of one.
"""

from __future__ import annotations

from typing import Any

from numba import types

from refimpl.engine.bf16 import rounded_pair
from refimpl.engine.codes import codes32, floats32
from refimpl.engine.formats import Format
from refimpl.engine.jit import njit, overload
from refimpl.engine.lanes import shuffler
from refimpl.engine.loads import load, prefetch, stack, store
from refimpl.engine.simd import Simd
from refimpl.engine.tiles_codes import CODES, TILE_ROWS, filling_codes, layout_of, transposed
from refimpl.engine.vec import (
    F32x16,
    I32x16,
    convert,
    device,
    fma,
    shift_left,
    shift_right_signed,
    splat,
    zeros,
)

FLOAT_COLUMN = 64
"""Bytes of a column of a float32 tile."""
PAIR_GROUP = 1024
"""Bytes of 32 columns of a bfloat16 tile."""
_STEP = 4  # sub-blocks of 32 of one row at a time, 2048 bytes for 16 rows
_AHEAD = 1024
_INLINE = {"forceinline": True}
_floats = [shuffler(F32x16, list(range(4 * i, 4 * i + 4))) for i in range(4)]
_floats0, _floats1, _floats2, _floats3 = _floats


def values32(simd: Any, fmt: Any, block: int, j: int) -> Any:
    """Sub-block j of a block as two F32x16."""
    raise NotImplementedError("only called from compiled kernels")


@overload(values32, jit_options=_INLINE)
def _values32(simd, fmt, block, j):
    if fmt.parameter.kind512 == "":
        return lambda simd, fmt, block, j: floats32(fmt, block)

    def blocks(simd, fmt, block, j):
        first, last, s0, s1, minimum = codes32(simd, fmt, block, j)
        shift = splat(F32x16, minimum)
        low = convert(F32x16, first) * splat(F32x16, s0) - shift
        return low, convert(F32x16, last) * splat(F32x16, s1) - shift

    return blocks


@njit(forceinline=True)
def _pieces(values, to):
    """16 lanes in pieces of four, 256 bytes from one to the next."""
    store(to, _floats0(values, values))
    store(to + 256, _floats1(values, values))
    store(to + 512, _floats2(values, values))
    store(to + 768, _floats3(values, values))


@njit(forceinline=True)
def _four_columns(pieces, to):
    a, b, c, d = transposed(pieces)
    store(to, a)
    store(to + 64, b)
    store(to + 128, c)
    store(to + 192, d)


def filling_floats(simd: Simd, fmt: Format) -> Any:
    """The function (weights, row_bytes, columns, tile) that fills a float32 tile."""
    sub_blocks, block_bytes = fmt.sub_blocks, fmt.block_bytes

    @device(types.void)
    def fill(w, row_bytes, columns, tile):
        pieces = stack(8192)
        for first in range(0, columns // 32, _STEP):
            count = min(_STEP, columns // 32 - first)
            for r in range(TILE_ROWS):
                at = w + r * row_bytes
                prefetch(at + (first // sub_blocks + 1) * block_bytes + _AHEAD)
                place = pieces + r % 4 * 64 + r // 4 * 16
                for j in range(count):
                    block = at + (first + j) // sub_blocks * block_bytes
                    low, high = values32(simd, fmt, block, (first + j) % sub_blocks)
                    _pieces(low, place + 2048 * j)
                    _pieces(high, place + 2048 * j + 1024)
            for i in range(8 * count):
                _four_columns(pieces + 256 * i, tile + (8 * first + i) * 256)

    return fill


def filling_pairs(simd: Simd, fmt: Format) -> Any:
    """The function (weights, row_bytes, columns, tile) that fills a bfloat16 tile."""
    return _filling_bf16() if fmt.name == "BF16" else _filling_rounded(simd, fmt)


def _filling_bf16() -> Any:
    """Weights that are bfloat16 already: pairs of a row are moved as 32-bit lanes."""

    @device(types.void)
    def fill(w, row_bytes, columns, tile):
        pieces = stack(1024)
        for group in range(columns // 32):
            for r in range(TILE_ROWS):
                at = w + r * row_bytes + 64 * group
                prefetch(at + _AHEAD)
                _pieces(load(F32x16, at), pieces + r % 4 * 64 + r // 4 * 16)
            for i in range(4):
                _four_columns(pieces + 256 * i, tile + group * PAIR_GROUP + 256 * i)

    return fill


def _filling_rounded(simd: Simd, fmt: Format) -> Any:
    """Types in blocks: codes of eight groups, then those times their scales."""
    layout, fill_codes = layout_of(fmt), filling_codes(simd, fmt)
    group_bytes, block_bytes, values = layout.group_bytes, fmt.block_bytes, fmt.block_values

    @device(types.void)
    def fill(w, row_bytes, columns, tile):
        codes = stack(8192)
        for first in range(0, columns, 256):
            count = min(256, columns - first)
            fill_codes(w + first // values * block_bytes, row_bytes, count, codes)
            for g in range(count // 32):
                _scaled(layout, codes + g * group_bytes, tile + (first // 32 + g) * PAIR_GROUP)

    return fill


def _scaled(layout: Any, group: int, to: int) -> None:
    """A group of codes times scales, minus minima, as pairs of bfloat16."""
    raise NotImplementedError("only called from compiled kernels")


@overload(_scaled, jit_options=_INLINE)
def _overload_scaled(layout, group, to):
    has_minimum = layout.parameter.minimum
    second, minima = 64 * (layout.parameter.scales - 1), 128 * layout.parameter.scales

    def scaled(layout, group, to):
        lowest = zeros(F32x16)
        if has_minimum:
            lowest = load(F32x16, group + CODES + minima)
        for i in range(8):
            scale = load(F32x16, group + CODES + i // 4 * second)
            codes = load(I32x16, group + 64 * i)
            a, b = _value(codes, 24, scale, lowest), _value(codes, 16, scale, lowest)
            c, d = _value(codes, 8, scale, lowest), _value(codes, 0, scale, lowest)
            store(to + 128 * i, rounded_pair(a, b))
            store(to + 128 * i + 64, rounded_pair(c, d))

    return scaled


@njit(forceinline=True)
def _value(codes, bits, scale, lowest):
    """The bytes whose topmost bit is `bits` below that of the lanes."""
    number = shift_right_signed(shift_left(codes, bits), 24)
    return fma(convert(F32x16, number), scale, lowest)

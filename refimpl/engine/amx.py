"""Products of bfloat16 tiles with the tile registers of AMX.

The instructions are a parameter object, `TileUnit`: the real ones, or the same operations on memory
as Intel describes them (Software Developer's Manual, volume 2, TDPBF16PS, TILELOADD, TILESTORED,
LDTILECFG), so that one kernel runs with either, and every test of the kernel runs anywhere.

Rows of activations are the rows of the first operand (up to 16, 32 values at a time), a group of a
weight tile (`refimpl.engine.tiles_values`) is the second, and the sums, rows of activations by rows
of weights, are stored where they belong. Two by two such products at a time use all eight tile
registers:

    0 1    sums of activations 0..15 and two weight tiles         6 7    weights
    2 3    sums of activations 16..31                             4 5    activations

With no more than 16 rows of activations, sums of four weight tiles are in 0..3 instead: a product
may begin every 16 cycles but takes 52, so that two running sums would wait for themselves.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from refimpl.engine.amx_emulated import (
    REGISTERS_BYTES,
    emulated_configure,
    emulated_dot,
    emulated_load,
    emulated_release,
    emulated_store,
    emulated_zero,
)
from refimpl.engine.jit import cfunc, intrinsic, njit
from refimpl.engine.loads import load, load_i64, store, store_i8
from refimpl.engine.simd import Parameter
from refimpl.engine.tiles_codes import GROUP, TILE_ROWS
from refimpl.engine.tiles_products import SIGNATURE
from refimpl.engine.tiles_values import PAIR_GROUP
from refimpl.engine.vec import I8x64, call, device, pointer, zeros

PANEL_TOKENS = 32
"""Rows of activations of one call of a product."""
UNIT_TILES = 8
"""Weight tiles of a unit; what the product needs for itself lies behind them."""
_CONFIG_BYTES = 64


@dataclass(frozen=True)
class TileUnit(Parameter):
    """Tile instructions: `name` is 'amx' or 'amx emulated'.

    Attributes:
        sources: as in `refimpl.engine.simd.Simd`.
    """

    sources: str

    @property
    def real(self) -> bool:
        """Whether these are the processor's."""
        return self.name == "amx"


# ------------------------------------------------------------------ instructions


def _instruction(name: str, kinds: str, emulated: Any, doc: str) -> Any:
    """A function (unit, registers, operands...) for the instruction that LLVM calls `name`.

    Args:
        kinds: of the operands: 't' tile number (a literal), 'p' address, 'n' number.
        emulated: the same on memory, a function (registers, operands...).
    """

    def typed(typingctx, unit, registers, *operands):
        literal = (isinstance(o, types.IntegerLiteral) for o in operands)
        if not all(is_one or kind != "t" for is_one, kind in zip(literal, kinds, strict=True)):
            return None

        def emit(context, builder, signature, args):
            if not unit.parameter.real:
                called = types.void(*[types.int64] * (1 + len(operands)))
                return context.compile_internal(builder, emulated, called, args[1:])
            values = list(args[2:])
            for i, kind in enumerate(kinds):
                if kind == "t":
                    values[i] = ir.Constant(ir.IntType(8), operands[i].literal_value)
                elif kind == "p":
                    values[i] = pointer(builder, values[i], ir.IntType(8))
            call(builder, f"llvm.x86.{name}", ir.VoidType(), values)
            return context.get_dummy_value()

        given = [o if k == "t" else types.int64 for o, k in zip(operands, kinds, strict=True)]
        return types.void(unit, types.int64, *given), emit

    names = ["typingctx", "unit", "registers", *(f"operand{i}" for i in range(len(kinds)))]
    made: Any = typed
    made.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    typed.__name__, typed.__doc__ = name, doc
    return intrinsic(made)


_configure = _instruction("ldtilecfg", "p", emulated_configure, "Shapes of the tiles; all 0.")
_release = _instruction("tilerelease", "", emulated_release, "Give the tile registers up.")
_zero = _instruction("tilezero", "t", emulated_zero, "tile = 0")
_load = _instruction("tileloadd64", "tpn", emulated_load, "tile = rows, so many bytes apart.")
_store = _instruction("tilestored64", "tpn", emulated_store, "Rows, so many bytes apart = tile.")
_dot = _instruction("tdpbf16ps", "ttt", emulated_dot, "First tile += second tile x third tile.")


# ------------------------------------------------------------------ the kernel


def amx_scratch_bytes(columns: int) -> int:
    """Memory that a product of `columns` columns needs behind the weight tiles."""
    return PANEL_TOKENS * 2 * columns + _CONFIG_BYTES + REGISTERS_BYTES


@cache
def amx_multiplying(unit: TileUnit) -> Any:
    """The compiled function for bfloat16 tiles and up to PANEL_TOKENS rows of activations;
    arguments as in `refimpl.engine.tiles_products`."""

    @cfunc(SIGNATURE, cache=True, error_model="numpy")
    def multiply(tiles, tile_bytes, count, first, columns, total, blobs, rows, offset, y, y_bytes):
        x = tiles + UNIT_TILES * tile_bytes
        config = x + PANEL_TOKENS * 2 * columns
        registers = config + _CONFIG_BYTES
        _gather(blobs, rows, offset + 2 * first, columns, x)
        _write_shapes(config, rows)
        _configure(unit, registers, config)
        if rows > TILE_ROWS:
            for tile in range(0, count, 2):
                # An odd last tile is paired with itself: the same sums are stored twice.
                last = min(tile + 1, count - 1)
                w, y0 = tiles + tile * tile_bytes, y + 4 * TILE_ROWS * tile
                w1, y1 = tiles + last * tile_bytes, y + 4 * TILE_ROWS * last
                _panel32(unit, registers, w, w1, x, columns, first, y0, y1, y_bytes)
        else:
            for tile in range(0, count, 4):
                last = min(tile + 3, count - 1)
                w, y0 = tiles + tile * tile_bytes, y + 4 * TILE_ROWS * tile
                w1, y1 = tiles + last * tile_bytes, y + 4 * TILE_ROWS * last
                if last > tile + 1:
                    four = (w, w + tile_bytes, w + 2 * tile_bytes, w1)
                    _panel16_four(unit, registers, four, x, columns, first, y0, y1, y_bytes)
                else:
                    _panel16(unit, registers, w, w1, x, columns, first, y0, y1, y_bytes)
        _release(unit, registers)

    return multiply


@device(types.void)
def _gather(blobs, rows, offset, columns, x):
    """Copy rows of activations together: 32 values of 16 rows, the next 32 values, ..., and the
    same for the last 16 rows."""
    for m in range(rows):
        at = load_i64(blobs + 8 * m) + offset
        to = x + m // 16 * 32 * columns + m % 16 * 64
        for group in range(columns // GROUP):
            store(to + PAIR_GROUP * group, load(I8x64, at + 64 * group))


@device(types.void)
def _write_shapes(config, rows):
    """The operand of LDTILECFG: palette 1, then at 16 the bytes of a row of each tile (16 bits)
    and at 48 its rows. Tiles with activations or sums have only as many rows as there are."""
    store(config, zeros(I8x64))
    store_i8(config, 1)
    lower, upper = min(rows, 16), max(rows - 16, 1)
    for tile in range(8):
        store_i8(config + 16 + 2 * tile, 64)
        store_i8(config + 48 + tile, 16)
    for tile in (0, 1, 4):
        store_i8(config + 48 + tile, lower)
    for tile in (2, 3):
        store_i8(config + 48 + tile, upper if rows > 16 else lower)
    if rows > 16:
        store_i8(config + 53, upper)


@njit(forceinline=True)
def _panel32(unit, registers, w0, w1, x, columns, first, y0, y1, y_bytes):
    """17 to 32 rows of activations times two weight tiles."""
    z0, z1 = y0 + 16 * y_bytes, y1 + 16 * y_bytes
    if first == 0:
        _zero(unit, registers, 0)
        _zero(unit, registers, 1)
        _zero(unit, registers, 2)
        _zero(unit, registers, 3)
    else:
        _load(unit, registers, 0, y0, y_bytes)
        _load(unit, registers, 1, y1, y_bytes)
        _load(unit, registers, 2, z0, y_bytes)
        _load(unit, registers, 3, z1, y_bytes)
    upper, at = x + 32 * columns, np.int64(0)
    while True:  # a matrix has columns: no code for none of them
        _load(unit, registers, 4, x + at, 64)
        _load(unit, registers, 6, w0 + at, 64)
        _load(unit, registers, 7, w1 + at, 64)
        _load(unit, registers, 5, upper + at, 64)
        _dot(unit, registers, 0, 4, 6)
        _dot(unit, registers, 1, 4, 7)
        _dot(unit, registers, 2, 5, 6)
        _dot(unit, registers, 3, 5, 7)
        at += PAIR_GROUP
        if at >= 32 * columns:
            break
    _store(unit, registers, 0, y0, y_bytes)
    _store(unit, registers, 1, y1, y_bytes)
    _store(unit, registers, 2, z0, y_bytes)
    _store(unit, registers, 3, z1, y_bytes)


@njit(forceinline=True)
def _panel16(unit, registers, w0, w1, x, columns, first, y0, y1, y_bytes):
    """Up to 16 rows of activations times the last two weight tiles, or the last one twice."""
    if first == 0:
        _zero(unit, registers, 0)
        _zero(unit, registers, 1)
    else:
        _load(unit, registers, 0, y0, y_bytes)
        _load(unit, registers, 1, y1, y_bytes)
    at = np.int64(0)
    while True:
        _load(unit, registers, 4, x + at, 64)
        _load(unit, registers, 6, w0 + at, 64)
        _load(unit, registers, 7, w1 + at, 64)
        _dot(unit, registers, 0, 4, 6)
        _dot(unit, registers, 1, 4, 7)
        at += PAIR_GROUP
        if at >= 32 * columns:
            break
    _store(unit, registers, 0, y0, y_bytes)
    _store(unit, registers, 1, y1, y_bytes)


@njit(forceinline=True)
def _panel16_four(unit, registers, w, x, columns, first, y0, y3, y_bytes):
    """Up to 16 rows of activations times four weight tiles."""
    w0, w1, w2, w3 = w
    y1, y2 = y0 + 4 * TILE_ROWS, y0 + 8 * TILE_ROWS
    if first == 0:
        _zero(unit, registers, 0)
        _zero(unit, registers, 1)
        _zero(unit, registers, 2)
        _zero(unit, registers, 3)
    else:
        _load(unit, registers, 0, y0, y_bytes)
        _load(unit, registers, 1, y1, y_bytes)
        _load(unit, registers, 2, y2, y_bytes)
        _load(unit, registers, 3, y3, y_bytes)
    at = np.int64(0)
    while True:
        _load(unit, registers, 4, x + at, 64)
        _load(unit, registers, 5, w0 + at, 64)
        _load(unit, registers, 6, w1 + at, 64)
        _load(unit, registers, 7, w2 + at, 64)
        _dot(unit, registers, 0, 4, 5)
        _dot(unit, registers, 1, 4, 6)
        _dot(unit, registers, 2, 4, 7)
        _load(unit, registers, 5, w3 + at, 64)
        _dot(unit, registers, 3, 4, 5)
        at += PAIR_GROUP
        if at >= 32 * columns:
            break
    _store(unit, registers, 0, y0, y_bytes)
    _store(unit, registers, 1, y1, y_bytes)
    _store(unit, registers, 2, y2, y_bytes)
    _store(unit, registers, 3, y3, y_bytes)

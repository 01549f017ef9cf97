"""Products with many rows of activations: weights are unpacked once into tiles of 16 rows.

A type's `Tiling` says how: into what (`Unpacking`), how the tiles are multiplied, and which form of
activations that takes.

    codes     int8 codes and scales times int8 activations: types in blocks where the instruction
              set has integer products (`refimpl.engine.tiles_codes`)
    floats    float32: plain types, `--exact`, and instruction sets without integer products
    pairs     bfloat16, rounded where the type has more digits: AMX, for all but F16 and F32, and
              AVX512-BF16 for BF16 alone (`refimpl.engine.tiles_values`)

llama.cpp takes the activations of BF16 matrices as bfloat16 as well, and as int8 for types in
blocks, which costs three times the digits that bfloat16 costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import types

from refimpl.engine.activations import BF16, BYTES, FLOAT, NATURAL
from refimpl.engine.amx import PANEL_TOKENS, TileUnit, amx_multiplying, amx_scratch_bytes
from refimpl.engine.formats import FORMATS, Format
from refimpl.engine.jit import cfunc, overload
from refimpl.engine.simd import Parameter, Simd, cpu_features
from refimpl.engine.tiles_codes import GROUP, TILE_ROWS, filling_codes, layout_of
from refimpl.engine.tiles_products import Product, multiplying
from refimpl.engine.tiles_values import FLOAT_COLUMN, PAIR_GROUP, filling_floats, filling_pairs

MANY = 8
"""Rows of activations from which on weights are unpacked into tiles. For AMX as well: measured
on a processor that has it, it reads weights as fast as the kernels in place with 8 rows, and with
more rows faster than they do (performance notes, sections 2 and 3)."""
UNIT_ROWS = 32
"""Weight rows of a unit of work: two tiles, so that activations are read half as often."""
AMX_UNIT_ROWS = 128
"""With AMX, whose activations are copied together for each unit."""
_TOKENS = 8  # rows of activations of one call
_COLUMNS = {"codes": 4096, "floats": 512, "pairs": 4096}
"""So that tiles stay in the L2 cache, and float32 sums are not too long."""
_LARGEST_CODES = {"Q4_0": 8, "Q5_0": 16, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31, "Q6_K": 32}
_UNPACK_SIGNATURE = types.void(*[types.int64] * 4)


@dataclass(frozen=True)
class Tiling:
    """How products with many rows of activations are made for a stored type.

    Attributes:
        unpack, multiply: compiled functions.
        form: of the activations.
        columns: most columns unpacked at a time.
        unit_rows: weight rows of a unit of work.
        tokens: most rows of activations of one call of `multiply`.
        column_bytes: bytes of a column of a tile.
        extra_bytes: memory that `multiply` uses behind the tiles of a unit.
    """

    unpack: Any
    multiply: Any
    form: int
    columns: int
    unit_rows: int
    tokens: int
    column_bytes: int
    extra_bytes: int

    def tile_bytes(self, columns: int) -> int:
        """Bytes of a tile of a matrix of `columns` columns."""
        return min(columns, self.columns) * self.column_bytes

    def scratch_bytes(self, columns: int) -> int:
        """Memory for a unit."""
        return self.unit_rows // TILE_ROWS * self.tile_bytes(columns) + self.extra_bytes


@dataclass(frozen=True)
class Unpacking(Parameter):
    """Into what (`name`: codes, floats or pairs) the blocks of a type are unpacked."""

    simd: Simd
    fmt: Format


def tiling(simd: Simd, name: str, exact: bool, amx: TileUnit | None = None) -> Tiling:
    """The tiling of a stored type.

    Args:
        exact: float32 activations.
        amx: the tile instructions to use, if any.
    """
    fmt = FORMATS[name]
    rounded = name == "BF16" or bool(fmt.kind512)
    if amx is not None and rounded and not exact:
        return _amx_tiling(simd, fmt, amx)
    if name == "BF16" and not exact and simd.name == "avx512" and "avx512bf16" in cpu_features():
        return _made("pairs", simd, fmt, BF16, PAIR_GROUP // GROUP, Product("pairs", simd, _TOKENS))
    tokens = 4 if simd.name == "avx2" else _TOKENS
    if exact or not fmt.kind512 or not simd.integer:
        return _made("floats", simd, fmt, FLOAT, FLOAT_COLUMN, Product("floats", simd, tokens))
    chain = 0 if simd.dot else 32767 // (510 * _LARGEST_CODES.get(name, 128))
    layout = layout_of(fmt)
    product = Product("codes", simd, tokens, layout, chain and 1 << (chain.bit_length() - 1))
    form = BYTES if simd.dot or chain else NATURAL
    return _made("codes", simd, fmt, form, layout.group_bytes // GROUP, product)


def _made(name: str, simd: Simd, fmt: Format, form: int, column_bytes: int,
          product: Product) -> Tiling:  # fmt: skip
    unpack = unpacking(Unpacking(name, simd, fmt))
    return Tiling(unpack, multiplying(product), form, _COLUMNS[name], UNIT_ROWS, _TOKENS,
                  column_bytes, 0)  # fmt: skip


def _amx_tiling(simd: Simd, fmt: Format, amx: TileUnit) -> Tiling:
    columns = _COLUMNS["pairs"]
    unpack, multiply = unpacking(Unpacking("pairs", simd, fmt)), amx_multiplying(amx)
    return Tiling(unpack, multiply, BF16, columns, AMX_UNIT_ROWS, PANEL_TOKENS,
                  PAIR_GROUP // GROUP, amx_scratch_bytes(columns))  # fmt: skip


@cache
def unpacking(kind: Unpacking) -> Any:
    """The compiled function (weights, row_bytes, columns, tile), all int64, that fills a tile with
    `columns` values of 16 rows, from the start of a block on."""

    @cfunc(_UNPACK_SIGNATURE, cache=True, error_model="numpy")
    def unpack(w, row_bytes, columns, tile):
        _fill(kind, w, row_bytes, columns, tile)

    return unpack


def _fill(kind: Any, w: int, row_bytes: int, columns: int, tile: int) -> None:
    raise NotImplementedError("only called from compiled kernels")


@overload(_fill, jit_options={"forceinline": True})
def _overload_fill(kind, w, row_bytes, columns, tile):
    made = kind.parameter
    fillings = {"codes": filling_codes, "floats": filling_floats, "pairs": filling_pairs}
    fill = fillings[made.name](made.simd, made.fmt)

    def fill_tile(kind, w, row_bytes, columns, tile):
        fill(w, row_bytes, columns, tile)

    return fill_tile

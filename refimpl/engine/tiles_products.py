"""Products of tiles with many rows of activations: one loop, three arithmetics.

`multiplying(product)` compiles

    (tiles, tile_bytes, count, first, columns, total, blobs, rows, offset, y, y_bytes)

all int64, for `columns` columns from `first` on of the `total` ones of a matrix. For m < rows it
puts the products of `count` tiles with x_m to y_m, 16 for each tile, or adds them to what is there
if `first` is not 0. x_m lies `offset` bytes after the m-th of the addresses at `blobs`; y_m is at
y + m y_bytes.

The arithmetics differ in one function, `emit_group`: what one group of columns adds to the sums of
a few rows of activations. Integer sums of a group are scaled in float32, as in the kernels in
place; only the order in which float32 terms are added is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from refimpl.engine.bf16 import emit_pair_dot
from refimpl.engine.jit import cfunc, intrinsic
from refimpl.engine.simd import Parameter, Simd
from refimpl.engine.tiles_codes import CODES, GROUP, TILE_ROWS, Layout
from refimpl.engine.tiles_values import FLOAT_COLUMN, PAIR_GROUP
from refimpl.engine.vec import (
    F32x16,
    I8x32,
    I8x64,
    I32x8,
    I32x16,
    VecType,
    call,
    constant,
    pointer,
    splatted,
)
from refimpl.engine.x86 import emit_dot, emit_dot32, emit_fours, emit_pairs, emit_sign

SIGNATURE = types.void(*[types.int64] * 11)
_I64 = ir.IntType(64)


@dataclass(frozen=True)
class Product(Parameter):
    """How tiles are multiplied; `name` is 'codes', 'floats' or 'pairs'.

    Attributes:
        simd: instruction set.
        tokens: rows of activations whose sums are kept in registers.
        layout: of tiles of codes.
        chain: without VNNI, how many sums of two byte products fit 16 bits; 0 where one does not:
            signs are then taken from the codes, and activations have theirs.
    """

    simd: Simd
    tokens: int
    layout: Layout | None = None
    chain: int = 0

    @property
    def columns(self) -> int:
        """Columns of a group."""
        return 1 if self.name == "floats" else GROUP

    @property
    def group_bytes(self) -> int:
        """Bytes of a group."""
        if self.layout is not None:
            return self.layout.group_bytes
        return FLOAT_COLUMN if self.name == "floats" else PAIR_GROUP


@cache
def multiplying(product: Product) -> Any:
    """The compiled function."""
    few = replace(product, tokens=4)
    tokens, wide = product.tokens, product.tokens > 4

    @cfunc(SIGNATURE, cache=True, error_model="numpy")
    def multiply(tiles, tile_bytes, count, first, columns, total, blobs, rows, offset, y, y_bytes):
        for tile in range(count):
            at, to = tiles + tile * tile_bytes, y + 4 * TILE_ROWS * tile
            for m in range(0, rows, tokens):
                n, out = min(tokens, rows - m), to + m * y_bytes
                if wide and n > 4:
                    _run(product, at, first, columns, total, blobs + 8 * m, n, offset, out, y_bytes)
                else:
                    _run(few, at, first, columns, total, blobs + 8 * m, n, offset, out, y_bytes)

    return multiply


def _constant(value: int) -> Any:
    return ir.Constant(_I64, value)


def _loaded(builder: Any, kind: Any, address: Any, offset: int = 0) -> Any:
    """What lies `offset` bytes after an address."""
    if offset:
        address = builder.add(address, _constant(offset))
    return builder.load(pointer(builder, address, kind), align=1)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


@intrinsic
def _run(typingctx, product, tile, first, columns, total, blobs, rows, offset, y, y_bytes):
    """One tile times up to `product.tokens` rows of activations."""
    made = product.parameter

    def emit(context, builder, signature, args):
        _, tile, first, columns, total, blobs, rows, offset, y, y_bytes = args
        last = builder.sub(rows, _constant(1))
        xs, outs = [], []
        fresh = builder.icmp_signed("==", first, _constant(0))
        none = ir.Constant(F32x16.llvm, None)
        for m in range(made.tokens):
            within = builder.icmp_signed("<", _constant(m), rows)
            number = builder.select(within, _constant(m), last)
            blob = _loaded(builder, _I64, builder.add(blobs, builder.mul(number, _constant(8))))
            xs.append(builder.add(blob, offset))
            outs.append(builder.add(y, builder.mul(number, y_bytes)))
        begin = [none] * made.tokens
        sums = _group_loop(builder, made, begin, tile, xs, (first, columns, total))
        before = [builder.select(fresh, none, _loaded(builder, F32x16.llvm, o)) for o in outs]
        for m, out in enumerate(outs):
            # Sums beyond the last row are that row's own once more.
            value = builder.fadd(before[m], sums[m])
            builder.store(value, pointer(builder, out, F32x16.llvm), align=1)
        return context.get_dummy_value()

    return types.void(product, *[types.int64] * 9), emit


def _group_loop(builder: Any, product: Product, sums: list[Any], tile: Any, xs: list[Any],
                place: tuple[Any, Any, Any]) -> list[Any]:  # fmt: skip
    """Go through the groups of `place` (first column, number of columns, all columns)."""
    first, columns, total = place
    before = builder.block
    loop, end = builder.append_basic_block("groups"), builder.append_basic_block("groups.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    column, at = builder.phi(_I64), builder.phi(_I64)
    kept = [builder.phi(F32x16.llvm) for _ in sums]
    column.add_incoming(_constant(0), before)
    at.add_incoming(tile, before)
    for phi, value in zip(kept, sums, strict=True):
        phi.add_incoming(value, before)
    emit_group = {"codes": _codes, "floats": _floats, "pairs": _pairs}[product.name]
    here = builder.add(column, first)
    new = emit_group(builder, product, list(kept), at, [(x, here, total) for x in xs])
    following = builder.add(column, _constant(product.columns))
    column.add_incoming(following, loop)
    at.add_incoming(builder.add(at, _constant(product.group_bytes)), loop)
    for phi, value in zip(kept, new, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, columns), loop, end)
    builder.position_at_end(end)
    return new


def _floats(builder: Any, product: Product, sums: list[Any], group: Any, xs: list[Any]) -> Any:
    """One column in float32."""
    weights = _loaded(builder, F32x16.llvm, group)
    for m, (x, column, _) in enumerate(xs):
        at = builder.add(x, builder.mul(column, _constant(4)))
        value = splatted(builder, _loaded(builder, ir.FloatType(), at), F32x16.llvm)
        sums[m] = _fma(builder, weights, value, sums[m])
    return sums


def _pairs(builder: Any, product: Product, sums: list[Any], group: Any, xs: list[Any]) -> Any:
    """32 columns in bfloat16 (AVX512-BF16)."""
    places = [builder.add(x, builder.mul(column, _constant(2))) for x, column, _ in xs]
    for i in range(GROUP // 2):
        weights = _loaded(builder, I32x16.llvm, group, 64 * i)
        for m, at in enumerate(places):
            pair = splatted(builder, _loaded(builder, ir.IntType(32), at, 4 * i), I32x16.llvm)
            sums[m] = emit_pair_dot(builder, sums[m], weights, pair)
    return sums


def _codes(builder: Any, product: Product, sums: list[Any], group: Any, xs: list[Any]) -> Any:
    """32 columns of codes: integer sums for each scale, scaled; minima times sums."""
    layout = product.layout
    assert layout is not None
    places = [builder.add(x, column) for x, column, _ in xs]
    scales = [
        builder.add(builder.add(x, total), builder.lshr(column, _constant(3)))
        for x, column, total in xs
    ]
    for part in range(layout.scales):
        dots = _integer_sums(builder, product, group, places, part)
        factor = _loaded(builder, F32x16.llvm, group, CODES + 64 * part)
        for m, dot in enumerate(dots):
            value, scale = builder.sitofp(dot, F32x16.llvm), _spread_float(builder, scales[m])
            sums[m] = _fma(builder, value, builder.fmul(factor, scale), sums[m])
    if layout.minimum:
        lowest = _loaded(builder, F32x16.llvm, group, CODES + 128 * layout.scales)
        for m, (_, _, total) in enumerate(xs):
            # scales times sums lie behind the scales
            at = builder.add(scales[m], builder.lshr(total, _constant(3)))
            sums[m] = _fma(builder, lowest, _spread_float(builder, at), sums[m])
    return sums


def _spread_float(builder: Any, at: Any) -> Any:
    return splatted(builder, _loaded(builder, ir.FloatType(), at), F32x16.llvm)


def _integer_sums(builder: Any, product: Product, group: Any, places: list[Any],
                  part: int) -> list[Any]:  # fmt: skip
    """Sums of the products of a part of a group's codes with each row, 16 lanes of int32."""
    layout = product.layout
    assert layout is not None
    count = 8 // layout.scales
    vectors = range(count * part, count * (part + 1))
    start = CODES + 64 * (layout.scales + part)
    if product.simd.name == "avx512":
        dots = [_loaded(builder, I32x16.llvm, group, start)] * len(places)
        for i in vectors:
            codes = _loaded(builder, I8x64.llvm, group, 64 * i)
            for m, x in enumerate(places):
                dots[m] = emit_dot(builder, dots[m], _four(builder, x, i, I8x64), codes)
        return dots
    halves = [_half_sums(builder, product, group, places, vectors, start, h) for h in (0, 1)]
    index = constant(ir.VectorType(ir.IntType(32), 16), list(range(16)))
    return [builder.shuffle_vector(a, b, index) for a, b in zip(*halves, strict=True)]


def _four(builder: Any, x: Any, i: int, kind: VecType) -> Any:
    """Values 4 i .. 4 i + 3 of a row in every lane."""
    lanes = ir.VectorType(ir.IntType(32), kind.count // 4)
    value = _loaded(builder, ir.IntType(32), x, 4 * i)
    return builder.bitcast(splatted(builder, value, lanes), kind.llvm)


def _half_sums(builder: Any, product: Product, group: Any, places: list[Any], vectors: range,
               start: int, half: int) -> list[Any]:  # fmt: skip
    """The same for 8 of the 16 rows, 256-bit vectors."""
    rest = ir.Constant(I32x8.llvm, None)
    if product.simd.dot or product.chain:  # activations without sign
        rest = _loaded(builder, I32x8.llvm, group, start + 32 * half)
    dots, short = [rest] * len(places), [None] * len(places)
    for i in vectors:
        codes = _loaded(builder, I8x32.llvm, group, 64 * i + 32 * half)
        size = codes if product.chain else emit_sign(builder, codes, codes)
        for m, x in enumerate(places):
            four = _four(builder, x, i, I8x32)
            if product.simd.dot:
                dots[m] = emit_dot32(builder, dots[m], four, codes)
                continue
            if product.chain:
                pairs = emit_pairs(builder, four, codes)
            else:
                pairs = emit_pairs(builder, size, emit_sign(builder, four, codes))
            previous = short[m]
            pairs = pairs if previous is None else builder.add(previous, pairs)
            if (i + 1) % max(1, product.chain) == 0:
                dots[m], pairs = builder.add(dots[m], emit_fours(builder, pairs)), None
            short[m] = pairs
    return dots

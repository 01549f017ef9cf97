"""Building vectors out of others: shuffles, constants, spread bits and bytes, table lookup.

Everything here is LLVM's generic vectors, as in `refimpl.engine.vec`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import (
    F32x4,
    F32x16,
    I8x16,
    I8x32,
    I32x8,
    VecType,
    constant,
    pointer,
    splatted,
)


def shuffler(kind: VecType, indices: list[int]) -> Any:
    """An intrinsic (a, b) -> lanes of a (0..n-1) and b (n..2n-1) in the order of `indices`."""

    def typed(typingctx, a, b):
        result = VecType(kind.element, len(indices))

        def emit(context, builder, signature, args):
            mask = constant(ir.VectorType(ir.IntType(32), len(indices)), indices)
            return builder.shuffle_vector(args[0], args[1], mask)

        return (result(kind, kind), emit) if a == b == kind else None

    return intrinsic(typed)


join_i8x16 = shuffler(I8x16, list(range(32)))
join_i8x32 = shuffler(I8x32, list(range(64)))
join_f32x4 = shuffler(F32x4, list(range(8)))
join_i32x8 = shuffler(I32x8, list(range(16)))


def literal(kind: VecType, values: list[int]) -> Any:
    """An intrinsic () -> a constant vector."""

    def typed(typingctx):
        def emit(context, builder, signature, args):
            return constant(kind.llvm, values)

        return kind(), emit

    return intrinsic(typed)


@intrinsic
def bit_bytes(typingctx, kind, bits, value):
    """A byte vector: the literal `value` in lane i where bit i of `bits` is set, else 0."""
    if not isinstance(value, types.IntegerLiteral):
        return None
    vector = kind.instance_type

    def emit(context, builder, signature, args):
        low = builder.trunc(args[1], ir.IntType(vector.count)) if vector.count < 64 else args[1]
        chosen = builder.bitcast(low, ir.VectorType(ir.IntType(1), vector.count))
        byte = constant(vector.llvm, [value.literal_value] * vector.count)
        return builder.select(chosen, byte, ir.Constant(vector.llvm, None))

    return vector(kind, types.int64, value), emit


@intrinsic
def shift_right_by(typingctx, value, bits):
    """Lanes shifted right by `bits`, zeros coming in."""

    def emit(context, builder, signature, args):
        amount = builder.trunc(args[1], value.llvm.element)
        return builder.lshr(args[0], splatted(builder, amount, value.llvm))

    return value(value, types.int64), emit


@intrinsic
def lane(typingctx, value, number):
    """One lane (a literal number) of a vector of int64."""
    if not isinstance(number, types.IntegerLiteral):
        return None
    index = ir.Constant(ir.IntType(32), number.literal_value)

    def emit(context, builder, signature, args):
        return builder.extract_element(args[0], index)

    return (types.int64(value, number), emit) if value.element == "i64" else None


@intrinsic
def with_last_i64(typingctx, value, scalar):
    """`value` with its last lane replaced."""

    def emit(context, builder, signature, args):
        last = ir.Constant(ir.IntType(32), value.count - 1)
        return builder.insert_element(args[0], args[1], last)

    return (value(value, types.int64), emit) if value.element == "i64" else None


@intrinsic
def where_bits(typingctx, value, bits, chosen):
    """`chosen` in the lanes where `value` has any of `bits`, else 0."""

    def emit(context, builder, signature, args):
        none = ir.Constant(value.llvm, None)
        found = builder.icmp_unsigned("!=", builder.and_(args[0], args[1]), none)
        return builder.select(found, args[2], none)

    return (value(value, value, value), emit) if value == bits == chosen else None


@intrinsic
def bytes16(typingctx, low, high):
    """The bytes of two 64-bit integers, lowest first."""

    def emit(context, builder, signature, args):
        both = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for i in range(2):
            both = builder.insert_element(both, args[i], ir.Constant(ir.IntType(32), i))
        return builder.bitcast(both, I8x16.llvm)

    return I8x16(types.int64, types.int64), emit


@intrinsic
def repeated_halves(typingctx, address, stride, count):
    """`count` float16 at `address`, `stride` bytes apart (both literal), each repeated over
    16 / count lanes, in float32."""
    if not (isinstance(stride, types.IntegerLiteral) and isinstance(count, types.IntegerLiteral)):
        return None
    step, n = stride.literal_value, count.literal_value

    def emit(context, builder, signature, args):
        halves = ir.Constant(ir.VectorType(ir.HalfType(), n), ir.Undefined)
        for i in range(n):
            at = builder.add(args[0], ir.Constant(ir.IntType(64), i * step))
            value = builder.load(pointer(builder, at, ir.HalfType()), align=1)
            halves = builder.insert_element(halves, value, ir.Constant(ir.IntType(32), i))
        mask = constant(ir.VectorType(ir.IntType(32), 16), [i * n // 16 for i in range(16)])
        return builder.fpext(builder.shuffle_vector(halves, halves, mask), F32x16.llvm)

    return F32x16(types.int64, stride, count), emit


def table_lookup(values: tuple[int, ...]) -> Any:
    """An intrinsic codes (I8x16, 0..15) -> `values` of the codes, without machine instructions."""

    def typed(typingctx, codes):
        def emit(context, builder, signature, args):
            kind = ir.ArrayType(ir.IntType(8), 16)
            table = cgutils.global_constant(
                builder, "table16", ir.Constant(kind, [v & 0xFF for v in values])
            )
            result = ir.Constant(I8x16.llvm, ir.Undefined)
            zero = ir.Constant(ir.IntType(32), 0)
            for i in range(16):
                lane = ir.Constant(ir.IntType(32), i)
                code = builder.zext(builder.extract_element(args[0], lane), ir.IntType(32))
                value = builder.load(builder.gep(table, [zero, code]))
                result = builder.insert_element(result, value, lane)
            return result

        return (I8x16(I8x16), emit) if codes == I8x16 else None

    return intrinsic(typed)

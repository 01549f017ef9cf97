"""Several running sums at once: what keeps a kernel's products in registers.

`RunningSums(n)` says at compile time how many; the sums of a kernel are then one Numba value, a
tuple of vectors, that the functions here make, add to and write. LLVM takes the tuple apart into
registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from refimpl.engine.jit import intrinsic
from refimpl.engine.simd import Parameter
from refimpl.engine.vec import F32x16, call, pointer, splatted


@dataclass(frozen=True)
class RunningSums(Parameter):
    """A number of sums that a template is compiled for."""

    count: int


def _kind(sums: Any) -> Any:
    return types.UniTuple(F32x16, sums.parameter.count)


@intrinsic
def count_of(typingctx, sums):
    """How many there are."""
    count = sums.parameter.count

    def emit(context, builder, signature, args):
        return ir.Constant(ir.IntType(64), count)

    return types.int64(sums), emit


@intrinsic
def zero_sums(typingctx, sums):
    """So many vectors of zeros."""
    kind = _kind(sums)

    def emit(context, builder, signature, args):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(sums), emit


@intrinsic
def load_sums(typingctx, sums, address, stride):
    """Vectors read from `address` on, `stride` bytes apart."""
    kind = _kind(sums)

    def emit(context, builder, signature, args):
        _, at, step = args
        vectors = []
        for _ in range(kind.count):
            vectors.append(builder.load(pointer(builder, at, F32x16.llvm), align=1))
            at = builder.add(at, step)
        return cgutils.pack_array(builder, vectors)

    return kind(sums, types.int64, types.int64), emit


@intrinsic
def store_sums(typingctx, sums, address, stride):
    """Write vectors from `address` on, `stride` bytes apart."""

    def emit(context, builder, signature, args):
        values, at, step = args
        for vector in cgutils.unpack_tuple(builder, values):
            builder.store(vector, pointer(builder, at, F32x16.llvm), align=1)
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.int64), emit


@intrinsic
def scale_sums(typingctx, sums, vector):
    """Each sum times a vector."""

    def emit(context, builder, signature, args):
        values, factor = args
        made = [builder.fmul(value, factor) for value in cgutils.unpack_tuple(builder, values)]
        return cgutils.pack_array(builder, made)

    return sums(sums, vector), emit


@intrinsic
def add_sums(typingctx, sums, others, vector):
    """Each sum plus another times a vector, rounded once."""

    def emit(context, builder, signature, args):
        pairs = zip(*(cgutils.unpack_tuple(builder, value) for value in args[:2]), strict=True)
        kind, made = F32x16.llvm, []
        for value, other in pairs:
            made.append(call(builder, "llvm.fma.v16f32", kind, [other, args[2], value]))
        return cgutils.pack_array(builder, made)

    return sums(sums, others, vector), emit


@intrinsic
def add_products(typingctx, sums, vector, address, stride):
    """Add to the i-th sum the vector times the float32 at `address` + i `stride`, rounded once."""

    def emit(context, builder, signature, args):
        values, factor, at, step = args
        made = []
        for value in cgutils.unpack_tuple(builder, values):
            scalar = builder.load(pointer(builder, at, ir.FloatType()), align=1)
            one = splatted(builder, scalar, F32x16.llvm)
            made.append(call(builder, "llvm.fma.v16f32", F32x16.llvm, [one, factor, value]))
            at = builder.add(at, step)
        return cgutils.pack_array(builder, made)

    return sums(sums, vector, types.int64, types.int64), emit

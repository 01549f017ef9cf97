"""bfloat16 in compiled code: rounding to it, and products of pairs (AVX512-BF16)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import F32x16, I16x16, I32x16, call, constant


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_HALVES = ir.VectorType(BFloat(), 16)
_PAIRS = ir.VectorType(BFloat(), 32)


def _nearest(context: Any, builder: Any, values: Any) -> Any:
    """The bits (<16 x i16>) of <16 x float> as the nearest bfloat16, ties to even."""
    if "+avx512bf16" in context.codegen().magic_tuple()[2].split(","):
        return builder.bitcast(builder.fptrunc(values, _HALVES), I16x16.llvm)
    # Without the instruction LLVM calls __truncsfbf2 of a compiler's library, which is not there.
    bits = builder.bitcast(values, I32x16.llvm)
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    nearest = builder.add(bits, builder.add(odd, _all(0x7FFF)))
    quiet = builder.or_(bits, _all(0x400000))
    number = builder.fcmp_ordered("ord", values, values)
    chosen = builder.select(number, nearest, quiet)
    return builder.trunc(builder.lshr(chosen, _all(16)), I16x16.llvm)


def _all(value: int) -> Any:
    return constant(I32x16.llvm, [value] * 16)


@intrinsic
def rounded(typingctx, values):
    """16 float32 as the nearest bfloat16, ties to even (their bits, I16x16)."""

    def emit(context, builder, signature, args):
        return _nearest(context, builder, args[0])

    return I16x16(F32x16), emit


@intrinsic
def rounded_pair(typingctx, first, second):
    """Lanes of bfloat16 pairs, `first` in the lower half."""

    def emit(context, builder, signature, args):
        low, high = (builder.zext(_nearest(context, builder, a), I32x16.llvm) for a in args)
        return builder.or_(low, builder.shl(high, _all(16)))

    return I32x16(F32x16, F32x16), emit


def emit_pair_dot(builder: Any, acc: Any, a: Any, b: Any) -> Any:
    """acc + sums of two products of bfloat16 (<16 x float>, pairs as <16 x i32>)."""
    pairs = [builder.bitcast(v, _PAIRS) for v in (a, b)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32x16.llvm, [acc, *pairs])

"""bfloat16 in compiled code: rounding to it, and products of pairs (AVX512-BF16)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import F32x16, I16x16, I32x16, call


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


@intrinsic
def rounded(typingctx, values):
    """16 float32 as the nearest bfloat16, ties to even (their bits, I16x16)."""

    def emit(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], _HALVES), I16x16.llvm)

    return I16x16(F32x16), emit


@intrinsic
def rounded_pair(typingctx, first, second):
    """Lanes of bfloat16 pairs, `first` in the lower half."""

    def emit(context, builder, signature, args):
        def bits(value: Any) -> Any:
            half = builder.bitcast(builder.fptrunc(value, _HALVES), I16x16.llvm)
            return builder.zext(half, I32x16.llvm)

        sixteen = ir.Constant(I32x16.llvm, [ir.Constant(ir.IntType(32), 16)] * 16)
        return builder.or_(bits(args[0]), builder.shl(bits(args[1]), sixteen))

    return I32x16(F32x16, F32x16), emit


def emit_pair_dot(builder: Any, acc: Any, a: Any, b: Any) -> Any:
    """acc + sums of two products of bfloat16 (<16 x float>, pairs as <16 x i32>)."""
    pairs = [builder.bitcast(v, _PAIRS) for v in (a, b)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32x16.llvm, [acc, *pairs])

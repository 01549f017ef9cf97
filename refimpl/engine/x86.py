"""Vector operations that only x86 has: byte permutes and sums of byte products.

LLVM's names are those of its own intrinsics; `vpdpbusd` takes bytes as byte vectors since
LLVM 22 and as 32-bit lanes before.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import (
    F32x16,
    I8x16,
    I8x32,
    I8x64,
    I16x16,
    I32x8,
    I32x16,
    I64x8,
    VecType,
    call,
    constant,
)

_DOT_TAKES_BYTES = binding.llvm_version_info[0] >= 22


def _x86(name: str, result: VecType, *arguments: VecType, doc: str) -> Any:
    """An intrinsic for an LLVM intrinsic of fixed types."""
    if len(arguments) == 1:

        def one(typingctx, a):
            return (result(*arguments), _emit(name, result)) if (a,) == arguments else None

        one.__doc__ = doc
        return intrinsic(one)

    def two(typingctx, a, b):
        return (result(*arguments), _emit(name, result)) if (a, b) == arguments else None

    two.__doc__ = doc
    return intrinsic(two)


def _emit(name: str, result: VecType) -> Any:
    def emit(context, builder, signature, args):
        return call(builder, name, result.llvm, list(args))

    return emit


sign_bytes = _x86(
    "llvm.x86.avx2.psign.b", I8x32, I8x32, I8x32, doc="a with the sign of b; 0 where b is 0."
)


def bit_matrices(matrices: list[int]) -> Any:
    """An intrinsic a -> every byte of a (64) times the 8 x 8 matrix of bits for its 64-bit piece
    (GFNI): bit i of the result is the parity of the byte masked with byte 7 - i of the matrix."""

    def typed(typingctx, a):
        def emit(context, builder, signature, args):
            table = builder.bitcast(constant(I64x8.llvm, matrices), I8x64.llvm)
            zero = ir.Constant(ir.IntType(8), 0)
            name = "llvm.x86.vgf2p8affineqb.512"
            kind = ir.FunctionType(I8x64.llvm, [I8x64.llvm, I8x64.llvm, zero.type])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, [args[0], table, zero])

        return (I8x64(I8x64), emit) if a == I8x64 else None

    return intrinsic(typed)


def lane_permuter(indices: list[int]) -> Any:
    """An intrinsic a -> float lanes of a (16) in the order of `indices`."""

    def typed(typingctx, a):
        def emit(context, builder, signature, args):
            mask = constant(I32x16.llvm, indices)
            return builder.shuffle_vector(args[0], args[0], mask)

        return (F32x16(F32x16), emit) if a == F32x16 else None

    return intrinsic(typed)


def _lookup(kind: VecType, name: str, doc: str) -> Any:
    """Table lookup by the low four bits of each byte, table in every 16 bytes of a constant."""

    def typed(typingctx, table, codes):
        def emit(context, builder, signature, args):
            return call(builder, name, kind.llvm, list(args))

        return (kind(kind, kind), emit) if table == codes == kind else None

    typed.__doc__ = doc
    return intrinsic(typed)


_TABLE_DOC = "Bytes of `table` picked by `codes` (0..15), within each 16 bytes."
lookup16 = _lookup(I8x16, "llvm.x86.ssse3.pshuf.b.128", _TABLE_DOC)
lookup64 = _lookup(I8x64, "llvm.x86.avx512.pshuf.b.512", _TABLE_DOC)


@intrinsic
def dot64(typingctx, acc, unsigned, signed):
    """acc + sums of four products of unsigned and signed bytes, 16 lanes (AVX512-VNNI)."""

    def emit(context, builder, signature, args):
        return _dot(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16, list(args))

    return I32x16(I32x16, I8x64, I8x64), emit


@intrinsic
def dot32(typingctx, simd, acc, unsigned, signed):
    """acc + sums of four products of unsigned and signed bytes, 8 lanes.

    Without VNNI the products are first summed in pairs, in 16 bits: exact as long as the
    unsigned bytes are at most 128.
    """
    kind = simd.parameter.dot

    def emit(context, builder, signature, args):
        if kind:
            return emit_dot32(builder, *args[1:])
        return builder.add(args[1], emit_fours(builder, emit_pairs(builder, *args[2:])))

    return I32x8(simd, I32x8, I8x32, I8x32), emit


def _dot(builder: Any, name: str, kind: VecType, args: list[Any]) -> Any:
    if not _DOT_TAKES_BYTES:
        args = [args[0], builder.bitcast(args[1], kind.llvm), builder.bitcast(args[2], kind.llvm)]
    return call(builder, name, kind.llvm, args)


def emit_dot(builder: Any, acc: Any, unsigned: Any, signed: Any) -> Any:
    """`dot64` as an LLVM value."""
    return _dot(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16, [acc, unsigned, signed])


def emit_dot32(builder: Any, acc: Any, unsigned: Any, signed: Any) -> Any:
    """`dot32` with VNNI; LLVM picks the encoding, AVX512-VNNI's or AVX-VNNI's."""
    return _dot(builder, "llvm.x86.avx512.vpdpbusd.256", I32x8, [acc, unsigned, signed])


def emit_pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Sums of two products of unsigned and signed bytes in 16 bits, saturated (AVX2)."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", I16x16.llvm, [unsigned, signed])


def emit_fours(builder: Any, pairs: Any) -> Any:
    """Sums of two 16-bit lanes in 32 bits (AVX2)."""
    ones = constant(I16x16.llvm, [1] * 16)
    return call(builder, "llvm.x86.avx2.pmadd.wd", I32x8.llvm, [pairs, ones])


def emit_sign(builder: Any, values: Any, signs: Any) -> Any:
    """`sign_bytes` as an LLVM value."""
    return call(builder, "llvm.x86.avx2.psign.b", I8x32.llvm, [values, signs])

"""How each stored type's values are read, 32 at a time, with LLVM's generic vectors.

`codes32(simd, format, block, j)` gives sub-block j of a block as signed codes and scales: value i
is scale * code - minimum, with one scale for the first 16 values and one for the last 16. It
serves the float kernels of every instruction set and the integer kernels of AVX2. `floats32`
does the same for plain types. Layouts: architecture notes, section 4.5 (ggml-quants.c).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.engine.formats import IQ4_VALUES
from refimpl.engine.jit import njit, overload
from refimpl.engine.lanes import bit_bytes, literal, shift_right_by, table_lookup
from refimpl.engine.loads import load, load_f16, load_i8, load_u8, load_u16, load_u32
from refimpl.engine.vec import (
    F16x16,
    F32x16,
    I8x16,
    I16x16,
    I32x16,
    convert,
    reinterpret,
    shift_left,
    shift_right,
    splat,
    widen,
)
from refimpl.engine.x86 import lookup16

_iq4_table = literal(I8x16, list(IQ4_VALUES))
_iq4_generic = table_lookup(IQ4_VALUES)
_INLINE = {"forceinline": True}
_ZERO = np.float32(0)


def codes32(simd: Any, fmt: Any, block: int, j: int) -> Any:
    """Signed codes (two I8x16), their scales (two float32) and the minimum (float32)."""
    raise NotImplementedError("only called from compiled kernels")


def floats32(fmt: Any, address: int) -> Any:
    """32 values of a plain type as two F32x16."""
    raise NotImplementedError("only called from compiled kernels")


def iq4(simd: Any, codes: Any) -> Any:
    """The signed values of 16 IQ4 codes."""
    raise NotImplementedError("only called from compiled kernels")


@overload(iq4, jit_options=_INLINE)
def _iq4(simd, codes):
    if simd.parameter.name == "portable":
        return lambda simd, codes: _iq4_generic(codes)
    return lambda simd, codes: lookup16(_iq4_table(), codes)


@overload(floats32, jit_options=_INLINE)
def _floats32(fmt, address):
    if fmt.parameter.name == "F32":

        def f32(fmt, address):
            return load(F32x16, address), load(F32x16, address + 64)

        return f32
    if fmt.parameter.name == "F16":

        def f16(fmt, address):
            first, last = load(F16x16, address), load(F16x16, address + 32)
            return convert(F32x16, first), convert(F32x16, last)

        return f16

    def bf16(fmt, address):
        return _bf16(address), _bf16(address + 32)

    return bf16 if fmt.parameter.name == "BF16" else None


@njit(forceinline=True)
def _bf16(address):
    bits = widen(I32x16, load(I16x16, address))
    return reinterpret(F32x16, shift_left(bits, 16))


@njit(forceinline=True)
def _nibbles(address):
    """Low and high nibbles of 16 bytes."""
    packed = load(I8x16, address)
    return packed & splat(I8x16, 15), shift_right(packed, 4)


@njit(forceinline=True)
def _fifth_bits(address):
    """Value 16 where the bits of a 32-bit mask are set, as two byte vectors."""
    bits = load_u32(address)
    return bit_bytes(I8x16, bits & 0xFFFF, 16), bit_bytes(I8x16, bits >> 16, 16)


@njit(forceinline=True)
def _q4_0(simd, fmt, block, j):
    low, high = _nibbles(block + 2)
    d, offset = load_f16(block), splat(I8x16, 8)
    return low - offset, high - offset, d, d, _ZERO


@njit(forceinline=True)
def _q5_0(simd, fmt, block, j):
    low, high = _nibbles(block + 6)
    first, last = _fifth_bits(block + 2)
    d, offset = load_f16(block), splat(I8x16, 16)
    return (low | first) - offset, (high | last) - offset, d, d, _ZERO


@njit(forceinline=True)
def _q5_1(simd, fmt, block, j):
    low, high = _nibbles(block + 8)
    first, last = _fifth_bits(block + 4)
    d = load_f16(block)
    return low | first, high | last, d, d, -load_f16(block + 2)


@njit(forceinline=True)
def _q8_0(simd, fmt, block, j):
    d = load_f16(block)
    return load(I8x16, block + 2), load(I8x16, block + 18), d, d, _ZERO


@njit(forceinline=True)
def _iq4_nl(simd, fmt, block, j):
    low, high = _nibbles(block + 2)
    d = load_f16(block)
    return iq4(simd, low), iq4(simd, high), d, d, _ZERO


@njit(forceinline=True)
def _scale_and_min(scales, j):
    """The 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K block."""
    if j < 4:
        return load_u8(scales + j) & 63, load_u8(scales + j + 4) & 63
    both = load_u8(scales + j + 4)
    scale = (both & 15) | ((load_u8(scales + j - 4) >> 6) << 4)
    return scale, (both >> 4) | ((load_u8(scales + j) >> 6) << 4)


@njit(forceinline=True)
def _nibbles_of_pair(address, j):
    """32 nibbles of 32 bytes: the low ones for even j, the high ones for odd j."""
    bits, low = (j & 1) * 4, splat(I8x16, 15)
    first, last = load(I8x16, address), load(I8x16, address + 16)
    return shift_right_by(first, bits) & low, shift_right_by(last, bits) & low


@njit(forceinline=True)
def _q4_k(simd, fmt, block, j):
    scale, minimum = _scale_and_min(block + 4, j)
    first, last = _nibbles_of_pair(block + 16 + (j >> 1) * 32, j)
    d = load_f16(block) * np.float32(scale)
    return first, last, d, d, load_f16(block + 2) * np.float32(minimum)


@njit(forceinline=True)
def _q5_k(simd, fmt, block, j):
    scale, minimum = _scale_and_min(block + 4, j)
    first, last = _nibbles_of_pair(block + 48 + (j >> 1) * 32, j)
    one = splat(I8x16, 1)
    high_first = shift_right_by(load(I8x16, block + 16), j) & one
    high_last = shift_right_by(load(I8x16, block + 32), j) & one
    d = load_f16(block) * np.float32(scale)
    return (
        first | shift_left(high_first, 4),
        last | shift_left(high_last, 4),
        d,
        d,
        load_f16(block + 2) * np.float32(minimum),
    )


@njit(forceinline=True)
def _q6_k(simd, fmt, block, j):
    half, quarter = j >> 2, j & 3
    low = block + half * 64 + (quarter & 1) * 32
    high = block + 128 + half * 32
    bits, top = (quarter >> 1) * 4, quarter * 2
    nibble, two, offset = splat(I8x16, 15), splat(I8x16, 3), splat(I8x16, 32)
    first = shift_right_by(load(I8x16, low), bits) & nibble
    last = shift_right_by(load(I8x16, low + 16), bits) & nibble
    first = first | shift_left(shift_right_by(load(I8x16, high), top) & two, 4)
    last = last | shift_left(shift_right_by(load(I8x16, high + 16), top) & two, 4)
    d = load_f16(block + 208)
    scale0 = np.float32(load_i8(block + 192 + 2 * j))
    scale1 = np.float32(load_i8(block + 193 + 2 * j))
    return first - offset, last - offset, d * scale0, d * scale1, _ZERO


@njit(forceinline=True)
def _iq4_xs(simd, fmt, block, j):
    low = (load_u8(block + 4 + (j >> 1)) >> (4 * (j & 1))) & 15
    high = (load_u16(block + 2) >> (2 * j)) & 3
    first, last = _nibbles(block + 8 + 16 * j)
    d = load_f16(block) * np.float32(np.int64(low | (high << 4)) - 32)
    return iq4(simd, first), iq4(simd, last), d, d, _ZERO


_DECODERS = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}


@overload(codes32, jit_options=_INLINE)
def _codes32(simd, fmt, block, j):
    decoder = _DECODERS.get(fmt.parameter.name)
    return None if decoder is None else lambda simd, fmt, block, j: decoder(simd, fmt, block, j)

"""Blocks of 256 values for the AVX512 kernels: codes, scales, and their products.

See `refimpl.engine.kernels512` for the orders in which codes and factors lie.
"""

from __future__ import annotations

from typing import Any

from numba import types

from refimpl.engine.formats import IQ4_VALUES
from refimpl.engine.jit import njit, overload
from refimpl.engine.lanes import (
    bytes16,
    join_i8x32,
    literal,
    shuffler,
    where_bits,
)
from refimpl.engine.loads import load, load_f16, load_i64, load_u16, load_u32
from refimpl.engine.vec import (
    F16x8,
    F32x16,
    I8x16,
    I8x32,
    I8x64,
    I32x4,
    I32x16,
    I64x8,
    convert,
    fma,
    reinterpret,
    shift_left,
    shift_right,
    shift_right_each,
    splat,
    widen,
    zeros,
)
from refimpl.engine.x86 import (
    bit_matrices,
    dot64,
    lane_permuter,
    lookup64,
)

_INLINE = {"forceinline": True}
_iq4_unsigned = literal(I8x64, [(v + 128) & 0xFF for v in IQ4_VALUES] * 4)

# How the first four scales and the second four fall on the lanes of two vectors' sums.
_quarter_0 = lane_permuter([i // 4 for i in range(16)])
_quarter_1 = lane_permuter([4 + i // 4 for i in range(16)])


def super_codes(fmt: Any, w: int) -> Any:
    """A block's codes (four I8x64) and its 16 scales (F32x16)."""
    raise NotImplementedError("only called from compiled kernels")


# The scales and minima of Q4_K and Q5_K: 12 bytes, as three groups a, b, c of four. The first four
# scales and minima are the low six bits of a and b; those of the others lie in c (low and high
# nibbles), their top two bits in those of a and b.
_abc = shuffler(I32x4, [1, 3, 2, 3])
_tops = shuffler(I32x4, [1, 1, 2, 2])
_low_shifts = literal(I32x4, [0, 0, 0, 4])
_low_bits = literal(I32x4, [0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F])
_top_bits = literal(I32x4, [0, 0x30303030, 0, 0x30303030])
_factors = shuffler(F16x8, [0] * 8 + [1] * 8)


@njit(forceinline=True)
def _k_scales(block):
    """d times the eight scales, then dmin times the eight minima, of a Q4_K or Q5_K block."""
    head = load(I32x4, block)
    low = shift_right_each(_abc(head, head), _low_shifts()) & _low_bits()
    bytes16 = low | (shift_right(_tops(head, head), 2) & _top_bits())
    halves = reinterpret(F16x8, head)
    factors = convert(F32x16, _factors(halves, halves))
    return convert(F32x16, widen(I32x16, reinterpret(I8x16, bytes16))) * factors


@njit(forceinline=True)
def _nibbles64(at):
    packed = load(I8x64, at)
    return packed & splat(I8x64, 15), shift_right(packed, 4)


@njit(forceinline=True)
def _two_bits(low, high, top):
    """64 + 64 codes of Q6_K: nibbles and the 32 bytes that hold their two high bits."""
    bits, three = join_i8x32(top, shift_right(top, 2)), splat(I8x64, 3)
    low = low | shift_left(bits & three, 4)
    return low, high | shift_left(shift_right(bits, 4) & three, 4)


_bits_0_2 = literal(I8x64, [1] * 32 + [4] * 32)
_bits_1_3 = literal(I8x64, [2] * 32 + [8] * 32)
_bits_4_6 = literal(I8x64, [16] * 32 + [64] * 32)
_bits_5_7 = literal(I8x64, [32] * 32 + [128] * 32)


@overload(super_codes, jit_options=_INLINE)
def _super_codes(fmt, w):
    def q4_k(fmt, w):
        low0, high0 = _nibbles64(w + 16)
        low1, high1 = _nibbles64(w + 80)
        return low0, high0, low1, high1, _k_scales(w)

    def q5_k(fmt, w):
        low0, high0 = _nibbles64(w + 48)
        low1, high1 = _nibbles64(w + 112)
        top, value = load(I8x32, w + 16), splat(I8x64, 16)
        top = join_i8x32(top, top)
        low0 = low0 | where_bits(top, _bits_0_2(), value)
        high0 = high0 | where_bits(top, _bits_1_3(), value)
        low1 = low1 | where_bits(top, _bits_4_6(), value)
        high1 = high1 | where_bits(top, _bits_5_7(), value)
        return low0, high0, low1, high1, _k_scales(w)

    def q6_k(fmt, w):
        low0, high0 = _nibbles64(w)
        low1, high1 = _nibbles64(w + 64)
        low0, high0 = _two_bits(low0, high0, load(I8x32, w + 128))
        low1, high1 = _two_bits(low1, high1, load(I8x32, w + 160))
        lanes = convert(I32x16, load(I8x16, w + 192))
        return low0, high0, low1, high1, convert(F32x16, lanes) * splat(F32x16, load_f16(w + 208))

    def iq4_xs(fmt, w):
        low0, high0 = _nibbles64(w + 8)
        low1, high1 = _nibbles64(w + 72)
        table = _iq4_unsigned()
        return (
            lookup64(table, low0),
            lookup64(table, high0),
            lookup64(table, low1),
            lookup64(table, high1),
            _iq4_xs_scales(w),
        )

    return {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs}.get(fmt.parameter.name)


@njit(forceinline=True)
def _iq4_xs_scales(w):
    """The eight scales, twice: four low bits from one place and two high bits from another, each
    spread to one byte a scale."""
    low = load_u32(w + 4)
    low = (low | low << 16) & 0x0000FFFF0000FFFF
    low = (low | low << 8) & 0x00FF00FF00FF00FF
    low = (low | low << 4) & 0x0F0F0F0F0F0F0F0F
    high = types.int64(load_u16(w + 2))
    high = (high | high << 24) & 0x000000FF000000FF
    high = (high | high << 12) & 0x000F000F000F000F
    high = (high | high << 6) & 0x0303030303030303
    both = types.int64(low) | high << 4
    lanes = widen(I32x16, bytes16(both, both)) - splat(I32x16, 32)
    return convert(F32x16, lanes) * splat(F32x16, load_f16(w))


# Q4_K and Q5_K: vector k of four holds values 8 k .. 8 k + 7 of every sub-block, in this order, so
# that two lanes belong to a sub-block in all of them and their sums go on in the same lanes.
_chunks = [shuffler(I64x8, [k, 4 + k, 8 + k, 12 + k] * 2) for k in range(4)]
_chunks0, _chunks1, _chunks2, _chunks3 = _chunks
# What takes the low nibbles of four 64-bit pieces and the high ones of four: a matrix of bits each.
_low_or_high = bit_matrices([0x0102040800000000] * 4 + [0x1020408000000000] * 4)
_fifth_bits = literal(I64x8, [0x0101010101010101 * (1 << i) for i in (0, 2, 4, 6, 1, 3, 5)]
                      + [-0x7F7F7F7F7F7F7F80])  # fmt: skip
_nibble_bits = literal(I64x8, [0x0F0F0F0F0F0F0F0F] * 4 + [-0x0F0F0F0F0F0F0F10] * 4)
_by_sub_block = lane_permuter([i for j in (0, 2, 4, 6, 1, 3, 5, 7) for i in (j, j)])


@njit(forceinline=True)
def _by_eights(at):
    """The nibbles of 128 bytes as four vectors."""
    a, b = load(I64x8, at), load(I64x8, at + 64)
    c0, c1 = reinterpret(I8x64, _chunks0(a, b)), reinterpret(I8x64, _chunks1(a, b))
    c2, c3 = reinterpret(I8x64, _chunks2(a, b)), reinterpret(I8x64, _chunks3(a, b))
    return _low_or_high(c0), _low_or_high(c1), _low_or_high(c2), _low_or_high(c3)


@njit(forceinline=True)
def q4_k_step(w: Any) -> Any:
    """A block of Q4_K: codes by eights, those of high nibbles in place and so 16 times as large;
    scales and minima; scales on the lanes."""
    a, b, bits = load(I64x8, w + 16), load(I64x8, w + 80), _nibble_bits()
    c0, c1 = reinterpret(I8x64, _chunks0(a, b) & bits), reinterpret(I8x64, _chunks1(a, b) & bits)
    c2, c3 = reinterpret(I8x64, _chunks2(a, b) & bits), reinterpret(I8x64, _chunks3(a, b) & bits)
    scales = _k_scales(w)
    return c0, c1, c2, c3, scales, _by_sub_block(scales)


@njit(forceinline=True)
def _with_fifth(codes, at):
    bits = reinterpret(I8x64, splat(I64x8, load_i64(at)))
    return codes | where_bits(bits, reinterpret(I8x64, _fifth_bits()), splat(I8x64, 16))


@njit(forceinline=True)
def q5_k_step(w: Any) -> Any:
    """A block of Q5_K, likewise."""
    c0, c1, c2, c3 = _by_eights(w + 48)
    c0, c1 = _with_fifth(c0, w + 16), _with_fifth(c1, w + 24)
    c2, c3 = _with_fifth(c2, w + 32), _with_fifth(c3, w + 40)
    scales = _k_scales(w)
    return c0, c1, c2, c3, scales, _by_sub_block(scales)


# Q6_K: vector k of four holds values 4 k .. 4 k + 3 of each of 16 halves of sub-blocks, so that one
# lane belongs to each of them in all four. Lane 4 i + v is quarter i of what was vector v: four
# vectors are transposed by fours of bytes within each 16.
_low_pairs, _high_pairs = (
    shuffler(I32x16, [4 * q + v + i for q in range(4) for i in (k, k + 1) for v in (0, 16)])
    for k in (0, 2)
)
_low_fours, _high_fours = (
    shuffler(I64x8, [2 * q + v + k for q in range(4) for v in (0, 8)]) for k in (0, 1)
)
_by_quarters = lane_permuter([4 * (i % 4) + i // 4 for i in range(16)])


@njit(forceinline=True)
def q6_k_step(fmt: Any, w: Any) -> Any:
    """A block of Q6_K: codes by fours, scales in the order of their lanes."""
    c0, c1, c2, c3, scales = super_codes(fmt, w)
    a, b = reinterpret(I32x16, c0), reinterpret(I32x16, c1)
    c, d = reinterpret(I32x16, c2), reinterpret(I32x16, c3)
    low, high = reinterpret(I64x8, _low_pairs(a, b)), reinterpret(I64x8, _low_pairs(c, d))
    c0, c1 = _low_fours(low, high), _high_fours(low, high)
    low, high = reinterpret(I64x8, _high_pairs(a, b)), reinterpret(I64x8, _high_pairs(c, d))
    c2, c3 = _low_fours(low, high), _high_fours(low, high)
    c0, c1 = reinterpret(I8x64, c0), reinterpret(I8x64, c1)
    return c0, c1, reinterpret(I8x64, c2), reinterpret(I8x64, c3), _by_quarters(scales)


def added_super(fmt: Any) -> Any:
    """The function that adds a block's products to a sum.

    They are summed apart first, so that a block need not wait for the one before.
    """

    def with_minimum(fmt, step, x, acc):
        c0, c1, c2, c3, scales, spread_scales = step
        dot = dot64(dot64(zeros(I32x16), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        dot = dot64(dot64(dot, c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        acc = fma(scales, load(F32x16, x + 320), acc)
        return fma(convert(F32x16, dot), spread_scales * load(F32x16, x + 256), acc)

    def halves(fmt, step, x, acc):
        c0, c1, c2, c3, scales = step
        part = scales * load(F32x16, x + 320)
        factors = scales * load(F32x16, x + 256)
        dot = dot64(dot64(zeros(I32x16), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        part = fma(convert(F32x16, dot), _quarter_0(factors), part)
        dot = dot64(dot64(zeros(I32x16), c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        return acc + fma(convert(F32x16, dot), _quarter_1(factors), part)

    def fours(fmt, step, x, acc):
        c0, c1, c2, c3, scales = step
        dot = dot64(dot64(load(I32x16, x + 320), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        dot = dot64(dot64(dot, c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        return fma(convert(F32x16, dot), scales * load(F32x16, x + 256), acc)

    return {"super_halves": halves, "super": fours}.get(fmt.parameter.kind512, with_minimum)

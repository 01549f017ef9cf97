"""Integer kernels for AVX512 with VNNI and VBMI: one template, eight block types.

Products of unsigned codes and int8 activations (Q8_0: signed codes and unsigned activations) are
summed in integers within a block, scaled in float32, and added to 16 lanes that are summed once
per row. Activations come in the order in which a format's codes fall (`refimpl.engine.
activations`):

* *quads* (Q4_0, Q5_0, Q5_1, IQ4_NL): four blocks at a time; a vector holds the low nibbles (first
  16 values) of four blocks, another the high ones, so that four lanes belong to each block;
* *pairs* (Q8_0): two blocks, eight lanes each;
* *super* (Q4_K, Q5_K, Q6_K, IQ4_XS): four vectors of 64 codes of one block of 256, whose 16 scales
  are multiplied with the activations' 16 factors at once and then spread over the lanes. A
  second set of factors adds what does not depend on the codes (minimum or offset).

Such a piece of a row is a *step*: `decoded` gives its codes and scales, `added` adds its products
with one row of activations. (Two weight rows at a time, which halves the loads of activations, gain
nothing within the caches and halve the speed at which memory is read.)
"""

from __future__ import annotations

from typing import Any

from numba import types

from refimpl.engine.activations import activation_bytes
from refimpl.engine.formats import IQ4_VALUES, Format
from refimpl.engine.jit import cfunc, njit, overload
from refimpl.engine.kernels import OPTIONS, PREFETCH_BYTES, SIGNATURE
from refimpl.engine.lanes import (
    bit_bytes,
    bytes16,
    join_i8x16,
    join_i8x32,
    literal,
    repeated_halves,
    shuffler,
    where_bits,
)
from refimpl.engine.simd import Simd
from refimpl.engine.vec import (
    F32x16,
    I8x16,
    I8x32,
    I8x64,
    I32x16,
    I64x8,
    convert,
    fma,
    load,
    load_f16,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    prefetch,
    reduce_add,
    reinterpret,
    shift_left,
    shift_right,
    shift_right_each,
    splat,
    stack,
    store,
    store_f32,
    store_i8,
    widen,
    zeros,
)
from refimpl.engine.x86 import (
    byte_permuter,
    dot64,
    first_half_floats,
    insert_high16,
    lane_permuter,
    lookup64,
)

_INLINE = {"forceinline": True}
_ACTIVATION_BYTES = 32 << 10
_GROUP_ROWS = 16  # done piece by piece where the activations of whole rows are more than that
_iq4_unsigned = literal(I8x64, [(v + 128) & 0xFF for v in IQ4_VALUES] * 4)


def decoded(fmt: Any, w: int) -> Any:
    """Codes and scales of one step."""
    raise NotImplementedError("only called from compiled kernels")


def added(fmt: Any, step: Any, x: int, acc: Any) -> Any:
    """acc (F32x16) + the products of a decoded step with its activations."""
    raise NotImplementedError("only called from compiled kernels")


def kernel512(simd: Simd, fmt: Format, count: int) -> Any:
    """The compiled kernel of a block format for M = `count`.

    Rows of 32-value blocks may have any number of them; the last ones of a row are copied to where
    a whole step can be read.
    """
    block_bytes, blocks = fmt.block_bytes, _STEP_BLOCKS[fmt.kind512.partition("_")[0]]
    size, values = blocks * block_bytes, blocks * fmt.block_values
    x_size = activation_bytes(fmt)

    most = _ACTIVATION_BYTES // (count * x_size)  # steps whose activations stay in the cache

    @cfunc(SIGNATURE, **OPTIONS)
    def rows512(w, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3):
        simd  # noqa: B018  # part of the cache key
        tail, sums = stack(128), stack(4096)
        whole, rest = columns // values, columns % values // 32
        steps = whole + (rest > 0)
        part, group, ahead = steps, rows, PREFETCH_BYTES
        if count > 1 and steps > most:
            part, group, ahead = most, _GROUP_ROWS, 2 * row_bytes
        for top in range(0, rows, group):
            for first in range(0, steps, part):
                stop = min(first + part, steps)
                for r in range(top, min(top + group, rows)):
                    at = w + r * row_bytes + first * size
                    kept = sums + (r - top) * count * 64
                    a0 = a1 = a2 = a3 = zeros(F32x16)
                    if first > 0:
                        a0, a1 = load(F32x16, kept), load(F32x16, kept + 64)
                        if count > 2:
                            a2, a3 = load(F32x16, kept + 128), load(F32x16, kept + 192)
                    for i in range(first, stop):
                        for line in range(0, size - 8, 64):
                            prefetch(at + ahead + line)
                        if i == whole:
                            at = _copied(tail, at, rest * block_bytes, size)
                        step = decoded(fmt, at)
                        at += size
                        x = i * x_size
                        a0 = added(fmt, step, x0 + x, a0)
                        if count > 1:
                            a1 = added(fmt, step, x1 + x, a1)
                        if count > 2:
                            a2 = added(fmt, step, x2 + x, a2)
                            a3 = added(fmt, step, x3 + x, a3)
                    if stop < steps:
                        store(kept, a0)
                        store(kept + 64, a1)
                        if count > 2:
                            store(kept + 128, a2)
                            store(kept + 192, a3)
                        continue
                    store_f32(y0 + 4 * r, reduce_add(a0))
                    if count > 1:
                        store_f32(y1 + 4 * r, reduce_add(a1))
                    if count > 2:
                        store_f32(y2 + 4 * r, reduce_add(a2))
                        store_f32(y3 + 4 * r, reduce_add(a3))

    return rows512


@njit(forceinline=True)
def _copied(tail, w, count, size):
    """Copy `count` bytes and fill up to `size` with zeros."""
    for i in range(count):
        store_i8(tail + i, load_u8(w + i))
    for i in range(count, size):
        store_i8(tail + i, 0)
    return tail


# ------------------------------------------------------------------ quads

_Q4_CODES = [18 * b + 2 + i for b in range(4) for i in range(16)]
# block 3's bytes 56..71 do not lie within the first 64: they are loaded on their own
_permute_18 = byte_permuter([i if i < 64 else 0 for i in _Q4_CODES])
_scales_18 = byte_permuter([18 * (i // 8) + i % 2 for i in range(32)] * 2)


def quads(fmt: Any, w: int) -> Any:
    """Codes of four blocks: low and high (I8x64), scales and minima (F32x16)."""
    raise NotImplementedError("only called from compiled kernels")


@njit(forceinline=True)
def _quads_18(w):
    """Four blocks of 18 bytes: nibbles and scales."""
    bytes64 = load(I8x64, w)
    packed = insert_high16(_permute_18(bytes64), w + 56)
    d = first_half_floats(_scales_18(bytes64))
    return packed & splat(I8x64, 15), shift_right(packed, 4), d


@njit(forceinline=True)
def _four_nibbles(w, stride):
    """The nibbles of four 16-byte pieces."""
    first = join_i8x16(load(I8x16, w), load(I8x16, w + stride))
    last = join_i8x16(load(I8x16, w + 2 * stride), load(I8x16, w + 3 * stride))
    packed = join_i8x32(first, last)
    return packed & splat(I8x64, 15), shift_right(packed, 4)


@njit(forceinline=True)
def _four_masks(w, stride):
    """16 bits of each of four blocks as one mask."""
    low = load_u16(w) | load_u16(w + stride) << 16
    high = load_u16(w + 2 * stride) | load_u16(w + 3 * stride) << 16
    return types.int64(low) | types.int64(high) << 32


@overload(quads, jit_options=_INLINE)
def _quads(fmt, w):
    name = fmt.parameter.name

    def q4_0(fmt, w):
        low, high, d = _quads_18(w)
        return low, high, d, d

    def iq4_nl(fmt, w):
        low, high, d = _quads_18(w)
        return lookup64(_iq4_unsigned(), low), lookup64(_iq4_unsigned(), high), d, d

    def q5_0(fmt, w):
        low, high = _four_nibbles(w + 6, 22)
        low = low | bit_bytes(I8x64, _four_masks(w + 2, 22), 16)
        high = high | bit_bytes(I8x64, _four_masks(w + 4, 22), 16)
        d = repeated_halves(w, 22, 4)
        return low, high, d, d

    def q5_1(fmt, w):
        low, high = _four_nibbles(w + 8, 24)
        low = low | bit_bytes(I8x64, _four_masks(w + 4, 24), 16)
        high = high | bit_bytes(I8x64, _four_masks(w + 6, 24), 16)
        return low, high, repeated_halves(w, 24, 4), repeated_halves(w + 2, 24, 4)

    return {"Q4_0": q4_0, "IQ4_NL": iq4_nl, "Q5_0": q5_0, "Q5_1": q5_1}.get(name)


def _added_quads(fmt):
    if fmt.parameter.kind512 == "quads_min":

        def with_minimum(fmt, step, x, acc):
            low, high, d, minima = step
            dot = dot64(dot64(zeros(I32x16), low, load(I8x64, x)), high, load(I8x64, x + 64))
            acc = fma(minima, load(F32x16, x + 192), acc)
            return fma(convert(F32x16, dot), d * load(F32x16, x + 128), acc)

        return with_minimum

    def with_offset(fmt, step, x, acc):
        low, high, d, _ = step
        dot = dot64(load(I32x16, x + 192), low, load(I8x64, x))
        dot = dot64(dot, high, load(I8x64, x + 64))
        return fma(convert(F32x16, dot), d * load(F32x16, x + 128), acc)

    return with_offset


# ------------------------------------------------------------------ pairs


@njit(forceinline=True)
def _q8_0(fmt, w):
    """Codes of two blocks, -128 times their sums in the lanes, scales."""
    codes = join_i8x32(load(I8x32, w + 2), load(I8x32, w + 36))
    sums = dot64(zeros(I32x16), splat(I8x64, -128), codes)  # 128 without sign
    return codes, zeros(I32x16) - sums, repeated_halves(w, 34, 2)


def _added_pairs(fmt):
    def pairs(fmt, step, x, acc):
        codes, start, d = step
        dot = dot64(start, load(I8x64, x), codes)
        return fma(convert(F32x16, dot), d * load(F32x16, x + 64), acc)

    return pairs


# ------------------------------------------------------------------ super-blocks

# How the 16 scales fall on the 16 lanes of each of the four vectors of codes.
_quarter_0 = lane_permuter([i // 4 for i in range(16)])
_quarter_1 = lane_permuter([4 + i // 4 for i in range(16)])
_quarter_2 = lane_permuter([8 + i // 4 for i in range(16)])
_quarter_3 = lane_permuter([12 + i // 4 for i in range(16)])


def super_codes(fmt: Any, w: int) -> Any:
    """A block's codes (four I8x64) and its 16 scales (F32x16)."""
    raise NotImplementedError("only called from compiled kernels")


@njit(forceinline=True)
def _k_scales(block):
    """d times the eight scales, then dmin times the eight minima, of a Q4_K or Q5_K block."""
    a, b, c = load_u32(block + 4), load_u32(block + 8), load_u32(block + 12)
    top_a, top_b = (a >> 6) & 0x03030303, (b >> 6) & 0x03030303
    scales = (a & 0x3F3F3F3F) | ((c & 0x0F0F0F0F) | top_a << 4) << 32
    minima = (b & 0x3F3F3F3F) | (((c >> 4) & 0x0F0F0F0F) | top_b << 4) << 32
    lanes = widen(I32x16, bytes16(scales, minima))
    return convert(F32x16, lanes) * repeated_halves(block, 2, 2)


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
_high_last = literal(I64x8, [0] * 4 + [4] * 4)
_fifth_bits = literal(I64x8, [0x0101010101010101 * (1 << i) for i in (0, 2, 4, 6, 1, 3, 5)]
                      + [-0x7F7F7F7F7F7F7F80])  # fmt: skip
_by_sub_block = lane_permuter([i for j in (0, 2, 4, 6, 1, 3, 5, 7) for i in (j, j)])


@njit(forceinline=True)
def _low_or_high(chunks):
    nibbles = reinterpret(I8x64, shift_right_each(chunks, _high_last()))
    return nibbles & splat(I8x64, 15)


@njit(forceinline=True)
def _by_eights(at):
    """The nibbles of 128 bytes as four vectors."""
    a, b = load(I64x8, at), load(I64x8, at + 64)
    c0, c1 = _low_or_high(_chunks0(a, b)), _low_or_high(_chunks1(a, b))
    return c0, c1, _low_or_high(_chunks2(a, b)), _low_or_high(_chunks3(a, b))


@njit(forceinline=True)
def _q4_k_step(w):
    c0, c1, c2, c3 = _by_eights(w + 16)
    scales = _k_scales(w)
    return c0, c1, c2, c3, scales, _by_sub_block(scales)


@njit(forceinline=True)
def _with_fifth(codes, at):
    bits = reinterpret(I8x64, splat(I64x8, load_i64(at)))
    return codes | where_bits(bits, reinterpret(I8x64, _fifth_bits()), splat(I8x64, 16))


@njit(forceinline=True)
def _q5_k_step(w):
    c0, c1, c2, c3 = _by_eights(w + 48)
    c0, c1 = _with_fifth(c0, w + 16), _with_fifth(c1, w + 24)
    c2, c3 = _with_fifth(c2, w + 32), _with_fifth(c3, w + 40)
    scales = _k_scales(w)
    return c0, c1, c2, c3, scales, _by_sub_block(scales)


def _added_super(fmt):
    """The products of a block are summed apart, so that it need not wait for the one before."""

    def with_minimum(fmt, step, x, acc):
        c0, c1, c2, c3, scales, spread_scales = step
        dot = dot64(dot64(zeros(I32x16), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        dot = dot64(dot64(dot, c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        part = scales * load(F32x16, x + 320)
        return acc + fma(convert(F32x16, dot), spread_scales * load(F32x16, x + 256), part)

    def halves(fmt, step, x, acc):
        c0, c1, c2, c3, scales = step
        part = scales * load(F32x16, x + 320)
        factors = scales * load(F32x16, x + 256)
        dot = dot64(dot64(zeros(I32x16), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        part = fma(convert(F32x16, dot), _quarter_0(factors), part)
        dot = dot64(dot64(zeros(I32x16), c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        return acc + fma(convert(F32x16, dot), _quarter_1(factors), part)

    def quarters(fmt, step, x, acc):
        c0, c1, c2, c3, scales = step
        none = zeros(I32x16)
        factors = scales * load(F32x16, x + 256)
        part = scales * load(F32x16, x + 320)
        dot = dot64(none, c0, load(I8x64, x))
        part = fma(convert(F32x16, dot), _quarter_0(factors), part)
        dot = dot64(none, c1, load(I8x64, x + 64))
        part = fma(convert(F32x16, dot), _quarter_1(factors), part)
        dot = dot64(none, c2, load(I8x64, x + 128))
        part = fma(convert(F32x16, dot), _quarter_2(factors), part)
        dot = dot64(none, c3, load(I8x64, x + 192))
        return acc + fma(convert(F32x16, dot), _quarter_3(factors), part)

    kinds = {"super_min": with_minimum, "super_halves": halves, "super": quarters}
    return kinds[fmt.parameter.kind512]


# ------------------------------------------------------------------ choice

_STEP_BLOCKS = {"quads": 4, "pairs": 2, "super": 1}


@overload(decoded, jit_options=_INLINE)
def _decoded(fmt, w):
    kind = fmt.parameter.kind512
    if kind == "pairs":
        return lambda fmt, w: _q8_0(fmt, w)
    if kind.startswith("quads"):
        return lambda fmt, w: quads(fmt, w)
    if fmt.parameter.name == "Q4_K":
        return lambda fmt, w: _q4_k_step(w)
    if fmt.parameter.name == "Q5_K":
        return lambda fmt, w: _q5_k_step(w)
    return lambda fmt, w: super_codes(fmt, w)


@overload(added, jit_options=_INLINE)
def _added(fmt, step, x, acc):
    kinds = {"quads": _added_quads, "pairs": _added_pairs, "super": _added_super}
    return kinds[fmt.parameter.kind512.partition("_")[0]](fmt)

"""Integer kernels for AVX512 with VNNI, VBMI and GFNI: one template, nine block types.

Products of unsigned codes and int8 activations (Q8_0: signed codes and unsigned activations) are
summed in integers within a block, scaled in float32, and added to 16 lanes that are summed once
per row. Activations come in the order in which a format's codes fall (`refimpl.engine.
activations`):

* *eights* (Q4_0, IQ4_NL): eight blocks at a time; vector k of four holds codes 8 k .. 8 k + 7 of
  every block, so that two lanes belong to each block in all of them;
* *quads* (Q5_0, Q5_1): four blocks at a time; a vector holds the low nibbles (first 16 values) of
  four blocks, another the high ones, so that four lanes belong to each block;
* *fours* (Q8_0): the same, where the weights have signs and the activations have none;
* *super* (Q4_K, Q5_K, Q6_K, IQ4_XS): four vectors of 64 codes of one block of 256. Those of Q4_K
  and Q5_K hold eight codes of each of eight sub-blocks; in Q4_K those of the odd ones are 16 times
  as large, and the activations' factors for them a 16th. Those of Q6_K hold four codes of each
  of 16 halves of sub-blocks, a lane each. A second set of factors adds what does not depend on
  the codes (minimum or offset); for Q6_K sums begin with it.

Such a piece of a row is a *step*: `decoded` gives its codes and scales, `added` adds its products
with one row of activations.
"""

from __future__ import annotations

from typing import Any

from numba import types

from refimpl.engine.activations import activation_bytes
from refimpl.engine.formats import IQ4_VALUES, Format
from refimpl.engine.jit import cfunc, njit, overload
from refimpl.engine.kernels import OPTIONS, PREFETCH_BYTES, SIGNATURE, ahead, reading
from refimpl.engine.lanes import (
    bit_bytes,
    join_i8x16,
    join_i8x32,
    literal,
    repeated_halves,
    shuffler,
    with_last_i64,
)
from refimpl.engine.loads import (
    load,
    load_i64,
    load_u8,
    load_u16,
    prefetch,
    prefetch_once,
    stack,
    store_i8,
)
from refimpl.engine.simd import Simd
from refimpl.engine.sums import Sums, added, added_all, keep, kept, put
from refimpl.engine.supers import added_super, q4_k_step, q5_k_step, q6_k_step, super_codes
from refimpl.engine.vec import (
    F16x16,
    F32x16,
    I8x16,
    I8x64,
    I16x32,
    I32x16,
    I64x8,
    convert,
    fma,
    reinterpret,
    shift_right,
    splat,
    zeros,
)
from refimpl.engine.x86 import dot64, lookup64

_INLINE = {"forceinline": True}
_ACTIVATION_BYTES = 24 << 10
_GROUP_ROWS = 16  # done piece by piece where the activations of whole rows are more than that
_iq4_unsigned = literal(I8x64, [(v + 128) & 0xFF for v in IQ4_VALUES] * 4)


def decoded(fmt: Any, w: int) -> Any:
    """Codes and scales of one step."""
    raise NotImplementedError("only called from compiled kernels")


def kernel512(simd: Simd, fmt: Format, count: int) -> Any:
    """The compiled kernel of a block format for M = `count`.

    Rows of 32-value blocks may have any number of them; the last ones of a row are copied to where
    a whole step can be read. Where the activations of whole rows are too many for the nearest
    cache, some weight rows together are done piece by piece.
    """
    block_bytes, blocks = fmt.block_bytes, _STEP_BLOCKS[fmt.kind512.partition("_")[0]]
    size, values, x_size = blocks * block_bytes, blocks * fmt.block_values, activation_bytes(fmt)
    sums, most = Sums(count), _ACTIVATION_BYTES // (count * x_size)
    at_once, row_size = sums.weight_rows, sums.row_size
    two, partial = at_once > 1, blocks > 1

    @cfunc(SIGNATURE, **OPTIONS)
    def rows512(w, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3, after):
        simd  # noqa: B018  # part of the cache key
        tail, kept_sums, xs = stack(320), stack(4096), (x0, x1, x2, x3)
        whole, rest = columns // values, columns % values // 32
        end, jump = reading(w, rows * row_bytes, after)
        part, group, distance = max(1, whole), rows, PREFETCH_BYTES
        if count > 1 and whole > most:
            pieces = (whole + most - 1) // most
            part, group = (whole + pieces - 1) // pieces, _GROUP_ROWS
        if count > 1:  # whole rows ahead, or pairs of them
            distance = (PREFETCH_BYTES // (at_once * part * size) + 1) * at_once * row_bytes
        for top in range(0, rows, group):
            for first in range(0, max(1, whole), part):
                stop = min(first + part, whole)
                for r in range(top, min(top + group, rows), at_once):
                    at, x = w + r * row_bytes + first * size, first * x_size
                    second = row_bytes if r + 1 < rows else 0  # how far away the other row is
                    place = kept_sums + (r - top) * row_size
                    total = kept(sums, place, first > 0)
                    for _ in range(first, stop):
                        soon = ahead(at + distance, end, jump)
                        for line in range(0, size, 64):
                            if count > 1:
                                prefetch(soon + line)
                                if two:
                                    prefetch(soon + second + line)
                            else:
                                prefetch_once(soon + line)
                        step = other = decoded(fmt, at)
                        if two:
                            other = decoded(fmt, at + second)
                        total = added_all(sums, fmt, (step, other), xs, x, total)
                        at += size
                        x += x_size
                    if stop < whole:
                        keep(sums, place, total)
                        continue
                    if partial and rest:
                        step = other = decoded(fmt, _copied(tail, at, rest * block_bytes, size))
                        if two:
                            at += second
                            other = decoded(fmt, _copied(tail, at, rest * block_bytes, size))
                        total = added_all(sums, fmt, (step, other), xs, x, total)
                    put(sums, (y0, y1, y2, y3), 4 * r, second, total)

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


def quads(fmt: Any, w: int) -> Any:
    """Codes of four blocks: low and high (I8x64), scales and minima (F32x16)."""
    raise NotImplementedError("only called from compiled kernels")


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

    return {"Q5_0": q5_0, "Q5_1": q5_1}.get(fmt.parameter.name)


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


# ------------------------------------------------------------------ eights

# Of eight blocks of 18 bytes the first 128: bytes 0..7 and 8..15 of the codes of each (those of
# the last block lie beyond), and the scales as words.
_first_eights = shuffler(
    I8x64, [18 * b + 2 + i if b < 7 else 0 for b in range(8) for i in range(8)]
)
_last_eights = shuffler(
    I8x64, [18 * b + 10 + i if b < 7 else 0 for b in range(8) for i in range(8)]
)
_scales_8x18 = shuffler(I16x32, [9 * (i // 2) for i in range(16)])


@njit(forceinline=True)
def _eights(w):
    """Codes by eights of eight blocks of 18 bytes, and their scales."""
    a, b = load(I8x64, w), load(I8x64, w + 64)
    first = reinterpret(I64x8, _first_eights(a, b))
    last = reinterpret(I64x8, _last_eights(a, b))
    first = reinterpret(I8x64, with_last_i64(first, load_i64(w + 128)))
    last = reinterpret(I8x64, with_last_i64(last, load_i64(w + 136)))
    halves = _scales_8x18(reinterpret(I16x32, a), reinterpret(I16x32, b))
    d = convert(F32x16, reinterpret(F16x16, halves))
    low = splat(I8x64, 15)
    return first & low, last & low, shift_right(first, 4), shift_right(last, 4), d


@njit(forceinline=True)
def _q4_0(w):
    return _eights(w)


@njit(forceinline=True)
def _iq4_nl(w):
    c0, c1, c2, c3, d = _eights(w)
    table = _iq4_unsigned()
    return lookup64(table, c0), lookup64(table, c1), lookup64(table, c2), lookup64(table, c3), d


def _added_eights(fmt):
    def eights(fmt, step, x, acc):
        c0, c1, c2, c3, d = step
        dot = dot64(dot64(load(I32x16, x + 320), c0, load(I8x64, x)), c1, load(I8x64, x + 64))
        dot = dot64(dot64(dot, c2, load(I8x64, x + 128)), c3, load(I8x64, x + 192))
        return fma(convert(F32x16, dot), d * load(F32x16, x + 256), acc)

    return eights


# ------------------------------------------------------------------ fours

# Of four blocks of 34 bytes the first 128: the codes' first halves, their last halves (of which the
# last 8 bytes lie beyond), and the scales, all as words.
_first_halves = shuffler(I16x32, [17 * b + 1 + i for b in range(4) for i in range(8)])
_last_halves = shuffler(I16x32, [(17 * b + 9 + i) % 64 for b in range(4) for i in range(8)])
_scales_4x34 = shuffler(I16x32, [17 * (i // 4) for i in range(16)])


@njit(forceinline=True)
def _q8_0(fmt, w):
    """Codes of four blocks, first and last halves; -128 times their sums in the lanes; scales."""
    a, b = load(I16x32, w), load(I16x32, w + 64)
    first, shift = reinterpret(I8x64, _first_halves(a, b)), splat(I8x64, -128)  # 128 without sign
    words = reinterpret(I64x8, _last_halves(a, b))
    last = reinterpret(I8x64, with_last_i64(words, load_i64(w + 128)))
    sums = dot64(dot64(zeros(I32x16), shift, first), shift, last)
    d = convert(F32x16, reinterpret(F16x16, _scales_4x34(a, b)))
    return first, last, zeros(I32x16) - sums, d


def _added_fours(fmt):
    def fours(fmt, step, x, acc):
        first, last, start, d = step
        dot = dot64(dot64(start, load(I8x64, x), first), load(I8x64, x + 64), last)
        return fma(convert(F32x16, dot), d * load(F32x16, x + 128), acc)

    return fours


# ------------------------------------------------------------------ choice

_STEP_BLOCKS = {"eights": 8, "quads": 4, "fours": 4, "super": 1}


@overload(decoded, jit_options=_INLINE)
def _decoded(fmt, w):
    kind = fmt.parameter.kind512
    if kind == "fours":
        return lambda fmt, w: _q8_0(fmt, w)
    if kind.startswith("quads"):
        return lambda fmt, w: quads(fmt, w)
    if kind == "eights":
        iq4 = fmt.parameter.name == "IQ4_NL"
        return (lambda fmt, w: _iq4_nl(w)) if iq4 else (lambda fmt, w: _q4_0(w))
    if fmt.parameter.name == "Q4_K":
        return lambda fmt, w: q4_k_step(w)
    if fmt.parameter.name == "Q5_K":
        return lambda fmt, w: q5_k_step(w)
    if fmt.parameter.name == "Q6_K":
        return lambda fmt, w: q6_k_step(fmt, w)
    return lambda fmt, w: super_codes(fmt, w)


@overload(added, jit_options=_INLINE)
def _added(fmt, step, x, acc):
    kinds = {
        "eights": _added_eights,
        "quads": _added_quads,
        "fours": _added_fours,
        "super": added_super,
    }
    return kinds[fmt.parameter.kind512.partition("_")[0]](fmt)

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
    join_i8x16,
    join_i8x32,
    literal,
    repeated_halves,
)
from refimpl.engine.simd import Simd
from refimpl.engine.supers import added_super, q4_k_step, q5_k_step, super_codes
from refimpl.engine.vec import (
    F32x16,
    I8x16,
    I8x32,
    I8x64,
    I32x16,
    convert,
    fma,
    load,
    load_u8,
    load_u16,
    prefetch,
    reduce_add,
    shift_right,
    splat,
    stack,
    store,
    store_f32,
    store_i8,
    zeros,
)
from refimpl.engine.x86 import (
    byte_permuter,
    dot64,
    first_half_floats,
    insert_high16,
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
        return lambda fmt, w: q4_k_step(w)
    if fmt.parameter.name == "Q5_K":
        return lambda fmt, w: q5_k_step(w)
    return lambda fmt, w: super_codes(fmt, w)


@overload(added, jit_options=_INLINE)
def _added(fmt, step, x, acc):
    kinds = {"quads": _added_quads, "pairs": _added_pairs, "super": added_super}
    return kinds[fmt.parameter.kind512.partition("_")[0]](fmt)

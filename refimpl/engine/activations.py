"""Activation rows as the kernels want them.

A row of n float32 values (n a multiple of 32) lies at the start of its *blob*; the int8 forms
that the row's consumers need follow at offsets fixed when the model is opened. All forms come
from one quantisation: blocks of 32 values share the scale max|x| / 127, codes are rounded to
nearest even. The forms differ in the order of codes and in what is precomputed:

* `float`: the float32 row itself;
* `natural`: n codes, n/32 scales, n/32 products of scale and sum of codes (256-bit kernels);
* `bytes`: the same with 128 added to each code, so that it has no sign (unpacked tiles);
* `bf16`: the float32 row rounded to bfloat16 (unpacked tiles);
* the others serve the AVX512 kernels, which read 64 codes at a time in the order in which the
  block format's own codes fall; see `refimpl.engine.kernels512`.

An offset is what a format adds to make its codes unsigned; forms with one hold minus the offset
times the sums of the codes, to be added back.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.bf16 import rounded
from refimpl.engine.formats import Format
from refimpl.engine.jit import cfunc, njit
from refimpl.engine.lanes import shuffler
from refimpl.engine.loads import (
    load,
    load_f32,
    load_i32,
    load_i64,
    store,
    store_f32,
    store_i32,
    store_i64,
)
from refimpl.engine.simd import Simd
from refimpl.engine.vec import (
    F32x4,
    F32x16,
    I8x16,
    I8x32,
    I32x4,
    I32x8,
    I32x16,
    convert,
    device,
    reduce_add,
    reduce_max,
    splat,
    vabs,
    vmax,
    vround,
    zeros,
)

(FLOAT, NATURAL, QUADS_16, QUADS_MIN, FOURS, SUPER_MIN, SUPER, SUPER_HALVES,
 BYTES, EIGHTS_8, EIGHTS_128, BF16, SUPER_HIGH_MIN) = range(13)  # fmt: skip
_GROUP = {  # form: (values in a group, bytes of a group)
    QUADS_16: (128, 256),
    QUADS_MIN: (128, 256),
    FOURS: (128, 192),
    SUPER_MIN: (256, 384),
    SUPER_HIGH_MIN: (256, 384),
    SUPER: (256, 384),
    SUPER_HALVES: (256, 384),
    EIGHTS_8: (256, 384),
    EIGHTS_128: (256, 384),
}
_FORM512 = {
    ("quads", 16): QUADS_16,
    ("quads_min", 0): QUADS_MIN,
    ("fours", 128): FOURS,
    ("super_min", 0): SUPER_MIN,
    ("super_high_min", 0): SUPER_HIGH_MIN,
    ("super", 32): SUPER,
    ("super_halves", 128): SUPER_HALVES,
    ("eights", 8): EIGHTS_8,
    ("eights", 128): EIGHTS_128,
}

SIGNATURE = types.void(*[types.int64] * 5)


def form_of(simd: Simd, fmt: Format, exact: bool) -> int:
    """The form of activations that the kernel of a stored type takes."""
    if exact or not simd.integer or not fmt.kind512:
        return FLOAT
    return _FORM512[fmt.kind512, fmt.offset] if simd.name == "avx512" else NATURAL


def activation_bytes(fmt: Format) -> int:
    """Bytes of activations for one step of the AVX512 kernel of a block type."""
    return _GROUP[_FORM512[fmt.kind512, fmt.offset]][1]


def form_bytes(form: int, columns: int) -> int:
    """Bytes of a row of `columns` values in that form, a multiple of 64."""
    if form == FLOAT:
        size = 4 * columns
    elif form == BF16:
        size = 2 * columns
    elif form in (NATURAL, BYTES):
        size = columns + columns // 4
    else:
        values, group = _GROUP[form]
        size = -(-columns // values) * group
    return -(-size // 64) * 64


def scratch_bytes(columns: int) -> int:
    """Bytes that `prepare` needs for itself."""
    return int(_padded.py_func(columns)) * 9 // 4 + 64  # uncompiled: called once


@njit(forceinline=True)
def _padded(columns):
    return (columns + 255) // 256 * 256


@cache
def prepare(simd: Simd) -> Any:
    """The compiled function (row, columns, plan, many, scratch) that adds the int8 forms to a blob.

    `plan` is the address of int64 values: how many forms there are for a few rows, how many for
    many (0 or 1 chooses), then form and offset in the blob of each. `scratch` is memory for
    `scratch_bytes(columns)`.
    """
    wide = simd.name == "avx512"

    @cfunc(SIGNATURE, cache=True, error_model="numpy")
    def prepare_row(row, columns, plan, many, scratch):
        simd  # noqa: B018  # part of the cache key
        count = load_i64(plan + 8 * many)
        if count == 0:
            return
        quantised = False
        for i in range(count):
            form = load_i64(plan + 16 + 16 * i)
            out = row + load_i64(plan + 24 + 16 * i)
            if form == BF16:
                _bf16(row, columns, out)
                continue
            if not quantised:
                _quantise(row, columns, scratch)
                quantised = True
            if form == NATURAL:
                _natural(scratch, columns, out, np.int8(0))
            elif form == BYTES:
                _natural(scratch, columns, out, np.int8(-128))
            if wide:
                if form == EIGHTS_8:
                    _eights(scratch, columns, out, -8)
                elif form == EIGHTS_128:
                    _eights(scratch, columns, out, -128)
                elif form == QUADS_16:
                    _quads(scratch, columns, out, -16)
                elif form == QUADS_MIN:
                    _quads(scratch, columns, out, 0)
                elif form == FOURS:
                    _fours(scratch, columns, out)
                elif form in (SUPER_MIN, SUPER_HIGH_MIN, SUPER, SUPER_HALVES):
                    _super(scratch, columns, out, form)

    return prepare_row


_even16 = shuffler(I32x16, list(range(0, 16, 2)))
_odd16 = shuffler(I32x16, list(range(1, 16, 2)))
_even8 = shuffler(I32x8, list(range(0, 8, 2)))
_odd8 = shuffler(I32x8, list(range(1, 8, 2)))


@njit(forceinline=True)
def _sums_of_four(lanes):
    two = _even16(lanes, lanes) + _odd16(lanes, lanes)
    return _even8(two, two) + _odd8(two, two)


@device(types.void)
def _quantise(row, columns, scratch):
    """Codes (padded), sums of four codes, scales, sums of 32 codes, one after the other; padding
    up to whole groups of 256 values is zero."""
    padded = _padded(columns)
    quads = scratch + padded
    scales, sums = quads + padded, quads + padded + padded // 8
    for block in range(columns // 32):
        at = row + 128 * block
        low, high = load(F32x16, at), load(F32x16, at + 64)
        peak = reduce_max(vmax(vabs(low), vabs(high)))
        inverse = np.float32(127.0) / peak if peak > 0 else np.float32(0)
        q0 = convert(I32x16, vround(low * splat(F32x16, inverse)))
        q1 = convert(I32x16, vround(high * splat(F32x16, inverse)))
        store(scratch + 32 * block, convert(I8x16, q0))
        store(scratch + 32 * block + 16, convert(I8x16, q1))
        store(quads + 32 * block, _sums_of_four(q0))
        store(quads + 32 * block + 16, _sums_of_four(q1))
        store_f32(scales + 4 * block, peak / np.float32(127.0))
        store_i32(sums + 4 * block, reduce_add(q0 + q1))
    for block in range(columns // 32, padded // 32):
        store(scratch + 32 * block, zeros(I8x32))
        store(quads + 32 * block, zeros(I8x32))
        store_f32(scales + 4 * block, np.float32(0))
        store_i32(sums + 4 * block, np.int32(0))


@device(types.void)
def _bf16(row, columns, out):
    for i in range(0, columns, 16):
        store(out + 2 * i, rounded(load(F32x16, row + 4 * i)))


@device(types.void)
def _natural(scratch, columns, out, flipped):
    padded = _padded(columns)
    scales, sums = scratch + 2 * padded, scratch + 2 * padded + padded // 8
    for block in range(columns // 32):
        codes = load(I8x32, scratch + 32 * block)
        store(out + 32 * block, codes ^ splat(I8x32, flipped))
        scale = load_f32(scales + 4 * block)
        store_f32(out + columns + 4 * block, scale)
        total = scale * np.float32(load_i32(sums + 4 * block))
        store_f32(out + columns + columns // 8 + 4 * block, total)


@device(types.void)
def _quads(scratch, columns, out, factor):
    """Groups of 128: first halves of four blocks, their last halves, scales over four lanes each,
    and `factor` times the sums of the eight codes of each lane (factor 0: scale times sum)."""
    padded = _padded(columns)
    quads = scratch + padded
    scales, sums = quads + padded, quads + padded + padded // 8
    for block in range((columns + 127) // 128 * 4):
        to = out + (block // 4) * 256 + (block % 4) * 16
        store(to, load(I8x16, scratch + 32 * block))
        store(to + 64, load(I8x16, scratch + 32 * block + 16))
        scale = load_f32(scales + 4 * block)
        store(to + 128, splat(F32x4, scale))
        if factor == 0:
            store(to + 192, zeros(I32x4))
            store_f32(to + 192, scale * np.float32(load_i32(sums + 4 * block)))
        else:
            both = load(I32x4, quads + 32 * block) + load(I32x4, quads + 32 * block + 16)
            store(to + 192, both * splat(I32x4, np.int32(factor)))


@device(types.void)
def _eights(scratch, columns, out, factor):
    """Groups of 256: four times eight codes of each of eight blocks, scales over two lanes each,
    and `factor` times the sums of the codes of each lane."""
    padded = _padded(columns)
    quads = scratch + padded
    scales = quads + padded
    for block in range((columns + 255) // 256 * 8):
        to = out + (block // 8) * 384 + (block % 8) * 8
        codes = scratch + 32 * block
        for k in range(4):
            store_i64(to + 64 * k, load_i64(codes + 8 * k))
        scale = load_f32(scales + 4 * block)
        store_f32(to + 256, scale)
        store_f32(to + 260, scale)
        four, even, odd = quads + 32 * block, np.int32(0), np.int32(0)
        for k in range(4):
            even += load_i32(four + 8 * k)
            odd += load_i32(four + 8 * k + 4)
        store_i32(to + 320, np.int32(factor) * even)
        store_i32(to + 324, np.int32(factor) * odd)


@device(types.void)
def _fours(scratch, columns, out):
    """Groups of 128: first and last halves of four blocks, 128 added to their codes; their scales
    over four lanes each."""
    scales = scratch + 2 * _padded(columns)
    sign = splat(I8x16, np.int8(-128))
    for block in range((columns + 127) // 128 * 4):
        to = out + (block // 4) * 192 + (block % 4) * 16
        store(to, load(I8x16, scratch + 32 * block) ^ sign)
        store(to + 64, load(I8x16, scratch + 32 * block + 16) ^ sign)
        store(to + 128, splat(F32x4, load_f32(scales + 4 * block)))


@device(types.void)
def _super(scratch, columns, out, form):
    """Groups of 256: four times 64 codes in the order of the format, then two sets of 16 factors of
    the block's 16 scales, or one and what sums begin with (see `refimpl.engine.kernels512`)."""
    padded = _padded(columns)
    quads = scratch + padded
    scales, sums = quads + padded, quads + padded + padded // 8
    for group in range(columns // 256):
        codes, to = scratch + 256 * group, out + 384 * group
        for j in range(8):
            first, last = load(I8x16, codes + 32 * j), load(I8x16, codes + 32 * j + 16)
            block = 8 * group + j
            scale = load_f32(scales + 4 * block)
            total = scale * np.float32(load_i32(sums + 4 * block))
            if form in (SUPER_MIN, SUPER_HIGH_MIN):  # by eights, sub-blocks 0 2 4 6 1 3 5 7
                place = j // 2 + j % 2 * 4
                if form == SUPER_HIGH_MIN and j % 2:
                    scale *= np.float32(0.0625)  # their codes are 16 times as large: exact
                for k in range(4):
                    store_i64(to + 64 * k + 8 * place, load_i64(codes + 32 * j + 8 * k))
                store_f32(to + 256 + 8 * place, scale)
                store_f32(to + 260 + 8 * place, scale)
                store_f32(to + 320 + 4 * j, np.float32(0))
                store_f32(to + 352 + 4 * j, -total)
            elif form == SUPER_HALVES:  # first halves of 0..3, last halves of 0..3, and 4..7
                place = to + (j // 4) * 128 + (j % 4) * 16
                store(place, first)
                store(place + 64, last)
                _factors(to, j, scale, np.float32(-128) * total)
                _factors(to, j + 8, np.float32(0), np.float32(0))
            else:
                _by_fours(codes, quads + 32 * block, j, to, scale)


@njit(forceinline=True)
def _by_fours(codes, quads, j, to, scale):
    """The two halves of sub-block j: four codes of each of 16 halves in each of four vectors, then
    scales, then -32 times the sums of their codes as integers."""
    for half in range(2):
        number = 2 * j + half
        lane = number % 4 * 4 + number // 4
        for k in range(4):
            store_i32(to + 64 * k + 4 * lane, load_i32(codes + 16 * number + 4 * k))
        total = reduce_add(load(I32x4, quads + 16 * half))
        store_f32(to + 256 + 4 * lane, scale)
        store_i32(to + 320 + 4 * lane, np.int32(-32) * total)


@njit(forceinline=True)
def _factors(to, lane, product, extra):
    store_f32(to + 256 + 4 * lane, product)
    store_f32(to + 320 + 4 * lane, extra)

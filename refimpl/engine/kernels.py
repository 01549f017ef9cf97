"""The matrix kernels: a few weight rows times one, two or four activation rows.

Every kernel has the same C signature (`SIGNATURE`), all addresses and counts as int64:

    weights, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3, after

It writes y_m[r] = sum over columns of weight[r, :] * x_m[:] for r < rows, m < M, as float32 at
y_m + 4 r. What x_m points to depends on the kernel's activation kind (`refimpl.engine.
activations`). Kernels for M = 1, 2, 4 do the same operations in the same order for each row m, so
a row's result does not depend on which others it is computed with. `after` is where the thread
will go on reading, or 0 where that is behind these rows: kernels ask for memory `PREFETCH_BYTES`
ahead, there as here.

There is one template per arithmetic; block format, instruction set and M are parameters. Compiled
kernels are cached on disk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.codes import codes32, floats32
from refimpl.engine.formats import FORMATS, Format
from refimpl.engine.jit import cfunc, njit
from refimpl.engine.lanes import join_f32x4, join_i8x16
from refimpl.engine.loads import load, load_f32, prefetch, store_f32
from refimpl.engine.simd import Simd
from refimpl.engine.vec import (
    F32x4,
    F32x8,
    F32x16,
    I8x32,
    I32x8,
    convert,
    fma,
    reduce_add,
    splat,
    zeros,
)
from refimpl.engine.x86 import dot32, sign_bytes

SIGNATURE = types.void(*[types.int64] * 13)
OPTIONS = {"cache": True, "error_model": "numpy"}
PLAIN = ("F32", "F16", "BF16")
WITH_MINIMUM = ("Q5_1", "Q4_K", "Q5_K")
PREFETCH_BYTES = 8192  # how far ahead weights are asked for


@njit(forceinline=True)
def reading(w: Any, size: Any, after: Any) -> Any:
    """Where the weights of a call end, and how far it is from there to what comes after."""
    return w + size, after - (w + size) if after else 0


@njit(forceinline=True)
def ahead(address: Any, end: Any, jump: Any) -> Any:
    """An address that lies ahead, or, behind the end, where will be read instead."""
    return address + jump if address >= end else address


@cache
def kernel(simd: Simd, name: str, rows: int, exact: bool) -> Any:
    """The compiled kernel for a stored type and M = `rows`; its `.address` is callable.

    `exact` takes float32 activations for every type; otherwise block types take int8 ones
    wherever the instruction set has integer kernels.
    """
    fmt = FORMATS[name]
    if name in PLAIN:
        return _plain_kernel(simd, fmt, rows)
    if exact or not simd.integer:
        return _float_kernel(simd, fmt, rows)
    if simd.name == "avx512":
        from refimpl.engine.kernels512 import kernel512

        return kernel512(simd, fmt, rows)
    return _integer_kernel(simd, fmt, rows)


def _plain_kernel(simd: Simd, fmt: Format, count: int) -> Any:
    """F32, F16 and BF16: float32 products, two accumulators."""
    step = fmt.block_bytes

    @cfunc(SIGNATURE, **OPTIONS)
    def plain_rows(w, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3, after):
        simd  # noqa: B018  # part of the cache key
        blocks = columns // 32
        end, jump = reading(w, rows * row_bytes, after)
        for r in range(rows):
            at = w + r * row_bytes
            a0 = a1 = a2 = a3 = zeros(F32x16)
            b0 = b1 = b2 = b3 = zeros(F32x16)
            for i in range(blocks):
                prefetch(ahead(at + PREFETCH_BYTES, end, jump))
                low, high = floats32(fmt, at)
                at += step
                x = i * 128
                a0 = fma(low, load(F32x16, x0 + x), a0)
                b0 = fma(high, load(F32x16, x0 + x + 64), b0)
                if count > 1:
                    a1 = fma(low, load(F32x16, x1 + x), a1)
                    b1 = fma(high, load(F32x16, x1 + x + 64), b1)
                if count > 2:
                    a2 = fma(low, load(F32x16, x2 + x), a2)
                    b2 = fma(high, load(F32x16, x2 + x + 64), b2)
                    a3 = fma(low, load(F32x16, x3 + x), a3)
                    b3 = fma(high, load(F32x16, x3 + x + 64), b3)
            store_f32(y0 + 4 * r, reduce_add(a0 + b0))
            if count > 1:
                store_f32(y1 + 4 * r, reduce_add(a1 + b1))
            if count > 2:
                store_f32(y2 + 4 * r, reduce_add(a2 + b2))
                store_f32(y3 + 4 * r, reduce_add(a3 + b3))

    return plain_rows


def _float_kernel(simd: Simd, fmt: Format, count: int) -> Any:
    """Block types dequantised in registers, float32 activations."""
    block_bytes, sub_blocks = fmt.block_bytes, fmt.sub_blocks

    @cfunc(SIGNATURE, **OPTIONS)
    def float_rows(w, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3, after):
        blocks = columns // (32 * sub_blocks)
        end, jump = reading(w, rows * row_bytes, after)
        for r in range(rows):
            block = w + r * row_bytes
            a0 = a1 = a2 = a3 = zeros(F32x16)
            b0 = b1 = b2 = b3 = zeros(F32x16)
            x = 0
            for _ in range(blocks):
                prefetch(ahead(block + PREFETCH_BYTES, end, jump))
                for j in range(sub_blocks):
                    first, last, s0, s1, minimum = codes32(simd, fmt, block, j)
                    shift = splat(F32x16, minimum)
                    low = convert(F32x16, first) * splat(F32x16, s0) - shift
                    high = convert(F32x16, last) * splat(F32x16, s1) - shift
                    a0 = fma(low, load(F32x16, x0 + x), a0)
                    b0 = fma(high, load(F32x16, x0 + x + 64), b0)
                    if count > 1:
                        a1 = fma(low, load(F32x16, x1 + x), a1)
                        b1 = fma(high, load(F32x16, x1 + x + 64), b1)
                    if count > 2:
                        a2 = fma(low, load(F32x16, x2 + x), a2)
                        b2 = fma(high, load(F32x16, x2 + x + 64), b2)
                        a3 = fma(low, load(F32x16, x3 + x), a3)
                        b3 = fma(high, load(F32x16, x3 + x + 64), b3)
                    x += 128
                block += block_bytes
            store_f32(y0 + 4 * r, reduce_add(a0 + b0))
            if count > 1:
                store_f32(y1 + 4 * r, reduce_add(a1 + b1))
            if count > 2:
                store_f32(y2 + 4 * r, reduce_add(a2 + b2))
                store_f32(y3 + 4 * r, reduce_add(a3 + b3))

    return float_rows


def _integer_kernel(simd: Simd, fmt: Format, count: int) -> Any:
    """Block types times int8 activations, 256-bit vectors (activation kind 'natural').

    The activation row holds `columns` codes, then one float32 scale for each 32 of them, then
    scale times sum of the codes.
    """
    block_bytes, sub_blocks = fmt.block_bytes, fmt.sub_blocks
    has_minimum = fmt.name in WITH_MINIMUM

    @cfunc(SIGNATURE, **OPTIONS)
    def integer_rows(w, row_bytes, rows, columns, x0, x1, x2, x3, y0, y1, y2, y3, after):
        blocks = columns // (32 * sub_blocks)
        end, jump = reading(w, rows * row_bytes, after)
        sums = columns // 8  # from the scales to the sums, bytes
        for r in range(rows):
            block = w + r * row_bytes
            a0 = a1 = a2 = a3 = zeros(F32x8)
            m0 = m1 = m2 = m3 = np.float32(0)
            x = 0
            scale = columns
            for _ in range(blocks):
                prefetch(ahead(block + PREFETCH_BYTES, end, jump))
                for j in range(sub_blocks):
                    first, last, s0, s1, minimum = codes32(simd, fmt, block, j)
                    codes = join_i8x16(first, last)
                    size = sign_bytes(codes, codes)
                    scales = join_f32x4(splat(F32x4, s0), splat(F32x4, s1))
                    dot = dot32(simd, zeros(I32x8), size, sign_bytes(load(I8x32, x0 + x), codes))
                    d = scales * splat(F32x8, load_f32(x0 + scale))
                    a0 = fma(convert(F32x8, dot), d, a0)
                    if has_minimum:
                        m0 -= minimum * load_f32(x0 + scale + sums)
                    if count > 1:
                        dot = dot32(
                            simd, zeros(I32x8), size, sign_bytes(load(I8x32, x1 + x), codes)
                        )
                        d = scales * splat(F32x8, load_f32(x1 + scale))
                        a1 = fma(convert(F32x8, dot), d, a1)
                        if has_minimum:
                            m1 -= minimum * load_f32(x1 + scale + sums)
                    if count > 2:
                        dot = dot32(
                            simd, zeros(I32x8), size, sign_bytes(load(I8x32, x2 + x), codes)
                        )
                        d = scales * splat(F32x8, load_f32(x2 + scale))
                        a2 = fma(convert(F32x8, dot), d, a2)
                        dot = dot32(
                            simd, zeros(I32x8), size, sign_bytes(load(I8x32, x3 + x), codes)
                        )
                        d = scales * splat(F32x8, load_f32(x3 + scale))
                        a3 = fma(convert(F32x8, dot), d, a3)
                        if has_minimum:
                            m2 -= minimum * load_f32(x2 + scale + sums)
                            m3 -= minimum * load_f32(x3 + scale + sums)
                    x += 32
                    scale += 4
                block += block_bytes
            store_f32(y0 + 4 * r, reduce_add(a0) + m0)
            if count > 1:
                store_f32(y1 + 4 * r, reduce_add(a1) + m1)
            if count > 2:
                store_f32(y2 + 4 * r, reduce_add(a2) + m2)
                store_f32(y3 + 4 * r, reduce_add(a3) + m3)

    return integer_rows

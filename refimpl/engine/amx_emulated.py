"""The tile instructions of AMX as operations on memory.

Written from their description in Intel's Software Developer's Manual, volume 2: TDPBF16PS adds the
products of the first values of all pairs, and of the second ones, each in float32 with one rounding
(to nearest even) for a product and its addition, then adds both sums, then adds that to the tile;
denormals are taken and given as zero. What would be a fault of the processor (tiles without shape,
shapes that do not fit) leaves not-a-number everywhere, so that no test can pass over it.

`registers` is the address of REGISTERS_BYTES: eight tiles of 16 rows of 64 bytes, and the 64 bytes
that LDTILECFG was given.
"""

from __future__ import annotations

import numpy as np
from numba import types

from refimpl.engine.jit import njit
from refimpl.engine.loads import load, load_i32, load_u8, load_u16, store, store_i8
from refimpl.engine.vec import (
    F32x16,
    I8x64,
    I32x16,
    device,
    fma,
    reinterpret,
    shift_left,
    splat,
    where_less,
    zeros,
)

_TILE, _TILES = 1024, 8
_CONFIG = _TILE * _TILES
REGISTERS_BYTES = _CONFIG + 64


@njit(forceinline=True)
def _rows(registers, tile):
    return np.int64(load_u8(registers + _CONFIG + 48 + tile))


@njit(forceinline=True)
def _row_bytes(registers, tile):
    return np.int64(load_u16(registers + _CONFIG + 16 + 2 * tile))


@njit(forceinline=True)
def _shaped(registers, tile):
    configured = load_u8(registers + _CONFIG) == 1
    return configured and _rows(registers, tile) > 0 and _row_bytes(registers, tile) > 0


@device(types.void)
def _fault(registers):
    for at in range(0, _CONFIG, 64):
        store(registers + at, splat(F32x16, np.float32(np.nan)))


@njit(forceinline=True)
def _flushed(values):
    """Denormals as zeros of the same sign."""
    bits = reinterpret(I32x16, values)
    size = bits & splat(I32x16, np.int32(0x7FFFFFFF))
    sign = bits & splat(I32x16, np.int32(-0x80000000))
    return reinterpret(F32x16, where_less(size, splat(I32x16, np.int32(0x00800000)), sign, bits))


@njit(forceinline=True)
def _first(pairs):
    """The first values of bfloat16 pairs."""
    return _flushed(reinterpret(F32x16, shift_left(pairs, 16)))


@njit(forceinline=True)
def _second(pairs):
    return _flushed(reinterpret(F32x16, pairs & splat(I32x16, np.int32(-0x10000))))


@njit(forceinline=True)
def _cleared(registers, tile):
    for row in range(16):
        store(registers + _TILE * tile + 64 * row, zeros(I8x64))


def emulated_configure(registers, config):
    """LDTILECFG."""
    for at in range(0, _CONFIG, 64):
        store(registers + at, zeros(I8x64))
    store(registers + _CONFIG, load(I8x64, config))
    for tile in range(_TILES):
        if _rows(registers, tile) > 16 or _row_bytes(registers, tile) > 64:
            store_i8(registers + _CONFIG, 0)


def emulated_release(registers):
    """TILERELEASE."""
    store(registers + _CONFIG, zeros(I8x64))


def emulated_zero(registers, tile):
    """TILEZERO."""
    if not _shaped(registers, tile):
        _fault(registers)
        return
    _cleared(registers, tile)


def emulated_load(registers, tile, address, stride):
    """TILELOADD: what is beyond the tile's shape becomes 0."""
    if not _shaped(registers, tile):
        _fault(registers)
        return
    _cleared(registers, tile)
    for row in range(_rows(registers, tile)):
        for i in range(_row_bytes(registers, tile)):
            store_i8(registers + _TILE * tile + 64 * row + i, load_u8(address + row * stride + i))


def emulated_store(registers, tile, address, stride):
    """TILESTORED."""
    for row in range(_rows(registers, tile)):
        for i in range(_row_bytes(registers, tile)):
            store_i8(address + row * stride + i, load_u8(registers + _TILE * tile + 64 * row + i))


def emulated_dot(registers, c, a, b):
    """TDPBF16PS: c (M, N) += a (M, K pairs) x b (K, N pairs)."""
    fits = _rows(registers, a) == _rows(registers, c)
    fits = fits and _row_bytes(registers, b) == _row_bytes(registers, c)
    fits = fits and 4 * _rows(registers, b) == _row_bytes(registers, a)
    distinct = a not in (b, c) and b != c
    if not (fits and distinct and _shaped(registers, c)):
        _fault(registers)
        return
    for m in range(_rows(registers, c)):
        first = second = zeros(F32x16)
        for k in range(_rows(registers, b)):
            row = load(I32x16, registers + _TILE * b + 64 * k)
            pair = splat(I32x16, load_i32(registers + _TILE * a + 64 * m + 4 * k))
            first = _flushed(fma(_first(pair), _first(row), first))
            second = _flushed(fma(_second(pair), _second(row), second))
        at = registers + _TILE * c + 64 * m
        store(at, _flushed(_flushed(load(F32x16, at)) + _flushed(first + second)))

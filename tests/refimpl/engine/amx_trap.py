"""The tile instructions of AMX on a processor that lacks them.

Each of them raises SIGILL there. The handler made here decodes the instruction that the thread
stands at, does to registers and memory of the thread what Intel describes, and goes on behind it:
machine code made for a processor with AMX runs as it is. x86-64 Linux.

Encodings, operations and the conditions of #GP and #UD are those of Intel's Software Developer's
Manual, volume 2 (LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS).
Where the processor would raise a fault, the fault is counted, the first one is kept, and the
instruction is passed over. Nothing is shared with `refimpl.engine.amx_emulated` but the
description: products are computed one by one, with scalars.

The handler neither allocates nor calls Python; a thread is told by the address of its own memory
(the base of fs).
"""

from __future__ import annotations

import ctypes
import signal
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from refimpl.engine.jit import cfunc, intrinsic, njit
from refimpl.engine.loads import (
    load_f32,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    store_f32,
    store_i8,
    store_i64,
)
from refimpl.engine.memory import address, zeroed
from refimpl.engine.sync import call_address, fetch_add
from refimpl.engine.vec import pointer

KINDS = (
    "ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored",
    "tdpbf16ps",
)  # fmt: skip
_LDTILECFG, _STTILECFG, _TILERELEASE, _TILEZERO, _LOAD, _LOAD_T1, _STORE, _DOT = range(len(KINDS))
FAULTS = (
    "", "#GP: reserved bytes or palette", "#GP: shape of a tile", "start row is not 0",
    "#UD: encoding", "#UD: tiles are not configured", "#UD: tile without shape",
    "#UD: shapes do not fit", "#UD: the same tile twice",
)  # fmt: skip
_RESERVED, _SHAPE, _START_ROW, _ENCODING, _NOT_CONFIGURED, _EMPTY, _NO_FIT, _SAME = range(1, 9)

# of a thread: its key, counts by kind, the operand of LDTILECFG, eight tiles, sums of a row
_COUNTS, _CONFIG, _TILES, _SUMS, _THREAD_BYTES = 64, 128, 192, 8448, 8704
_THREADS, _PLACES = 64, 4096
_FAULT_FIELDS = 64  # how many; number, kind and place of the first
_BYTES = _FAULT_FIELDS + 8 * _PLACES + _THREADS * _THREAD_BYTES

_SA_SIGINFO = 4
_FS = 257  # LLVM's number of the address space relative to fs
_GENERAL = 40  # Linux: where ucontext_t has the general registers
_RIP = _GENERAL + 8 * 16
_ORDER = (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)  # rax, rcx, ... among them
_TINY = np.float32(2.0**-126)


class _Action(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Trap:
    """Handles SIGILL of this process from now on; what is not a tile instruction goes to whoever
    handled it before."""

    def __init__(self) -> None:
        self._memory = zeroed(_BYTES)
        self._previous = _Action()
        at = address(self._memory)
        libc = ctypes.CDLL(None, use_errno=True)
        sigaction = ctypes.cast(libc.sigaction, ctypes.c_void_p).value
        self._handler = _handler(at, sigaction, ctypes.addressof(self._previous))
        action = _Action(handler=self._handler.address, flags=_SA_SIGINFO)
        if libc.sigaction(signal.SIGILL, ctypes.byref(action), ctypes.byref(self._previous)):
            raise OSError(ctypes.get_errno(), "sigaction")

    def forget(self) -> None:
        """Begin anew: no counts, no faults, no tiles."""
        self._memory[:] = 0

    def _threads(self) -> np.ndarray:
        return self._memory[_FAULT_FIELDS + 8 * _PLACES :].reshape(_THREADS, _THREAD_BYTES)

    def counts(self) -> dict[str, int]:
        """Instructions so far by kind, of all threads."""
        counts = self._threads()[:, _COUNTS : _COUNTS + 64].view(np.int64).sum(axis=0)
        return dict(zip(KINDS, counts.tolist(), strict=True))

    def threads(self) -> int:
        """Threads that have multiplied tiles."""
        return int((self._threads()[:, _COUNTS : _COUNTS + 64].view(np.int64)[:, _DOT] > 0).sum())

    def configured(self) -> int:
        """Threads whose tiles are configured now."""
        return int((self._threads()[:, _CONFIG] != 0).sum())

    def places(self) -> int:
        """Different addresses of instructions so far."""
        places = self._memory[_FAULT_FIELDS : _FAULT_FIELDS + 8 * _PLACES].view(np.int64)
        return int((places != 0).sum())

    def faults(self) -> tuple[int, str]:
        """How often the processor would have raised a fault, and the first one."""
        number, code, kind, place = self._memory[:32].view(np.int64).tolist()
        return number, f"{KINDS[kind]} at {place:#x}: {FAULTS[code]}" if number else ""


# ------------------------------------------------------------------ the handler


@intrinsic
def _own_memory(typingctx):
    """An address that is the thread's own."""

    def emit(context, builder, signature, args):
        place = ir.Constant(ir.IntType(64).as_pointer(_FS), None)
        return builder.load(place)

    return types.int64(), emit


@intrinsic
def _exchange(typingctx, at, old, new):
    """Write `new` if `old` is there, atomically; what was there."""

    def emit(context, builder, signature, args):
        place = pointer(builder, args[0], ir.IntType(64))
        pair = builder.cmpxchg(place, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), emit


@njit
def _entry(table, entries, entry_bytes, key):
    """The address of the entry of `key`, made if there is none."""
    i = (key >> 4) % entries
    while True:
        at = table + i * entry_bytes
        there = load_i64(at)
        if there == 0:
            there = _exchange(at, np.int64(0), key)
        if there in (0, key):
            return at
        i = (i + 1) % entries


@njit
def _register(context, number):
    return load_i64(context + _GENERAL + 8 * _ORDER[number])


@njit
def _byte_signed(value):
    return np.int64(value) - 256 * np.int64(value >= 128)


@njit
def _operand(context, at, b, x):
    """The memory operand whose ModRM is at `at`: address, stride (0 without index), end."""
    mod, rm = load_u8(at) >> 6, load_u8(at) & 7
    end, base, stride = at + 1, np.int64(0), np.int64(0)
    if rm == 4:
        sib, end = np.int64(load_u8(end)), end + 1
        index = (sib >> 3 & 7) + 8 * x
        if index != 4:
            stride = _register(context, index) << (sib >> 6)
        if sib & 7 == 5 and mod == 0:
            base, end = np.int64(load_i32(end)), end + 4
        else:
            base = _register(context, (sib & 7) + 8 * b)
    elif rm == 5 and mod == 0:
        end += 4
        base = end + load_i32(end - 4)
    else:
        base = _register(context, rm + 8 * b)
    if mod == 1:
        base, end = base + _byte_signed(load_u8(end)), end + 1
    elif mod == 2:
        base, end = base + load_i32(end), end + 4
    return base, stride, end


@njit
def _kind(at):
    """The kind of the instruction at an address, or -1."""
    second, third = np.int64(load_u8(at + 1)), np.int64(load_u8(at + 2))
    opcode, prefix = load_u8(at + 3), third & 3  # none, 66, F3, F2
    if load_u8(at) != 0xC4 or second & 31 != 2 or third & 0x84:  # VEX.128.0F38.W0
        return -1
    mod, reg, rm = load_u8(at + 4) >> 6, load_u8(at + 4) >> 3 & 7, load_u8(at + 4) & 7
    if opcode == 0x49 and mod == 3:
        if prefix == 0 and reg == 0 and rm == 0:
            return _TILERELEASE
        return _TILEZERO if prefix == 3 and rm == 0 else -1
    if opcode == 0x49 and reg == 0 and prefix < 2:
        return _LDTILECFG if prefix == 0 else _STTILECFG
    if opcode == 0x4B and mod != 3 and rm == 4 and prefix > 0:
        return _LOAD_T1 if prefix == 1 else (_STORE if prefix == 2 else _LOAD)
    return _DOT if opcode == 0x5C and mod == 3 and prefix == 2 else -1


def _handler(memory: int, sigaction: int, previous: int) -> Any:
    """The compiled handler (signal, siginfo, context)."""
    places, threads = memory + _FAULT_FIELDS, memory + _FAULT_FIELDS + 8 * _PLACES

    @cfunc(types.void(types.int32, types.int64, types.int64), error_model="numpy")
    def handler(number, info, context):
        at = load_i64(context + _RIP)
        kind = _kind(at)
        if kind < 0:  # the instruction is tried once more, and has its old handler
            call_address(sigaction, (np.int64(number), previous, np.int64(0)))
            return
        me = _entry(threads, _THREADS, _THREAD_BYTES, _own_memory())
        _entry(places, _PLACES, 8, at)
        store_i64(me + _COUNTS + 8 * kind, load_i64(me + _COUNTS + 8 * kind) + 1)
        second, third = np.int64(load_u8(at + 1)) ^ 0xE0, np.int64(load_u8(at + 2)) ^ 0x78
        modrm, vector = np.int64(load_u8(at + 4)), third >> 3 & 15
        tile, other = modrm >> 3 & 7, modrm & 7
        end, place, stride = at + 5, np.int64(0), np.int64(0)
        if modrm < 0xC0:
            place, stride, end = _operand(context, at + 4, second >> 5 & 1, second >> 6 & 1)
            if kind < _TILERELEASE:  # an index as anywhere else
                place += stride
        wrong = np.int64(_ENCODING)
        if second & 0x80 == 0 and (vector == 0 or (kind == _DOT and vector < 8)):
            wrong = _done(me, kind, place, stride, tile, other, vector)
        if wrong and fetch_add(memory, np.int64(1)) == 0:
            store_i64(memory + 8, wrong)
            store_i64(memory + 16, np.int64(kind))
            store_i64(memory + 24, at)
        store_i64(context + _RIP, end)

    return handler


# ------------------------------------------------------------------ the instructions


@njit
def _rows(me, tile):
    return np.int64(load_u8(me + _CONFIG + 48 + tile))


@njit
def _row_bytes(me, tile):
    return np.int64(load_u16(me + _CONFIG + 16 + 2 * tile))


@njit
def _row(me, tile, row):
    return me + _TILES + 1024 * tile + 64 * row


@njit
def _cleared(at, size):
    for i in range(size):
        store_i8(at + i, 0)


@njit
def _done(me, kind, place, stride, tile, other, vector):
    """Do it; number of the fault, or 0."""
    if kind == _LDTILECFG:
        return _configured(me, place)
    if kind == _STTILECFG:
        for i in range(64):
            store_i8(place + i, load_u8(me + _CONFIG + i))
        return 0
    if kind == _TILERELEASE:
        _cleared(me + _CONFIG, 64)
        _cleared(me + _TILES, 8192)
        return 0
    wrong = _unusable(me, tile)
    if wrong:
        return wrong
    if kind == _TILEZERO:
        _cleared(_row(me, tile, 0), 1024)
    elif kind == _DOT:
        return _multiplied(me, tile, other, vector)
    elif kind == _STORE:
        for row in range(_rows(me, tile)):
            for i in range(_row_bytes(me, tile)):
                store_i8(place + row * stride + i, load_u8(_row(me, tile, row) + i))
    else:
        _cleared(_row(me, tile, 0), 1024)
        for row in range(_rows(me, tile)):
            for i in range(_row_bytes(me, tile)):
                store_i8(_row(me, tile, row) + i, load_u8(place + row * stride + i))
    return 0


@njit
def _configured(me, place):
    """LDTILECFG: palette 1 has eight tiles of up to 16 rows of 64 bytes."""
    palette = load_u8(place)
    _cleared(me + _TILES, 8192)
    _cleared(me + _CONFIG, 64)
    if palette == 0:
        return 0
    reserved = np.int64(0)
    for i in range(64):
        if 2 <= i < 16 or 32 <= i < 48 or i >= 56:
            reserved |= load_u8(place + i)
    if palette != 1 or reserved != 0:
        return _RESERVED
    for tile in range(8):
        rows, row_bytes = load_u8(place + 48 + tile), load_u16(place + 16 + 2 * tile)
        if rows > 16 or row_bytes > 64 or (rows == 0) != (row_bytes == 0):
            return _SHAPE
    if load_u8(place + 1) != 0:
        return _START_ROW
    for i in range(64):
        store_i8(me + _CONFIG + i, load_u8(place + i))
    return 0


@njit
def _unusable(me, tile):
    if load_u8(me + _CONFIG) == 0:
        return _NOT_CONFIGURED
    if _rows(me, tile) == 0 or _row_bytes(me, tile) % 4 != 0:
        return _EMPTY
    return 0


@njit
def _multiplied(me, c, a, b):
    """TDPBF16PS: the products of first and of second values of pairs are summed apart."""
    wrong = _unusable(me, a) + _unusable(me, b)
    if wrong:
        return wrong
    if c in (a, b) or a == b:
        return _SAME
    rows, columns, pairs = _rows(me, c), _row_bytes(me, c) // 4, _rows(me, b)
    if _rows(me, a) != rows or _row_bytes(me, a) != 4 * pairs or _row_bytes(me, b) != 4 * columns:
        return _NO_FIT
    sums = me + _SUMS
    for m in range(rows):
        for i in range(2 * columns):
            store_f32(sums + 4 * i, np.float32(0))
        for k in range(pairs):
            for i in range(2 * columns):
                x = _bfloat16(_row(me, a, m) + 4 * k + 2 * (i & 1))
                w = _bfloat16(_row(me, b, k) + 2 * i)
                store_f32(sums + 4 * i, _fused(x, w, load_f32(sums + 4 * i)))
        for n in range(columns):
            at = _row(me, c, m) + 4 * n
            both = _flushed(load_f32(sums + 8 * n) + load_f32(sums + 8 * n + 4))
            store_f32(at, _flushed(_flushed(load_f32(at)) + both))
        _cleared(_row(me, c, m) + 4 * columns, 64 - 4 * columns)
    _cleared(_row(me, c, rows), 64 * (16 - rows))
    return 0


@njit
def _bfloat16(at):
    return _flushed(np.uint32(np.uint32(load_u16(at)) << np.uint32(16)).view(np.float32))


@njit
def _flushed(value):
    """Denormals as zeros of the same sign."""
    return np.copysign(np.float32(0), value) if abs(value) < _TINY else value


@njit
def _fused(x, w, total):
    """x w + total with one rounding, for bfloat16 factors.

    Their product has 16 digits: where its exponent is one of float32, it is exact there, and the
    sum is rounded once. Elsewhere the sum is rounded to odd in float64, and then to float32.
    """
    product = np.float64(x) * np.float64(w)
    if product == 0 or 2.0**-126 <= abs(product) < 2.0**127:
        return _flushed(np.float32(product) + total)
    whole = product + np.float64(total)
    part = whole - product
    rest = (product - (whole - part)) + (np.float64(total) - part)
    if rest != 0 and np.float64(whole).view(np.int64) & 1 == 0:
        whole = np.nextafter(whole, np.copysign(np.inf, rest))
    return _flushed(np.float32(whole))

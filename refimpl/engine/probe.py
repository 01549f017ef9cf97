"""How fast this machine reads memory: what the engine's decode speed is judged against.

Every thread reads its share of an array much larger than the caches as four streams with 512-bit
loads and software prefetch, the fastest of the patterns tried on x86 servers.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.jit import cfunc
from refimpl.engine.loads import load, load_i64, prefetch, store_i64
from refimpl.engine.memory import address, require_memory, zeroed
from refimpl.engine.simd import Simd, choose_simd
from refimpl.engine.sync import barrier
from refimpl.engine.threads import Team
from refimpl.engine.vec import I32x16, reduce_add, zeros

_STREAMS = 4
_AHEAD = 4096
_FIELDS = 4  # address, bytes of a thread, address of the barrier, its target


@cache
def _reader(simd: Simd) -> Any:
    """The compiled function (record, thread); the sum of what was read goes into the record."""

    @cfunc(types.void(types.int64, types.int64), cache=True, error_model="numpy")
    def read(record, thread):
        simd  # noqa: B018  # part of the cache key
        share = load_i64(record + 8)
        at = load_i64(record) + thread * share
        quarter = share // 4
        a = b = c = d = zeros(I32x16)
        for i in range(0, quarter, 64):
            prefetch(at + i + _AHEAD)
            prefetch(at + quarter + i + _AHEAD)
            prefetch(at + 2 * quarter + i + _AHEAD)
            prefetch(at + 3 * quarter + i + _AHEAD)
            a = a + load(I32x16, at + i)
            b = b + load(I32x16, at + quarter + i)
            c = c + load(I32x16, at + 2 * quarter + i)
            d = d + load(I32x16, at + 3 * quarter + i)
        store_i64(record + 8 * (_FIELDS + thread), np.int64(reduce_add(a + b + c + d)))
        barrier(load_i64(record + 16), load_i64(record + 24))

    return read


def read_bandwidth(
    team: Team, size_bytes: int = 1 << 30, repetitions: int = 5
) -> tuple[float, ...]:
    """Bytes per second that the team's threads read from memory together, one per repetition.

    Args:
        size_bytes: the array to read; should be many times the last-level cache.

    Raises:
        InputError: there is no room for the array.
    """
    require_memory(size_bytes, "the bandwidth probe", "free memory")
    unit = 64 * _STREAMS
    share = size_bytes // team.size // unit * unit
    data = zeroed(share * team.size)
    data[:] = 1  # untouched pages would all be one page of zeros
    counter = zeroed(64)
    record = np.zeros(_FIELDS + team.size, dtype=np.int64)
    record[:3] = address(data), share, address(counter)
    function = _reader(choose_simd()).ctypes
    speeds = []
    for i in range(repetitions + 1):
        record[3] = team.size * (i + 1)
        began = time.perf_counter()
        team.run(function, address(record))
        speeds.append(share * team.size / (time.perf_counter() - began))
    team.settle()  # before data and counter are freed
    return tuple(speeds[1:])  # the first one wakes the threads and fills the page tables

"""How fast this machine computes and how long its threads wait: the engine's own kernels, timed.

Arithmetic is timed on weights and activations that stay in each core's own cache, so that the
figure is what a large prompt can reach; memory is `refimpl.engine.probe`'s part.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.activations import form_bytes
from refimpl.engine.formats import FORMATS
from refimpl.engine.jit import cfunc
from refimpl.engine.kernels import kernel
from refimpl.engine.loads import load_i64
from refimpl.engine.memory import address, zeroed
from refimpl.engine.simd import Simd, choose_simd
from refimpl.engine.sync import barrier, call_address
from refimpl.engine.threads import Team
from refimpl.engine.tiles import tiling
from refimpl.engine.tiles_codes import TILE_ROWS

KERNEL_DTYPES = ("int8", "bf16")
_COLUMNS = 4096  # the published model's hidden size
_ROWS = 32  # of 16-bit weights: 256 KB
_LONGEST_CALL = 13  # arguments
_SAMPLE_S = 0.05
_BARRIERS = 2000
_SIGNATURE = types.void(types.int64, types.int64)


@cache
def _repeating(simd: Simd, tiled: bool) -> Any:
    """The compiled function (record, thread): calls another one again and again, then waits."""

    @cfunc(_SIGNATURE, cache=True, error_model="numpy")
    def repeat(record, thread):
        simd  # noqa: B018  # part of the cache key
        function, times = load_i64(record), load_i64(record + 8)
        a = load_i64(record + 32) + thread * 8 * _LONGEST_CALL
        for _ in range(times):
            if tiled:
                call_address(function, (
                    load_i64(a), load_i64(a + 8), load_i64(a + 16), load_i64(a + 24),
                    load_i64(a + 32), load_i64(a + 40), load_i64(a + 48), load_i64(a + 56),
                    load_i64(a + 64), load_i64(a + 72), load_i64(a + 80)))  # fmt: skip
            else:
                call_address(function, (
                    load_i64(a), load_i64(a + 8), load_i64(a + 16), load_i64(a + 24),
                    load_i64(a + 32), load_i64(a + 40), load_i64(a + 48), load_i64(a + 56),
                    load_i64(a + 64), load_i64(a + 72), load_i64(a + 80),
                    load_i64(a + 88), load_i64(a + 96)))  # fmt: skip
        barrier(load_i64(record + 16), load_i64(record + 24))

    return repeat


@cache
def _waiting(simd: Simd) -> Any:
    """The compiled function (record, thread): nothing but barriers."""

    @cfunc(_SIGNATURE, cache=True, error_model="numpy")
    def wait(record, thread):
        simd  # noqa: B018  # part of the cache key
        counter, target, size = load_i64(record), load_i64(record + 8), load_i64(record + 24)
        for _ in range(load_i64(record + 16)):
            target += size
            barrier(counter, target)

    return wait


@dataclass(frozen=True)
class _Call:
    """A kernel with memory of its own for one thread.

    Attributes:
        arguments: at most 13.
        operations: multiplications and additions of a call.
        memory: what the arguments point into.
    """

    function: int
    arguments: tuple[int, ...]
    operations: int
    memory: tuple[Any, ...]


def _tile_call(simd: Simd) -> _Call:
    """16 unpacked rows of 4-bit weights times eight rows of int8 activations."""
    made = tiling(simd, "Q4_0", exact=False)
    row, tokens, columns = form_bytes(made.form, _COLUMNS), made.tokens, min(_COLUMNS, made.columns)
    tile = zeroed(made.tile_bytes(columns))
    x, y = zeroed(row * tokens), zeroed(4 * TILE_ROWS * tokens)
    blobs = np.array([address(x) + i * row for i in range(tokens)], dtype=np.int64)
    arguments = (address(tile), len(tile), 1, 0, columns, columns, address(blobs), tokens, 0,
                 address(y), 4 * TILE_ROWS)  # fmt: skip
    operations = 2 * TILE_ROWS * columns * tokens
    return _Call(made.multiply.address, arguments, operations, (tile, x, y, blobs))


def _rows_call(simd: Simd, name: str) -> _Call:
    """Rows of stored weights times four rows of activations."""
    fmt = FORMATS[name]
    row_bytes = _COLUMNS // fmt.block_values * fmt.block_bytes
    weights, x, y = zeroed(row_bytes * _ROWS), zeroed(4 * 4 * _COLUMNS), zeroed(4 * 4 * _ROWS)
    xs = [address(x) + 4 * _COLUMNS * i for i in range(4)]
    ys = [address(y) + 4 * _ROWS * i for i in range(4)]
    arguments = (address(weights), row_bytes, _ROWS, _COLUMNS, *xs, *ys, 0)
    function = kernel(simd, name, 4, exact=False).address
    return _Call(function, arguments, 2 * _ROWS * _COLUMNS * 4, (weights, x, y))


def kernel_throughput(team: Team, dtype: str, repetitions: int = 10) -> tuple[float, ...] | None:
    """Operations per second of all threads in the engine's matrix kernels, one per repetition.

    Args:
        dtype: 'int8' (quantised weights times int8 activations) or 'bf16' (such weights, computed
            in float32).

    Returns:
        None where this instruction set has no such kernel.
    """
    simd = choose_simd()
    if dtype == "int8" and not simd.integer:
        return None
    tiled = dtype == "int8" and simd.name == "avx512"
    name = "Q8_0" if dtype == "int8" else "BF16"
    calls = [_tile_call(simd) if tiled else _rows_call(simd, name) for _ in range(team.size)]
    table = np.zeros((team.size, _LONGEST_CALL), dtype=np.int64)
    for row, call in zip(table, calls, strict=True):
        row[: len(call.arguments)] = call.arguments
    counter = zeroed(64)
    record = np.zeros(5, dtype=np.int64)
    record[0], record[2], record[4] = calls[0].function, address(counter), address(table)
    function, target, times = _repeating(simd, tiled).ctypes, 0, 8
    speeds: list[float] = []
    while len(speeds) < repetitions:
        target += team.size
        record[1], record[3] = times, target
        began = time.perf_counter()
        team.run(function, address(record))
        seconds = time.perf_counter() - began
        if seconds < _SAMPLE_S / 2:  # too short to be timed well
            times *= 2
        else:
            speeds.append(calls[0].operations * times * team.size / seconds)
    team.settle()  # before the counter is freed
    return tuple(speeds)


def waiting_times(team: Team, repetitions: int = 20) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds to start all threads and join them (launch), and of one barrier between them."""
    counter = zeroed(64)
    record = np.array([address(counter), 0, 1, team.size], dtype=np.int64)
    function = _waiting(choose_simd()).ctypes

    def run(barriers: int) -> float:
        record[1], record[2] = int(counter[:8].view(np.int64)[0]), barriers
        began = time.perf_counter()
        team.run(function, address(record))
        return time.perf_counter() - began

    run(1)
    launches = tuple(run(1) for _ in range(repetitions))
    waits = tuple(run(_BARRIERS) / _BARRIERS for _ in range(repetitions))
    team.settle()  # before the counter is freed
    return launches, waits

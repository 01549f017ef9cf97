"""How threads share the work of a step: phases, units, products with many blobs.

A step is a sequence of phases. In each, the units of work lie in a row, and every thread begins
with a stretch of its own, so that it reads weights from one end to the other; when its stretch is
done, it takes units from the others'. `wait` ends the phase. Every thread passes through the same
phases in the same order; what it needs to remember lies at the start of its scratch memory. Which
thread computes a unit has no influence on the result.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Matrix, Step, field
from refimpl.engine.jit import njit
from refimpl.engine.loads import load_i64, store_i64
from refimpl.engine.maths import add_rows, swiglu
from refimpl.engine.sync import barrier, call_address, fetch_add, wait_until
from refimpl.engine.tiles import MANY
from refimpl.engine.tiles_codes import TILE_ROWS
from refimpl.engine.vec import device

MAX_CHUNK = 256
"""Most rows of one unit."""
CLAIM_BYTES = 64
"""Of one thread's counter; a phase has one for each thread."""


class Mine(IntEnum):
    """A thread's own record, at the start of its scratch memory."""

    CLAIM = 0
    BARRIER = 1
    THREAD = 2
    VICTIM = 3  # whose units are taken: this many threads further on
    AFTER = 4  # weights to be read after the next products, or 0: those behind theirs


UNUSED_Y = 64
SCRATCH_HEADER = UNUSED_Y + 4 * MAX_CHUNK
"""Where a thread's scratch memory is free for what `Step` gives offsets of."""


@njit(forceinline=True)
def scratch_of(step: Any, thread: Any) -> Any:
    """A thread's scratch memory."""
    return field(step, Step.SCRATCH) + thread * field(step, Step.SCRATCH_BYTES)


@njit(forceinline=True)
def begin(mine: Any, thread: Any) -> None:
    """Start a step."""
    _set(mine, Mine.CLAIM, 0)
    _set(mine, Mine.BARRIER, 0)
    _set(mine, Mine.THREAD, thread)


@njit(forceinline=True)
def _set(mine, number, value):
    store_i64(mine + 8 * np.int64(number), value)


@njit(forceinline=True)
def claims(step: Any, mine: Any) -> Any:
    """The counters of the next set of units."""
    number = field(mine, Mine.CLAIM)
    _set(mine, Mine.CLAIM, number + 1)
    _set(mine, Mine.VICTIM, 0)
    return field(step, Step.CLAIMS) + number * field(step, Step.THREADS) * CLAIM_BYTES


@device(types.int64)
def claim(step, counters, total, mine):
    """The next of `total` units that nobody has taken, or `total` if there is none."""
    threads, me = field(step, Step.THREADS), field(mine, Mine.THREAD)
    for ahead in range(field(mine, Mine.VICTIM), threads):
        owner = (me + ahead) % threads
        first, stop = owner * total // threads, (owner + 1) * total // threads
        unit = first + fetch_add(counters + owner * CLAIM_BYTES, np.int64(1))
        if unit < stop:
            return unit
        _set(mine, Mine.VICTIM, ahead + 1)
    return total


@device(types.int64)
def following(step, unit, total, mine):
    """The unit that this thread will probably take after `unit`, or -1 if there is none."""
    threads, me = field(step, Step.THREADS), field(mine, Mine.THREAD)
    owner = (me + field(mine, Mine.VICTIM)) % threads
    return unit + 1 if unit + 1 < (owner + 1) * total // threads else np.int64(-1)


@njit(forceinline=True)
def read_after(mine: Any, address: Any) -> None:
    """Say where the weights lie that will be read after those of the next products; 0: behind."""
    _set(mine, Mine.AFTER, address)


@device(types.void)
def wait(step, mine):
    """End a phase: return when every thread has come here."""
    threads = field(step, Step.THREADS)
    if threads > 1:
        number = field(mine, Mine.BARRIER) + 1
        _set(mine, Mine.BARRIER, number)
        barrier(field(step, Step.BARRIER), field(step, Step.BARRIER_BASE) + threads * number)


@njit(forceinline=True)
def prepare_row(step: Any, row: Any, columns: Any, plan: Any, mine: Any) -> None:
    """Add a blob's int8 forms; those for tiles only if there are many rows."""
    many = np.int64(field(step, Step.ROWS) >= MANY)
    if load_i64(plan + 8 * many) > 0:
        free = mine + field(step, Step.FREE)
        call_address(field(step, Step.PREPARE), (row, columns, plan, many, free))


@njit(forceinline=True)
def unit_rows(step: Any, matrix: Any) -> Any:
    """Rows of one unit of a matrix."""
    if field(step, Step.ROWS) >= MANY:
        return field(matrix, Matrix.TILE_UNIT)
    return field(matrix, Matrix.CHUNK)


@device(types.int64)
def first_weights(step, matrix, mine):
    """Where this thread begins to read a matrix; 0 if there is none."""
    if matrix == 0:
        return np.int64(0)
    chunk, threads = unit_rows(step, matrix), field(step, Step.THREADS)
    units = (field(matrix, Matrix.ROWS) + chunk - 1) // chunk
    first = field(mine, Mine.THREAD) * units // threads * chunk
    return field(matrix, Matrix.ADDRESS) + first * field(matrix, Matrix.ROW_BYTES)


@njit(forceinline=True)
def set_blob(step: Any, mine: Any, i: Any, address: Any) -> None:
    """The i-th blob of the products to come."""
    store_i64(mine + field(step, Step.BLOBS) + 8 * i, address)


@njit(forceinline=True)
def set_blobs(step: Any, mine: Any, x: Any, x_bytes: Any, count: Any) -> None:
    """`count` consecutive blobs for the products to come."""
    for i in range(count):
        set_blob(step, mine, i, x + i * x_bytes)


@device(types.void)
def products(step, matrix, weights, rows, count, y, y_bytes, mine):
    """y_i[0..rows) = weights x_i for the first `count` blobs that were set; y_bytes is the way from
    one y to the next."""
    if count >= MANY:
        whole = rows // TILE_ROWS * TILE_ROWS
        _tiled(step, matrix, weights, whole, count, y, y_bytes, mine)
        weights += whole * field(matrix, Matrix.ROW_BYTES)
        y += 4 * whole
        rows -= whole
    if rows > 0:
        _in_place(step, matrix, weights, rows, count, y, y_bytes, mine)


@device(types.void)
def _in_place(step, matrix, weights, rows, count, y, y_bytes, mine):
    """Products four blobs at a time, each with the bits it has alone."""
    blobs, offset = mine + field(step, Step.BLOBS), field(matrix, Matrix.FORM_OFFSET)
    row_bytes, columns = field(matrix, Matrix.ROW_BYTES), field(matrix, Matrix.COLUMNS)
    for i in range(0, count, 4):
        n = min(4, count - i)
        kernel = field(matrix, Matrix.KERNEL_4)
        if n == 1:
            kernel = field(matrix, Matrix.KERNEL_1)
        elif n == 2:
            kernel = field(matrix, Matrix.KERNEL_2)
        x0, x1 = load_i64(blobs + 8 * i), load_i64(blobs + 8 * (i + min(1, n - 1)))
        x2 = load_i64(blobs + 8 * (i + min(2, n - 1)))
        x3 = load_i64(blobs + 8 * (i + min(3, n - 1)))
        y0 = y + i * y_bytes
        y3 = y0 + 3 * y_bytes if n == 4 else mine + UNUSED_Y
        call_address(kernel, (weights, row_bytes, rows, columns, x0 + offset, x1 + offset,
                              x2 + offset, x3 + offset, y0, y0 + y_bytes, y0 + 2 * y_bytes,
                              y3, field(mine, Mine.AFTER)))  # fmt: skip


@device(types.void)
def _tiled(step, matrix, weights, rows, count, y, y_bytes, mine):
    """Products by way of unpacked weights, the rows of a unit at a time, and no more columns than
    tiles are made for."""
    row_bytes, columns = field(matrix, Matrix.ROW_BYTES), field(matrix, Matrix.COLUMNS)
    most, unit = field(matrix, Matrix.TILE_COLUMNS), field(matrix, Matrix.TILE_UNIT)
    tiles, tile_bytes = mine + field(step, Step.TILES), field(matrix, Matrix.TILE_BYTES)
    for row in range(0, rows, unit):
        number = min(rows - row, unit) // TILE_ROWS
        for first in range(0, columns, most):
            part = min(most, columns - first)
            w = weights + row * row_bytes + first * row_bytes // columns
            for tile in range(number):
                at = w + tile * TILE_ROWS * row_bytes
                unpack = field(matrix, Matrix.UNPACK)
                call_address(unpack, (at, row_bytes, part, tiles + tile * tile_bytes))
            place = (tiles, tile_bytes, number, first, part)
            _multiplied(step, matrix, place, count, y + 4 * row, y_bytes, mine)


@device(types.void)
def _multiplied(step, matrix, place, count, y, y_bytes, mine):
    """Products of unpacked tiles (address, bytes of one, number, first column, columns) with all
    blobs."""
    tiles, tile_bytes, number, first, part = place
    blobs, total = mine + field(step, Step.BLOBS), field(matrix, Matrix.COLUMNS)
    multiply, offset = field(matrix, Matrix.MULTIPLY), field(matrix, Matrix.TILE_FORM_OFFSET)
    tokens = field(matrix, Matrix.TILE_TOKENS)
    for i in range(0, count, tokens):
        n = min(tokens, count - i)
        call_address(multiply, (tiles, tile_bytes, number, first, part, total, blobs + 8 * i, n,
                                offset, y + i * y_bytes, y_bytes))  # fmt: skip


@device(types.void)
def matrix_phase(step, mine, matrix, x, x_bytes, count, y, y_bytes, then):
    """All rows of a matrix times `count` blobs; no barrier at the end. `then` is the matrix that is
    read next, or 0."""
    rows, chunk = field(matrix, Matrix.ROWS), unit_rows(step, matrix)
    counters, units = claims(step, mine), (rows + chunk - 1) // chunk
    set_blobs(step, mine, x, x_bytes, count)
    while True:
        unit = claim(step, counters, units, mine)
        if unit >= units:
            return
        first = unit * chunk
        w = field(matrix, Matrix.ADDRESS) + first * field(matrix, Matrix.ROW_BYTES)
        last = following(step, unit, units, mine) < 0
        read_after(mine, first_weights(step, then, mine) if last else 0)
        products(step, matrix, w, min(chunk, rows - first), count, y + 4 * first, y_bytes, mine)


@device(types.void)
def adding_phase(step, mine, matrix, x, x_bytes, count, h, h_bytes, then):
    """h += matrix x for `count` blobs; no barrier at the end. `then` as above."""
    rows, chunk = field(matrix, Matrix.ROWS), unit_rows(step, matrix)
    counters, units = claims(step, mine), (rows + chunk - 1) // chunk
    set_blobs(step, mine, x, x_bytes, count)
    y = mine + field(step, Step.FIRST_Y)
    while True:
        unit = claim(step, counters, units, mine)
        if unit >= units:
            return
        first = unit * chunk
        n = min(chunk, rows - first)
        w = field(matrix, Matrix.ADDRESS) + first * field(matrix, Matrix.ROW_BYTES)
        last = following(step, unit, units, mine) < 0
        read_after(mine, first_weights(step, then, mine) if last else 0)
        products(step, matrix, w, n, count, y, 4 * chunk, mine)
        for i in range(count):
            add_rows(h + i * h_bytes + 4 * first, y + i * 4 * chunk, n)


@device(types.int64)
def expert_weights(matrix, expert):
    """Where a matrix of a stack lies; of a stack that is not all in memory, as soon as it has been
    read (see `refimpl.engine.residency`)."""
    places = field(matrix, Matrix.PLACES)
    if places == 0:
        return field(matrix, Matrix.ADDRESS) + expert * field(matrix, Matrix.EXPERT_BYTES)
    wait_until(places + 8 * expert, 1)
    return load_i64(places + 8 * expert)


@device(types.int64)
def expert_place(matrix, expert):
    """Where a matrix of a stack lies, or 0 as long as it has not been read."""
    places = field(matrix, Matrix.PLACES)
    if places == 0:
        return field(matrix, Matrix.ADDRESS) + expert * field(matrix, Matrix.EXPERT_BYTES)
    return load_i64(places + 8 * expert)


@device(types.void)
def gate_and_up(step, gate, up, expert, first, rows, count, mine, after):
    """Products of rows first..first+rows of an expert's two matrices with the blobs that were set,
    `rows` apart in the two lots of scratch; `after`: see `read_after`."""
    g = expert_weights(gate, expert) + first * field(gate, Matrix.ROW_BYTES)
    u = expert_weights(up, expert) + first * field(up, Matrix.ROW_BYTES)
    read_after(mine, u)
    products(step, gate, g, rows, count, mine + field(step, Step.FIRST_Y), 4 * rows, mine)
    read_after(mine, after)
    products(step, up, u, rows, count, mine + field(step, Step.SECOND_Y), 4 * rows, mine)


@device(types.void)
def swiglu_row(step, i, rows, limit, to, mine):
    """The SwiGLU product of the i-th of the rows that `gate_and_up` has left."""
    at = i * 4 * rows
    first, second = mine + field(step, Step.FIRST_Y) + at, mine + field(step, Step.SECOND_Y) + at
    swiglu(first, second, rows, limit, to)


@device(types.void)
def swiglu_phase(step, mine, gate, up, x, x_bytes, count, y, y_bytes, limit):
    """SwiGLU products of `count` consecutive blobs; no barrier at the end."""
    width, chunk = field(gate, Matrix.ROWS), unit_rows(step, gate)
    counters, units = claims(step, mine), (width + chunk - 1) // chunk
    set_blobs(step, mine, x, x_bytes, count)
    while True:
        unit = claim(step, counters, units, mine)
        if unit >= units:
            return
        first = unit * chunk
        rows = min(chunk, width - first)
        after, follower = np.int64(0), following(step, unit, units, mine)
        if follower >= 0:
            after = expert_place(gate, 0) + follower * chunk * field(gate, Matrix.ROW_BYTES)
        gate_and_up(step, gate, up, 0, first, rows, count, mine, after)
        for i in range(count):
            swiglu_row(step, i, rows, limit, y + i * y_bytes + 4 * first, mine)


@device(types.void)
def prepare_phase(step, mine, x, x_bytes, count, columns, plan):
    """Add the int8 forms to `count` blobs; no barrier at the end."""
    counters = claims(step, mine)
    if load_i64(plan + 8) == 0:
        return
    while True:
        t = claim(step, counters, count, mine)
        if t >= count:
            return
        prepare_row(step, x + t * x_bytes, columns, plan, mine)

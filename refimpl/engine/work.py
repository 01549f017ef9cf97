"""How threads share the work of a step: phases, units, products of a few rows.

A step is a sequence of phases. In each, threads claim units from the phase's counter until none
is left; `wait` ends it. Every thread passes through the same phases in the same order; what it
needs to remember lies at the start of its scratch memory. Which thread computes a unit has no
influence on the result.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Matrix, Step, field
from refimpl.engine.jit import njit
from refimpl.engine.maths import add_rows, swiglu
from refimpl.engine.sync import barrier, call_address, fetch_add
from refimpl.engine.vec import device, load_i64, store_i64

MAX_CHUNK = 256
"""Most rows of one unit."""
CLAIM_BYTES = 64
_Y_BYTES = 4 * 4 * MAX_CHUNK


class Mine(IntEnum):
    """A thread's own record, at the start of its scratch memory."""

    CLAIM = 0
    BARRIER = 1


FIRST_Y, SECOND_Y = 64, 64 + _Y_BYTES
UNUSED_Y = 64 + 2 * _Y_BYTES
FREE = UNUSED_Y + 4 * MAX_CHUNK
"""Where a thread's scratch memory is free for other uses."""


@njit(forceinline=True)
def scratch_of(step: Any, thread: Any) -> Any:
    """A thread's scratch memory."""
    return field(step, Step.SCRATCH) + thread * field(step, Step.SCRATCH_BYTES)


@njit(forceinline=True)
def begin(mine: Any) -> None:
    """Start a step."""
    store_i64(mine, 0)
    store_i64(mine + 8, 0)


@njit(forceinline=True)
def claims(step: Any, mine: Any) -> Any:
    """The counter of the next set of units."""
    number = load_i64(mine)
    store_i64(mine, number + 1)
    return field(step, Step.CLAIMS) + number * CLAIM_BYTES


@njit(forceinline=True)
def claim(counter: Any) -> Any:
    """The next unit that nobody has taken."""
    return fetch_add(counter, np.int64(1))


@device(types.void)
def wait(step, mine):
    """End a phase: return when every thread has come here."""
    threads = field(step, Step.THREADS)
    if threads > 1:
        number = load_i64(mine + 8) + 1
        store_i64(mine + 8, number)
        barrier(field(step, Step.BARRIER), field(step, Step.BARRIER_BASE) + threads * number)


@njit(forceinline=True)
def prepare_row(step: Any, row: Any, columns: Any, plan: Any, mine: Any) -> None:
    """Add a blob's int8 forms."""
    if load_i64(plan) > 0:
        call_address(field(step, Step.PREPARE), (row, columns, plan, mine + FREE))


@device(types.void)
def product(matrix, weights, rows, count, x0, x1, x2, x3, y, y_bytes, unused):
    """y_m[0..rows) = weights x_m for m < count <= 4; x are blobs, y_bytes the way to the next y."""
    offset = field(matrix, Matrix.FORM_OFFSET)
    kernel = field(matrix, Matrix.KERNEL_4)
    if count == 1:
        kernel = field(matrix, Matrix.KERNEL_1)
    elif count == 2:
        kernel = field(matrix, Matrix.KERNEL_2)
    y3 = y + 3 * y_bytes if count == 4 else unused
    call_address(
        kernel,
        (
            weights,
            field(matrix, Matrix.ROW_BYTES),
            rows,
            field(matrix, Matrix.COLUMNS),
            x0 + offset,
            x1 + offset,
            x2 + offset,
            x3 + offset,
            y,
            y + y_bytes,
            y + 2 * y_bytes,
            y3,
        ),
    )


@device(types.void)
def product_rows(matrix, first, rows, x, x_bytes, count, y, y_bytes, mine):
    """Rows first..first+rows of a matrix times `count` consecutive blobs, four at a time."""
    weights = field(matrix, Matrix.ADDRESS) + first * field(matrix, Matrix.ROW_BYTES)
    for t in range(0, count, 4):
        n = min(4, count - t)
        at = x + t * x_bytes
        product(matrix, weights, rows, n, at, at + min(1, n - 1) * x_bytes,
                at + min(2, n - 1) * x_bytes, at + min(3, n - 1) * x_bytes,
                y + t * y_bytes, y_bytes, mine + UNUSED_Y)  # fmt: skip


@device(types.void)
def matrix_phase(step, mine, matrix, x, x_bytes, count, y, y_bytes):
    """All rows of a matrix times `count` blobs; no barrier at the end."""
    counter = claims(step, mine)
    rows, chunk = field(matrix, Matrix.ROWS), field(matrix, Matrix.CHUNK)
    while True:
        first = claim(counter) * chunk
        if first >= rows:
            return
        n = min(chunk, rows - first)
        product_rows(matrix, first, n, x, x_bytes, count, y + 4 * first, y_bytes, mine)


@device(types.void)
def adding_phase(step, mine, matrix, x, x_bytes, count, h, h_bytes):
    """h += matrix x for `count` blobs; no barrier at the end."""
    counter = claims(step, mine)
    rows, chunk = field(matrix, Matrix.ROWS), field(matrix, Matrix.CHUNK)
    while True:
        first = claim(counter) * chunk
        if first >= rows:
            return
        n = min(chunk, rows - first)
        for t in range(0, count, 4):
            m = min(4, count - t)
            product_rows(matrix, first, n, x + t * x_bytes, x_bytes, m, mine + FIRST_Y,
                         4 * MAX_CHUNK, mine)  # fmt: skip
            for i in range(m):
                to = h + (t + i) * h_bytes + 4 * first
                add_rows(to, mine + FIRST_Y + i * 4 * MAX_CHUNK, n)


@device(types.void)
def swiglu_rows(gate, up, gate_weights, up_weights, first, rows, count, x0, x1, x2, x3,
                y0, y1, y2, y3, limit, mine):  # fmt: skip
    """Rows first..first+rows of the SwiGLU products of up to four blobs, put at y_m + 4 first."""
    g = gate_weights + first * field(gate, Matrix.ROW_BYTES)
    u = up_weights + first * field(up, Matrix.ROW_BYTES)
    size = 4 * MAX_CHUNK
    product(gate, g, rows, count, x0, x1, x2, x3, mine + FIRST_Y, size, mine + UNUSED_Y)
    product(up, u, rows, count, x0, x1, x2, x3, mine + SECOND_Y, size, mine + UNUSED_Y)
    swiglu(mine + FIRST_Y, mine + SECOND_Y, rows, limit, y0 + 4 * first)
    if count > 1:
        swiglu(mine + FIRST_Y + size, mine + SECOND_Y + size, rows, limit, y1 + 4 * first)
    if count > 2:
        swiglu(mine + FIRST_Y + 2 * size, mine + SECOND_Y + 2 * size, rows, limit, y2 + 4 * first)
    if count > 3:
        swiglu(mine + FIRST_Y + 3 * size, mine + SECOND_Y + 3 * size, rows, limit, y3 + 4 * first)


@device(types.void)
def swiglu_phase(step, mine, gate, up, x, x_bytes, count, y, y_bytes, limit):
    """SwiGLU products of `count` consecutive blobs; no barrier at the end."""
    counter = claims(step, mine)
    width, chunk = field(gate, Matrix.ROWS), field(gate, Matrix.CHUNK)
    gate_weights, up_weights = field(gate, Matrix.ADDRESS), field(up, Matrix.ADDRESS)
    while True:
        first = claim(counter) * chunk
        if first >= width:
            return
        rows = min(chunk, width - first)
        for t in range(0, count, 4):
            n = min(4, count - t)
            a, b = x + t * x_bytes, y + t * y_bytes
            swiglu_rows(gate, up, gate_weights, up_weights, first, rows, n,
                        a, a + min(1, n - 1) * x_bytes, a + min(2, n - 1) * x_bytes,
                        a + min(3, n - 1) * x_bytes,
                        b, b + y_bytes, b + 2 * y_bytes, b + 3 * y_bytes,
                        limit, mine)  # fmt: skip


@device(types.void)
def prepare_phase(step, mine, x, x_bytes, count, columns, plan):
    """Add the int8 forms to `count` blobs; no barrier at the end."""
    counter = claims(step, mine)
    if load_i64(plan) == 0:
        return
    while True:
        t = claim(counter)
        if t >= count:
            return
        prepare_row(step, x + t * x_bytes, columns, plan, mine)

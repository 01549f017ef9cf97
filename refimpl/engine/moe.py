"""Routed experts: selection, grouping by expert, and the two products.

A *pair* is a row and one of its k experts: pair t k + s is row t's s-th expert, in ascending
expert order. Each selected expert's matrices are read once per step, whatever the number of rows
that chose it. Outputs are summed in ascending expert order, then the shared expert's is added.

The group table holds int64: how many experts are used, their numbers (E places), where each one's
pairs begin (E + 1 places), and the pairs (T k).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Layer, Matrix, Step, field, float_field
from refimpl.engine.loads import (
    load,
    load_f32,
    load_i64,
    load_u8,
    store,
    store_f32,
    store_i8,
    store_i64,
)
from refimpl.engine.maths import add_rows, add_scaled, fill_zero, vsigmoid
from refimpl.engine.vec import F32x16, device
from refimpl.engine.work import (
    claim,
    claims,
    expert_place,
    expert_weights,
    following,
    gate_and_up,
    products,
    read_after,
    set_blob,
    set_blobs,
    swiglu_row,
    unit_rows,
)

_RENORMALISATION_EPS = np.float32(1e-20)  # as in refimpl.reference.moe


def group_table_bytes(experts: int, pairs: int) -> int:
    """Size of the group table."""
    return 8 * (2 + 2 * experts + pairs)


@device(types.void)
def select(step, layer, t, mine):
    """The experts of row t, ascending, and their weights; ties go to the lower index."""
    experts, k = field(step, Step.EXPERTS), field(step, Step.TOP_K)
    logits = field(step, Step.LOGITS) + t * field(step, Step.LOGITS_BYTES)
    bias = field(layer, Layer.ROUTER_BIAS)
    taken = mine + field(step, Step.FREE)
    for e in range(experts):
        store_i8(taken + e, 0)
    for i in range(0, 4 * experts, 64):  # the rows of logits are padded to 16
        store(logits + i, vsigmoid(load(F32x16, logits + i)))
    for _ in range(k):
        best: Any = np.int64(-1)
        best_score = np.float32(0)
        for e in range(experts):
            if load_u8(taken + e) == 0:
                score = load_f32(logits + 4 * e) + load_f32(bias + 4 * e)
                if best < 0 or score > best_score:
                    best, best_score = e, score
        store_i8(taken + best, 1)
    total = np.float32(0)
    pair = t * k
    chosen, weights = field(step, Step.CHOSEN), field(step, Step.WEIGHTS)
    for e in range(experts):
        if load_u8(taken + e) != 0:
            store_i64(chosen + 8 * pair, e)
            store_f32(weights + 4 * pair, load_f32(logits + 4 * e))
            total += load_f32(logits + 4 * e)
            pair += 1
    scale = float_field(step, Step.ROUTER_SCALE)
    for pair in range(t * k, t * k + k):
        weight = load_f32(weights + 4 * pair) / (total + _RENORMALISATION_EPS)
        store_f32(weights + 4 * pair, weight * scale)


@device(types.void)
def group_by_expert(step):
    """Fill the group table from the selection of all rows."""
    experts = field(step, Step.EXPERTS)
    pairs = field(step, Step.ROWS) * field(step, Step.TOP_K)
    table, chosen = field(step, Step.GROUPS), field(step, Step.CHOSEN)
    numbers, starts = table + 8, table + 8 + 8 * experts
    ordered = starts + 8 * (experts + 1)
    for e in range(experts):
        store_i64(numbers + 8 * e, 0)  # first the count of pairs of each expert
    for pair in range(pairs):
        at = numbers + 8 * load_i64(chosen + 8 * pair)
        store_i64(at, load_i64(at) + 1)
    used = np.int64(0)
    begin = np.int64(0)
    for e in range(experts):  # then, from the front, the numbers of those with any
        count = load_i64(numbers + 8 * e)
        if count > 0:
            store_i64(numbers + 8 * used, e)
            store_i64(starts + 8 * used, begin)
            begin += count
            used += 1
    store_i64(starts + 8 * used, begin)
    store_i64(table, used)
    _place_pairs(pairs, chosen, numbers, starts, ordered, used)


@device(types.void)
def _place_pairs(pairs, chosen, numbers, starts, ordered, used):
    """Put every pair behind those of its expert: advance each start, then set them back."""
    for pair in range(pairs):
        e = load_i64(chosen + 8 * pair)
        low, high = np.int64(0), used - 1
        while low < high:
            middle = (low + high) // 2
            if load_i64(numbers + 8 * middle) < e:
                low = middle + 1
            else:
                high = middle
        at = load_i64(starts + 8 * low)
        store_i64(ordered + 8 * at, pair)
        store_i64(starts + 8 * low, at + 1)
    for i in range(used, 0, -1):
        store_i64(starts + 8 * i, load_i64(starts + 8 * i - 8))
    store_i64(starts, 0)


@device(types.void)
def _set_pairs(step, ordered, start, end, x, x_bytes, per_blob, mine):
    """The blobs of pairs start..end of an expert; a blob serves `per_blob` consecutive pairs."""
    for i in range(start, end):
        blob = load_i64(ordered + 8 * i) // per_blob
        set_blob(step, mine, i - start, x + blob * x_bytes)


@device(types.int64)
def _gate_of_unit(step, gate, unit, per_expert, chunk):
    """Where the gate rows of a unit of `expert_swiglu_phase` lie, or 0."""
    number, order = unit // per_expert, field(step, Step.ORDER)
    if unit < 0:
        return np.int64(0)
    if order:
        number = load_i64(order + 8 * number)
    place = expert_place(gate, load_i64(field(step, Step.GROUPS) + 8 + 8 * number))
    if place == 0:
        return np.int64(0)
    return place + unit % per_expert * chunk * field(gate, Matrix.ROW_BYTES)


@device(types.void)
def expert_swiglu_phase(step, layer, mine):
    """SwiGLU products of all pairs; no barrier at the end."""
    gate, up = field(layer, Layer.GATE), field(layer, Layer.UP)
    experts, k = field(step, Step.EXPERTS), field(step, Step.TOP_K)
    table = field(step, Step.GROUPS)
    starts = table + 8 + 8 * experts
    ordered = starts + 8 * (experts + 1)
    x, x_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    y, y_bytes = field(step, Step.HIDDEN_BLOB), field(step, Step.HIDDEN_BLOB_BYTES)
    width, chunk = field(gate, Matrix.ROWS), unit_rows(step, gate)
    limit = float_field(layer, Layer.LIMIT)
    per_expert = (width + chunk - 1) // chunk
    units = load_i64(table) * per_expert
    order = field(step, Step.ORDER)
    counters = claims(step, mine)
    while True:
        unit = claim(step, counters, units, mine)
        if unit >= units:
            return
        number, first = unit // per_expert, unit % per_expert * chunk
        if order:
            number = load_i64(order + 8 * number)
        rows = min(chunk, width - first)
        start, end = load_i64(starts + 8 * number), load_i64(starts + 8 * number + 8)
        _set_pairs(step, ordered, start, end, x, x_bytes, k, mine)
        expert = load_i64(table + 8 + 8 * number)
        follower = following(step, unit, units, mine)
        after = _gate_of_unit(step, gate, follower, per_expert, chunk)
        gate_and_up(step, gate, up, expert, first, rows, end - start, mine, after)
        for i in range(start, end):
            to = y + load_i64(ordered + 8 * i) * y_bytes + 4 * first
            swiglu_row(step, i - start, rows, limit, to, mine)


@device(types.void)
def expert_down_phase(step, layer, mine):
    """h += sum of weighted expert outputs + shared expert; no barrier at the end."""
    down, shared = field(layer, Layer.DOWN), field(layer, Layer.SHARED_DOWN)
    rows, count = field(down, Matrix.ROWS), field(step, Step.ROWS)
    chunk = unit_rows(step, down)
    units = (rows + chunk - 1) // chunk
    h, routed = field(step, Step.H), field(step, Step.ROUTED)
    h_bytes = 4 * field(step, Step.HIDDEN_SIZE)
    xs, xs_bytes = field(step, Step.SHARED_BLOB), field(step, Step.SHARED_BLOB_BYTES)
    y = mine + field(step, Step.FIRST_Y)
    counters = claims(step, mine)
    while True:
        unit = claim(step, counters, units, mine)
        if unit >= units:
            return
        first = unit * chunk
        n = min(chunk, rows - first)
        for t in range(count):
            fill_zero(routed + t * h_bytes + 4 * first, n)
        w = field(shared, Matrix.ADDRESS) + first * field(shared, Matrix.ROW_BYTES)
        _add_experts(step, down, first, n, mine, w)
        set_blobs(step, mine, xs, xs_bytes, count)
        follower = following(step, unit, units, mine)
        read_after(mine, _down_of_expert(step, down, 0, follower * chunk) if follower >= 0 else 0)
        products(step, shared, w, n, count, y, 4 * n, mine)
        for t in range(count):
            at = t * h_bytes + 4 * first
            add_rows(routed + at, y + t * 4 * n, n)
            add_rows(h + at, routed + at, n)


@device(types.int64)
def _down_of_expert(step, down, number, first):
    """Where row `first` of the `number`-th used expert's down projection lies, or 0."""
    place = expert_place(down, load_i64(field(step, Step.GROUPS) + 8 + 8 * number))
    return place + first * field(down, Matrix.ROW_BYTES) if place else np.int64(0)


@device(types.void)
def _add_experts(step, down, first, n, mine, after):
    """routed += weighted outputs of all pairs, rows first..first+n, experts ascending; `after` is
    what is read after them."""
    experts, k = field(step, Step.EXPERTS), field(step, Step.TOP_K)
    table, weights = field(step, Step.GROUPS), field(step, Step.WEIGHTS)
    starts = table + 8 + 8 * experts
    ordered = starts + 8 * (experts + 1)
    x, x_bytes = field(step, Step.HIDDEN_BLOB), field(step, Step.HIDDEN_BLOB_BYTES)
    routed = field(step, Step.ROUTED) + 4 * first
    h_bytes = 4 * field(step, Step.HIDDEN_SIZE)
    y = mine + field(step, Step.FIRST_Y)
    used = load_i64(table)
    for number in range(used):
        w = expert_weights(down, load_i64(table + 8 + 8 * number))
        w += first * field(down, Matrix.ROW_BYTES)
        start, end = load_i64(starts + 8 * number), load_i64(starts + 8 * number + 8)
        _set_pairs(step, ordered, start, end, x, x_bytes, 1, mine)
        last = number + 1 == used
        read_after(mine, after if last else _down_of_expert(step, down, number + 1, first))
        products(step, down, w, n, end - start, y, 4 * n, mine)
        for i in range(start, end):
            pair = load_i64(ordered + 8 * i)
            weight = load_f32(weights + 4 * pair)
            add_scaled(routed + pair // k * h_bytes, y + (i - start) * 4 * n, weight, n)

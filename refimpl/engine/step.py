"""T rows through the model, whole, in one function without the interpreter's lock.

`runner(simd)` gives the compiled function (step record, thread number) that every thread
calls; it goes through the layers of the record and, where asked for, the MTP input projection
before and the output head after them. Shapes and meanings are in `refimpl.engine.fields`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import (
    ATTENTION_PART,
    FFN_PART,
    Kv,
    Layer,
    Step,
    field,
    float_field,
)
from refimpl.engine.heads import heads_phase
from refimpl.engine.jit import cfunc
from refimpl.engine.loads import load_i64, store_i64
from refimpl.engine.maths import rms_norm, rotate
from refimpl.engine.moe import (
    expert_down_phase,
    expert_swiglu_phase,
    group_by_expert,
    select,
)
from refimpl.engine.simd import Simd
from refimpl.engine.sync import call_address, wait_until
from refimpl.engine.vec import device
from refimpl.engine.work import (
    adding_phase,
    begin,
    claim,
    claims,
    matrix_phase,
    prepare_phase,
    prepare_row,
    scratch_of,
    swiglu_phase,
    wait,
)

SIGNATURE = types.void(types.int64, types.int64)
CLAIMS_PER_LAYER = 24
"""No layer has more sets of units than this."""


@cache
def runner(simd: Simd) -> Any:
    """The compiled step."""

    @cfunc(SIGNATURE, cache=True, error_model="numpy")
    def run(step, thread):
        simd  # noqa: B018  # part of the cache key
        mine = scratch_of(step, thread)
        begin(mine, thread)
        # Read before the last barrier: after it the record may already describe the next step.
        head, parts = field(step, Step.HEAD), field(step, Step.PARTS)
        if field(step, Step.EMBEDDED):
            _mtp_input(step, mine)
        for i in range(field(step, Step.LAYERS)):
            layer = load_i64(field(step, Step.LAYER_TABLE) + 8 * i)
            cache = load_i64(field(step, Step.KV_TABLE) + 8 * i)
            if parts & ATTENTION_PART:
                _attention(step, layer, cache, mine)
            if parts & FFN_PART:
                if field(layer, Layer.IS_MOE):
                    _moe(step, layer, mine, thread)
                else:
                    _dense(step, layer, mine)
        if head:
            _head(step, mine, head)

    return run


@device(types.void)
def _norm_phase(step, mine, x, x_bytes, scale, plan, count):
    """Normed rows and their forms into the blobs, barrier included."""
    size, eps = field(step, Step.HIDDEN_SIZE), float_field(step, Step.EPS)
    blob, blob_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    counters = claims(step, mine)
    while True:
        t = claim(step, counters, count, mine)
        if t >= count:
            break
        rms_norm(x + t * x_bytes, scale, size, eps, blob + t * blob_bytes)
        prepare_row(step, blob + t * blob_bytes, size, plan, mine)
    wait(step, mine)


@device(types.void)
def _mtp_input(step, mine):
    """h = eh_proj [enorm(embedding), hnorm(h)]: embedding half first."""
    size, eps = field(step, Step.HIDDEN_SIZE), float_field(step, Step.EPS)
    blob, blob_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    h, embedded, count = field(step, Step.H), field(step, Step.EMBEDDED), field(step, Step.ROWS)
    counters = claims(step, mine)
    while True:
        t = claim(step, counters, count, mine)
        if t >= count:
            break
        row = blob + t * blob_bytes
        rms_norm(embedded + 4 * t * size, field(step, Step.ENORM), size, eps, row)
        rms_norm(h + 4 * t * size, field(step, Step.HNORM), size, eps, row + 4 * size)
        prepare_row(step, row, 2 * size, field(step, Step.EH_PLAN), mine)
    wait(step, mine)
    matrix_phase(step, mine, field(step, Step.EH), blob, blob_bytes, count, h, 4 * size, 0)
    wait(step, mine)


@device(types.void)
def _attention(step, layer, cache, mine):
    """h += attention(norm(h))."""
    h, h_bytes = field(step, Step.H), 4 * field(step, Step.HIDDEN_SIZE)
    count = field(step, Step.ROWS)
    scale, plan = field(layer, Layer.INPUT_NORM), field(layer, Layer.INPUT_PLAN)
    _norm_phase(step, mine, h, h_bytes, scale, plan, count)
    _projections(step, layer, mine, count)
    wait(step, mine)
    _positions(step, layer, cache, mine, count)
    wait(step, mine)
    heads_phase(step, layer, cache, mine, count)
    wait(step, mine)
    blob, blob_bytes = field(step, Step.HEADS_BLOB), field(step, Step.HEADS_BLOB_BYTES)
    columns = field(layer, Layer.HEADS) * field(layer, Layer.LANES)
    prepare_phase(step, mine, blob, blob_bytes, count, columns, field(layer, Layer.OUTPUT_PLAN))
    wait(step, mine)
    then = field(layer, Layer.ROUTER) if field(layer, Layer.IS_MOE) else field(layer, Layer.GATE)
    adding_phase(step, mine, field(layer, Layer.O), blob, blob_bytes, count, h, h_bytes, then)
    wait(step, mine)


@device(types.void)
def _projections(step, layer, mine, count):
    """Queries, keys, values and gates."""
    x, x_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    kv_bytes = field(step, Step.KV_BYTES)
    matrix_phase(step, mine, field(layer, Layer.Q), x, x_bytes, count,
                 field(step, Step.QUERIES), field(step, Step.QUERY_BYTES),
                 field(layer, Layer.K))  # fmt: skip
    matrix_phase(step, mine, field(layer, Layer.K), x, x_bytes, count,
                 field(step, Step.KEYS), kv_bytes, field(layer, Layer.V))  # fmt: skip
    matrix_phase(step, mine, field(layer, Layer.V), x, x_bytes, count,
                 field(step, Step.VALUES), kv_bytes, field(layer, Layer.G))  # fmt: skip
    matrix_phase(step, mine, field(layer, Layer.G), x, x_bytes, count,
                 field(step, Step.GATES), field(step, Step.GATE_BYTES),
                 field(layer, Layer.O))  # fmt: skip


@device(types.void)
def _positions(step, layer, cache, mine, count):
    """Norm and rotate queries and keys; put keys and values into the cache."""
    lanes, groups = field(layer, Layer.LANES), field(layer, Layer.GROUPS)
    heads = field(layer, Layer.HEADS) // groups
    half, eps = field(layer, Layer.ROTARY_HALF), float_field(step, Step.EPS)
    rope, slots = field(layer, Layer.ROPE), field(cache, Kv.SLOTS)
    cos = load_i64(field(step, Step.COS) + 8 * rope)
    sin = load_i64(field(step, Step.SIN) + 8 * rope)
    counters = claims(step, mine)
    while True:
        unit = claim(step, counters, count * groups, mine)
        if unit >= count * groups:
            return
        t, g = unit // groups, unit % groups
        c, s = cos + 4 * t * half, sin + 4 * t * half
        query = field(step, Step.QUERIES) + t * field(step, Step.QUERY_BYTES)
        for head in range(g * heads, g * heads + heads):
            row = query + 4 * head * lanes
            rms_norm(row, field(layer, Layer.Q_NORM), lanes, eps, row)
            rotate(row, half, c, s)
        at = t * field(step, Step.KV_BYTES) + 4 * g * lanes
        key = field(step, Step.KEYS) + at
        rms_norm(key, field(layer, Layer.K_NORM), lanes, eps, key)
        rotate(key, half, c, s)
        slot = g * slots + (field(step, Step.START) + t) % slots
        value = field(step, Step.VALUES) + at
        call_address(field(step, Step.STORE), (cache, slot, key, value, lanes))


@device(types.void)
def _dense(step, layer, mine):
    """h += down(swiglu(gate(norm(h)), up(norm(h))))."""
    h, h_bytes = field(step, Step.H), 4 * field(step, Step.HIDDEN_SIZE)
    count = field(step, Step.ROWS)
    scale, plan = field(layer, Layer.POST_NORM), field(layer, Layer.FFN_PLAN)
    _norm_phase(step, mine, h, h_bytes, scale, plan, count)
    x, x_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    y, y_bytes = field(step, Step.HIDDEN_BLOB), field(step, Step.HIDDEN_BLOB_BYTES)
    swiglu_phase(step, mine, field(layer, Layer.GATE), field(layer, Layer.UP), x, x_bytes, count,
                 y, y_bytes, float_field(layer, Layer.LIMIT_SHARED))  # fmt: skip
    wait(step, mine)
    width, plan = field(layer, Layer.WIDTH), field(layer, Layer.HIDDEN_PLAN)
    prepare_phase(step, mine, y, y_bytes, count, width, plan)
    wait(step, mine)
    adding_phase(step, mine, field(layer, Layer.DOWN), y, y_bytes, count, h, h_bytes, 0)
    wait(step, mine)


@device(types.void)
def _moe(step, layer, mine, thread):
    """h += routed experts + shared expert; the router takes the float32 row."""
    h, h_bytes = field(step, Step.H), 4 * field(step, Step.HIDDEN_SIZE)
    count, k = field(step, Step.ROWS), field(step, Step.TOP_K)
    scale, plan = field(layer, Layer.POST_NORM), field(layer, Layer.FFN_PLAN)
    _norm_phase(step, mine, h, h_bytes, scale, plan, count)
    x, x_bytes = field(step, Step.BLOB), field(step, Step.BLOB_BYTES)
    matrix_phase(step, mine, field(layer, Layer.ROUTER), x, x_bytes, count,
                 field(step, Step.LOGITS), field(step, Step.LOGITS_BYTES),
                 field(layer, Layer.SHARED_GATE))  # fmt: skip
    shared, shared_bytes = field(step, Step.SHARED_BLOB), field(step, Step.SHARED_BLOB_BYTES)
    swiglu_phase(step, mine, field(layer, Layer.SHARED_GATE), field(layer, Layer.SHARED_UP),
                 x, x_bytes, count, shared, shared_bytes,
                 float_field(layer, Layer.LIMIT_SHARED))  # fmt: skip
    wait(step, mine)
    counters = claims(step, mine)
    while True:
        t = claim(step, counters, count, mine)
        if t >= count:
            break
        select(step, layer, t, mine)
    wait(step, mine)
    if thread == 0:
        group_by_expert(step)
        if field(step, Step.FETCH):
            _fetch(step, layer)
        used = field(layer, Layer.USED) + load_i64(field(step, Step.GROUPS))
        store_i64(layer + 8 * np.int64(Layer.USED), used)
    wait(step, mine)
    expert_swiglu_phase(step, layer, mine)
    wait(step, mine)
    width, plan = field(layer, Layer.WIDTH), field(layer, Layer.HIDDEN_PLAN)
    prepare_phase(step, mine, field(step, Step.HIDDEN_BLOB), field(step, Step.HIDDEN_BLOB_BYTES),
                  count * k, width, plan)  # fmt: skip
    width, plan = field(layer, Layer.SHARED_WIDTH), field(layer, Layer.SHARED_PLAN)
    prepare_phase(step, mine, shared, shared_bytes, count, width, plan)
    wait(step, mine)
    expert_down_phase(step, layer, mine)
    wait(step, mine)


@device(types.void)
def _fetch(step, layer):
    """Have the chosen experts brought into memory; returns when it is known which are missing."""
    fetched = field(step, Step.FETCHED)
    answers = load_i64(fetched)
    call_address(field(step, Step.FETCH), (layer,))
    wait_until(fetched, answers + 1)


@device(types.void)
def _head(step, mine, head):
    """Logits of the rows from HEAD_FIRST on."""
    first = field(step, Step.HEAD_FIRST)
    count, h_bytes = field(step, Step.ROWS) - first, 4 * field(step, Step.HIDDEN_SIZE)
    h = field(step, Step.H) + first * h_bytes
    scale, plan = field(step, Step.FINAL_NORM), field(step, Step.FINAL_PLAN)
    _norm_phase(step, mine, h, h_bytes, scale, plan, count)
    matrix_phase(step, mine, head, field(step, Step.BLOB),
                 field(step, Step.BLOB_BYTES), count, field(step, Step.OUT_LOGITS),
                 field(step, Step.OUT_BYTES), 0)  # fmt: skip
    wait(step, mine)

"""How threads share attention: the softmaxes of splits, merged in a fixed order.

Splits of 512 positions are merged in ascending order within a *stretch* of 1024, and stretches
are merged in ascending order, for every row in the same way.

* A step of few rows is cut along the keys: a unit is one KV head and one stretch, for all rows.
  Whoever completes a KV head's last stretch merges that head's, so that no barrier is needed and
  many threads share a long context even if there are few heads.
* A step of many rows is cut along the rows: a unit is one KV head and some rows, which go through
  each split's keys together, while these are in the thread's cache.
"""

from __future__ import annotations

import numpy as np
from numba import types

from refimpl.config import LayerSpec
from refimpl.engine.attention import SPLIT, STATE, score_bytes
from refimpl.engine.fields import Kv, Layer, Step, field
from refimpl.engine.jit import njit
from refimpl.engine.loads import load, load_f32, store, store_f32, store_i64
from refimpl.engine.maths import copy_rows, exp_one, sigmoid_one
from refimpl.engine.sync import call_address, fetch_add
from refimpl.engine.vec import F32x16, device, fma, splat
from refimpl.engine.work import claim, claims

STRETCH = 1024
"""Positions that one unit of a step of few rows covers."""
CUT_ROWS = 4
"""Most rows of a step that is cut along the keys: those of a verification."""
_ROWS = 16
"""Rows of a unit of a step of many rows."""
_FEWER_ROWS = 4  # of one with fewer than
_MANY = 128  # rows


def attention_scratch(heads: int, lanes: int) -> int:
    """Bytes of a thread's scratch, for a group of `heads` query heads."""
    return score_bytes(heads) + (2 * _ROWS + 1) * state_bytes(heads, lanes)


def state_bytes(heads: int, lanes: int) -> int:
    """Bytes of the states of a group of query heads."""
    return heads * (4 * lanes + STATE)


def partial_bytes(spec: LayerSpec, context: int) -> int:
    """Memory for the states of all heads of a layer over all stretches that rows see."""
    positions = context if spec.window is None else min(context, spec.window + CUT_ROWS)
    stretches = -(-positions // STRETCH) + 1
    return CUT_ROWS * stretches * state_bytes(spec.num_attention_heads, spec.head_dim)


@device(types.void)
def heads_phase(step, layer, cache, mine, count):
    """Gated attention of `count` rows into the heads' blobs; no barrier at the end."""
    if count <= CUT_ROWS:
        _cut_along_keys(step, layer, cache, mine, count)
    else:
        _cut_along_rows(step, layer, cache, mine, count)


@njit(forceinline=True)
def _group_bytes(layer):
    """Bytes of the states of one KV head's query heads."""
    heads = field(layer, Layer.HEADS) // field(layer, Layer.GROUPS)
    return heads * (4 * field(layer, Layer.LANES) + STATE)


@njit(forceinline=True)
def _first_of(layer, cache, last):
    """The first position that a row at position `last` sees."""
    window, earliest = field(layer, Layer.WINDOW), field(cache, Kv.FIRST)
    return max(earliest, last - window + 1) if window else earliest


@device(types.void)
def _cut_along_keys(step, layer, cache, mine, count):
    groups, size = field(layer, Layer.GROUPS), _group_bytes(layer)
    start, partials = field(step, Step.START), field(step, Step.PARTIALS)
    low = _first_of(layer, cache, start) // STRETCH
    stretches = (start + count - 1) // STRETCH - low + 1
    part = mine + field(step, Step.FREE)
    counters = claims(step, mine)
    while True:
        unit = claim(step, counters, groups * stretches, mine)
        if unit >= groups * stretches:
            return
        g, stretch = unit // stretches, unit % stretches
        for t in range(count):
            state = partials + (unit * count + t) * size
            _stretch(step, layer, cache, g, t, low + stretch, state, part, part + size)
        done = field(step, Step.DONE) + 64 * g
        if fetch_add(done, np.int64(1)) == stretches - 1:
            store_i64(done, 0)
            for t in range(count):
                _finish(step, layer, cache, g, t, low, stretches, count, size)


@device(types.void)
def _stretch(step, layer, cache, g, t, stretch, state, part, scores):
    """A row's state over one stretch; nothing is written if the row sees none of it."""
    last = field(step, Step.START) + t
    low = max(_first_of(layer, cache, last), stretch * STRETCH)
    high = min(last, stretch * STRETCH + STRETCH - 1)
    for split in range(low // SPLIT, high // SPLIT + 1):
        begin = max(low, split * SPLIT)
        end = min(high, split * SPLIT + SPLIT - 1)
        into = state if begin == low else part
        _split(step, layer, cache, g, t, begin, end, into, scores)
        if begin != low:
            _merge(layer, state, part)


@device(types.void)
def _split(step, layer, cache, g, t, low, high, state, scores):
    """A row's state over part of a split."""
    lanes, groups = field(layer, Layer.LANES), field(layer, Layer.GROUPS)
    heads = field(layer, Layer.HEADS) // groups
    q = field(step, Step.QUERIES) + t * field(step, Step.QUERY_BYTES) + 4 * g * heads * lanes
    place = g * field(cache, Kv.SLOTS)
    call_address(
        field(step, Step.ATTEND), (q, heads, lanes, cache, place, low, high, state, scores)
    )


@device(types.void)
def _finish(step, layer, cache, g, t, low, stretches, count, size):
    """Merge the stretches that a row sees, and write its heads."""
    last = field(step, Step.START) + t
    first = _first_of(layer, cache, last) // STRETCH - low
    stop = last // STRETCH - low + 1
    lot = field(step, Step.PARTIALS) + (g * stretches * count + t) * size
    total = lot + first * count * size
    for stretch in range(first + 1, stop):
        _merge(layer, total, lot + stretch * count * size)
    _write(step, layer, g, t, total)


@device(types.void)
def _cut_along_rows(step, layer, cache, mine, count):
    groups, rows = field(layer, Layer.GROUPS), np.int64(_ROWS)
    if count < _MANY:
        rows = np.int64(_FEWER_ROWS)
    per_group = (count + rows - 1) // rows
    counters = claims(step, mine)
    while True:
        unit = claim(step, counters, groups * per_group, mine)
        if unit >= groups * per_group:
            return
        g, first = unit // per_group, unit % per_group * rows
        _rows(step, layer, cache, mine, g, first, min(first + rows, count))


@device(types.void)
def _rows(step, layer, cache, mine, g, first, stop):
    """Rows first..stop-1 of one KV head, split by split."""
    size, start = _group_bytes(layer), field(step, Step.START)
    part = mine + field(step, Step.FREE)
    totals, stretches = part + size, part + size + _ROWS * size
    scores = stretches + _ROWS * size
    for split in range(
        _first_of(layer, cache, start + first) // SPLIT, (start + stop - 1) // SPLIT + 1
    ):
        for t in range(first, stop):
            last = start + t
            low = _first_of(layer, cache, last)
            begin = max(low, split * SPLIT)
            end = min(last, split * SPLIT + SPLIT - 1)
            if begin > end:
                continue
            total, stretch = totals + (t - first) * size, stretches + (t - first) * size
            stretch_low = max(low, split * SPLIT // STRETCH * STRETCH)
            if begin == stretch_low:
                _split(step, layer, cache, g, t, begin, end, stretch, scores)
            else:
                _split(step, layer, cache, g, t, begin, end, part, scores)
                _merge(layer, stretch, part)
            if end == last or (end + 1) % STRETCH == 0:
                if stretch_low == low:
                    copy_rows(stretch, total, size // 4)
                else:
                    _merge(layer, total, stretch)
    for t in range(first, stop):
        _write(step, layer, g, t, totals + (t - first) * size)


@device(types.void)
def _merge(layer, total, part):
    """Add the softmaxes of a group's heads over some positions to those over positions before."""
    lanes = field(layer, Layer.LANES)
    size = 4 * lanes + STATE
    for head in range(field(layer, Layer.HEADS) // field(layer, Layer.GROUPS)):
        into, other = total + head * size, part + head * size
        at = 4 * lanes
        old, new = load_f32(into + at), load_f32(other + at)
        peak = max(old, new)
        a, b = exp_one(old - peak), exp_one(new - peak)
        for d in range(0, at, 64):
            scaled = load(F32x16, other + d) * splat(F32x16, b)
            store(into + d, fma(load(F32x16, into + d), splat(F32x16, a), scaled))
        store_f32(into + at, peak)
        both = load_f32(into + at + 4) * a + load_f32(other + at + 4) * b
        store_f32(into + at + 4, both)


@device(types.void)
def _write(step, layer, g, t, state):
    """Weighted means of the values, gated, into the heads' blob of a row."""
    lanes, heads = field(layer, Layer.LANES), field(layer, Layer.HEADS)
    heads //= field(layer, Layer.GROUPS)
    gate = field(step, Step.GATES) + t * field(step, Step.GATE_BYTES) + 4 * g * heads
    out = field(step, Step.HEADS_BLOB) + t * field(step, Step.HEADS_BLOB_BYTES)
    out += 4 * g * heads * lanes
    for head in range(heads):
        at = state + head * (4 * lanes + STATE)
        factor = sigmoid_one(load_f32(gate + 4 * head)) / load_f32(at + 4 * lanes + 4)
        for d in range(0, 4 * lanes, 64):
            scaled = load(F32x16, at + d) * splat(F32x16, factor)
            store(out + head * 4 * lanes + d, scaled)

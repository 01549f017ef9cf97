"""Grouped-query attention over the engine's KV caches: one row, one KV head, one split of keys.

Keys are taken in splits of 512 absolute positions, each with a softmax of its own, which
`refimpl.engine.heads` merges in a fixed order. A split's partition and every sum in it depend on
positions alone, so a row's result has the same bits for any chunking, ring size and thread count.

All query heads of a KV head that registers allow go through keys and values together: 32
positions (of scores) or 32 lanes (of values) at a time, so that 12 heads have 24 running sums.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import types

from refimpl.engine.fields import Kv, field
from refimpl.engine.jit import cfunc
from refimpl.engine.kv import (
    KvType,
    begin_block,
    block_weights,
    end_block,
    fetch_ahead,
    load_key,
    load_value,
)
from refimpl.engine.loads import load, store, store_f32
from refimpl.engine.maths import vexp
from refimpl.engine.running import (
    RunningSums,
    add_products,
    count_of,
    load_sums,
    scale_sums,
    store_sums,
    zero_sums,
)
from refimpl.engine.simd import Simd
from refimpl.engine.vec import (
    F32x16,
    I32x16,
    device,
    lane_numbers,
    reduce_add,
    reduce_max,
    splat,
    vmax,
    where_less,
    zeros,
)

SPLIT = 512
"""Positions whose softmax is formed at once."""
STATE = 64
"""Bytes behind a head's values in its state: the largest score, and the sum of exponentials."""
_PAIR = 32  # positions of a pass over the keys
_PART = 64  # positions of a pass over the values
_ROOM = 4 * SPLIT  # where scaled weights of a part lie behind a head's scores
_SCORES = _ROOM + 4 * _PART + 64  # bytes of these; no power of two, for the caches' sake
_MINUS_INFINITY = np.float32(-math.inf)
# Query heads of a pass; each has two running sums.
_MANY, _SOME, _FEW = RunningSums("12", 12), RunningSums("8", 8), RunningSums("4", 4)
_TWO, _ONE = RunningSums("2", 2), RunningSums("1", 1)


def score_bytes(heads: int) -> int:
    """Scratch of one `attend` call for a group of `heads` query heads."""
    return heads * _SCORES


@cache
def attending(simd: Simd, kv: KvType) -> Any:
    """The compiled function for one row, KV head and split, all arguments int64:

        q, heads, lanes, cache record, place, low, high, state, scratch

    Positions low..high, of one split, are visible. q (heads, lanes) float32, normed and rotated;
    `place` is the KV head's first slot among all heads' slots; state (heads, 4 lanes + STATE
    bytes): sum of exp(score - largest) values, largest score, sum of exp(score - largest);
    scratch holds `score_bytes`.
    """
    wide = simd.name == "avx512"  # no function: those have another identity in every process

    @cfunc(types.void(*[types.int64] * 9), cache=True, error_model="numpy")
    def attend(q, heads, lanes, record, place, low, high, state, scratch):
        simd  # noqa: B018  # part of the cache key
        if wide:
            _wide(kv, q, heads, lanes, record, place, low, high, state, scratch)
        else:
            _narrow(kv, q, heads, lanes, record, place, low, high, state, scratch)

    return attend


@device(types.void)
def _wide(kv, q, heads, lanes, record, place, low, high, state, scratch):
    """For 32 registers of 16 lanes."""
    done: Any = np.int64(0)
    while done < heads:
        at, to = q + done * 4 * lanes, state + done * (4 * lanes + STATE)
        left = heads - done
        if left >= 12:
            _pass(kv, _MANY, at, lanes, record, place, low, high, to, scratch)
            done += 12
        elif left >= 8:
            _pass(kv, _SOME, at, lanes, record, place, low, high, to, scratch)
            done += 8
        elif left >= 4:
            _pass(kv, _FEW, at, lanes, record, place, low, high, to, scratch)
            done += 4
        else:
            _pass(kv, _ONE, at, lanes, record, place, low, high, to, scratch)
            done += 1


@device(types.void)
def _narrow(kv, q, heads, lanes, record, place, low, high, state, scratch):
    """For 16 registers of 8 lanes, or such."""
    done: Any = np.int64(0)
    while done < heads:
        at, to = q + done * 4 * lanes, state + done * (4 * lanes + STATE)
        if heads - done >= 2:
            _pass(kv, _TWO, at, lanes, record, place, low, high, to, scratch)
            done += 2
        else:
            _pass(kv, _ONE, at, lanes, record, place, low, high, to, scratch)
            done += 1


@device(types.void)
def _pass(kv, sums, q, lanes, record, place, low, high, state, scores):
    """Scores, softmax and weighted values of a few query heads."""
    base = low // SPLIT * SPLIT
    _scores(kv, sums, q, lanes, record, place, low, high, scores - 4 * base)
    _softmaxes(sums, low, high, scores - 4 * base, state, lanes)
    _weighted(kv, sums, lanes, record, place, low, high, scores, state)


@device(types.void)
def _scores(kv, sums, q, lanes, record, place, low, high, scores):
    """Scores of the whole groups of 16 positions that low..high touch, at `scores` + 4 position."""
    keys, scales = field(record, Kv.KEYS), field(record, Kv.KEY_SCALES)
    slots, blocks = field(record, Kv.SLOTS), lanes // 32
    factor = splat(F32x16, np.float32(1) / np.sqrt(np.float32(lanes)))
    for position in range(low // _PAIR * _PAIR, high + 1, _PAIR):
        group_a = (place + position % slots) // 16
        group_b = (place + (position + 16) % slots) // 16  # slots are a multiple of 16
        a, b = zero_sums(sums), zero_sums(sums)
        for block in range(blocks):
            part_a, part_b = begin_block(kv, sums, a), begin_block(kv, sums, b)
            first_a, first_b = group_a * lanes + 32 * block, group_b * lanes + 32 * block
            at = q + 128 * block
            for d in range(0, 32, 2):
                fetch_ahead(kv, keys, (first_a + d + 2 * lanes) * 16)
                fetch_ahead(kv, keys, (first_b + d + 2 * lanes) * 16)
                for i in range(d, d + 2):
                    key_a = load_key(kv, keys, first_a + i)
                    key_b = load_key(kv, keys, first_b + i)
                    part_a = add_products(part_a, key_a, at + 4 * i, 4 * lanes)
                    part_b = add_products(part_b, key_b, at + 4 * i, 4 * lanes)
            a = end_block(kv, a, part_a, scales, group_a * blocks + block)
            b = end_block(kv, b, part_b, scales, group_b * blocks + block)
        store_sums(scale_sums(a, factor), scores + 4 * position, _SCORES)
        store_sums(scale_sums(b, factor), scores + 4 * position + 64, _SCORES)


@device(types.void)
def _softmaxes(sums, low, high, scores, state, lanes):
    """The softmax of each head."""
    count = count_of(sums)
    for head in range(count):
        to = state + head * (4 * lanes + STATE)
        _softmax(scores + head * _SCORES, low, high, to + 4 * lanes)
        for d in range(0, 4 * lanes, 64):
            store(to + d, zeros(F32x16))


@device(types.void)
def _softmax(scores, low, high, out):
    """Scores to e^(score - largest); the largest and the sum at `out`. Slots outside low..high
    hold other positions, or nothing yet: they count as nothing."""
    none, zero = splat(F32x16, _MINUS_INFINITY), zeros(F32x16)
    bound, top = zeros(I32x16), splat(I32x16, np.int32(high - low + 1))
    peak = none
    for position in range(low // 16 * 16, high + 1, 16):
        lane = lane_numbers(I32x16) + splat(I32x16, np.int32(position - low))
        score = load(F32x16, scores + 4 * position)
        peak = vmax(where_less(lane, bound, none, where_less(lane, top, score, none)), peak)
    largest = reduce_max(peak)
    total = zero
    for position in range(low // 16 * 16, high + 1, 16):
        lane = lane_numbers(I32x16) + splat(I32x16, np.int32(position - low))
        e = vexp(load(F32x16, scores + 4 * position) - splat(F32x16, largest))
        e = where_less(lane, bound, zero, where_less(lane, top, e, zero))
        store(scores + 4 * position, e)
        total = total + e
    store_f32(out, largest)
    store_f32(out + 4, reduce_add(total))


@device(types.void)
def _weighted(kv, sums, lanes, record, place, low, high, weights, state):
    """Add each position's value, times its weight, to the heads' sums, in ascending order."""
    values, scales = field(record, Kv.VALUES), field(record, Kv.VALUE_SCALES)
    slots, blocks = field(record, Kv.SLOTS), lanes // 32
    stride, base = 4 * lanes + STATE, low // SPLIT * SPLIT
    position = low
    while position <= high:
        slot = position % slots
        count = min(_PART - position % _PART, high + 1 - position, slots - slot)
        first, part = place + slot, weights + 4 * (position - base)
        for block in range(blocks):
            to = state + 128 * block
            scaled = block_weights(kv, part, scales, first, count, block, blocks, count_of(sums),
                                   _SCORES, weights + _ROOM)  # fmt: skip
            a, b = load_sums(sums, to, stride), load_sums(sums, to + 64, stride)
            for i in range(count):
                lane = (first + i) * lanes + 32 * block
                at = scaled + 4 * i
                fetch_ahead(kv, values, lane + _PART * lanes)
                a = add_products(a, load_value(kv, values, lane), at, _SCORES)
                b = add_products(b, load_value(kv, values, lane + 16), at, _SCORES)
            store_sums(a, to, stride)
            store_sums(b, to + 64, stride)
        position += count

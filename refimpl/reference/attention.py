"""Grouped-query attention over visible keys, with the head-wise output gate.

Axes: T query rows, S cached rows, n query heads, g KV heads, r = n/g query heads per KV head,
D head_dim.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.reference.numerics import Array

_BLOCK = 256  # query rows at a time: bounds the score matrix to n * 256 * S values


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    k_positions: Array,
    window: int | None,
) -> Array:
    """softmax(q k / sqrt(D)) v over visible keys.

    Key j is visible to query i when position j <= i and, on sliding layers, j > i - window:
    exactly `window` keys, the query's own included. Query head h uses KV head h // r.

    Shapes: q (T, n, D); k, v (S, g, D); positions (T,), (S,) ascending -> (T, n, D).
    """
    out = np.empty_like(q)
    for start in range(0, q.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        low, high = visible_range(q_positions[rows], k_positions, window)
        out[rows] = _attend_block(
            q[rows], k[low:high], v[low:high], q_positions[rows], k_positions[low:high], window
        )
    return out


def visible_range(q_positions: Array, k_positions: Array, window: int | None) -> tuple[int, int]:
    """Half-open range of cached rows that any of the queries can see."""
    high = int(np.searchsorted(k_positions, q_positions[-1], side="right"))
    if window is None:
        return 0, high
    return int(np.searchsorted(k_positions, q_positions[0] - window, side="right")), high


def visible_pairs(q_positions: Array, k_positions: Array, window: int | None) -> int:
    """Number of (query, visible key) pairs: what QK and PV each cost per head and lane."""
    high = np.searchsorted(k_positions, q_positions, side="right")
    if window is None:
        return int(high.sum())
    return int((high - np.searchsorted(k_positions, q_positions - window, side="right")).sum())


def _attend_block(
    q: Array, k: Array, v: Array, q_positions: Array, k_positions: Array, window: int | None
) -> Array:
    t, n, d = q.shape
    s, g, _ = k.shape
    r = n // g
    queries = q.reshape(t, g, r, d).transpose(1, 2, 0, 3).reshape(g, r * t, d)  # (g, rT, D)
    scores = queries @ k.transpose(1, 2, 0)  # (g, rT, D) @ (g, D, S) -> (g, rT, S)
    scores = scores.reshape(g, r, t, s) * q.dtype.type(1 / math.sqrt(d))
    visible = k_positions[None, :] <= q_positions[:, None]  # (T, S)
    if window is not None:
        visible &= k_positions[None, :] > q_positions[:, None] - window
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = weights.reshape(g, r * t, s) @ v.transpose(1, 0, 2)  # (g, rT, S) @ (g, S, D)
    return out.reshape(g, r, t, d).transpose(2, 0, 1, 3).reshape(t, n, d)  # (T, n, D)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow, any shape."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)

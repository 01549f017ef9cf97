"""Multi-token prediction: the chain of MTP layers, drafting and teacher forcing.

MTP layer k (checkpoint layer num_hidden_layers + k) at position t takes the embedding of
x_{t+1+k} and a hidden row u_t, and predicts x_{t+2+k}. In the normative chain u is the trunk's
pre-norm hidden state for k = 0 and layer k-1's block output, before its shared_head.norm, for
k >= 1, at the same t. Every layer has its own cache, norm and output head.

Axes: R rows, H hidden_size, V vocab_size. n is the index of the newest verified token x_n, which
the trunk has not processed yet; hidden rows exist for t = 0..n-1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.decoding.kv import LayerCache, require_rows, take
from refimpl.reference.block import decoder_layer
from refimpl.reference.numerics import Array
from refimpl.reference.weights import Weights


class MtpCache:
    """What drafting keeps of one sequence: per MTP layer its keys and values, and hidden rows
    whose next input token is not verified yet.

    `done[k]` rows of layer k were run with verified tokens; `pending[k]` holds the rows of u
    from position `done[k]` on. Layers that are never drafted from cost nothing.
    """

    def __init__(self, kv: list[LayerCache]) -> None:
        self.kv = kv
        self.done = [0] * len(kv)
        self.pending: list[list[Array]] = [[] for _ in kv]
        self.rows = 0

    def add(self, level: int, rows: Array) -> None:
        """Queue hidden rows (R, H) for a layer."""
        if len(rows):
            self.pending[level].append(rows)

    def take(self, level: int) -> list[Array]:
        """The queued rows of a layer, which is then empty."""
        rows, self.pending[level] = self.pending[level], []
        return rows

    def export(self) -> dict[str, Array]:
        """Everything here by name: mtp.rows (1,), mtp.done (layers,), and per layer with rows
        mtp.pending.K (R, H); mtp.kv.K as `LayerCache.newest`."""
        made: dict[str, Array] = {
            "mtp.rows": np.array([self.rows]),
            "mtp.done": np.array(self.done, dtype=np.int64),
        }
        for k, (kv, rows) in enumerate(zip(self.kv, self.pending, strict=True)):
            made[f"mtp.kv.{k}"] = kv.newest()
            if rows:
                made[f"mtp.pending.{k}"] = np.concatenate(rows)
        return made

    def refill(self, arrays: dict[str, Array], length: int, row: Array) -> None:
        """Take what `export` gave after at most `length` trunk tokens; `row` (1, H) shows type and
        width of hidden rows.

        Raises:
            InputError: anything that does not fit.
        """
        (rows,) = take(arrays, "mtp.rows", (1,), np.int64).tolist()
        done = take(arrays, "mtp.done", (len(self.kv),), np.int64).tolist()
        for k, kv in enumerate(self.kv):
            name, pending = f"mtp.pending.{k}", row[:0]
            if name in arrays:
                pending = take(arrays, name, (None, row.shape[1]), row.dtype)
            require_rows(k, rows, done[k], len(pending), length)
            kv.refill(done[k], arrays, f"mtp.kv.{k}")
            self.add(k, np.array(pending))
        self.rows, self.done = rows, done

    def snapshot(self) -> tuple[Any, ...]:
        """See `refimpl.backend.Cache.snapshot`; queued rows are never written to, only lists."""
        kv = [layer.snapshot() for layer in self.kv]
        return kv, list(self.done), [list(queue) for queue in self.pending], self.rows

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """See `refimpl.backend.Cache.restore`."""
        kv, done, pending, self.rows = snapshot
        for layer, held in zip(self.kv, kv, strict=True):
            layer.restore(held)
        self.done, self.pending = list(done), [list(queue) for queue in pending]


def draft_chain(
    w: Weights,
    cache: MtpCache,
    trunk_tokens: list[int],
    hidden: Array,
    next_tokens: list[int],
    depth: int,
    choose: Callable[[Array], int],
) -> list[int]:
    """Queue the newest verified rows and draft `depth` tokens (see `Backend.draft`)."""
    if not cache.kv:
        return []
    n = len(trunk_tokens)
    if len(hidden) != len(next_tokens) or cache.rows + len(hidden) != n:
        raise ValueError(
            f"draft() was given rows up to {cache.rows + len(hidden)} with {len(next_tokens)} "
            f"tokens after {n} trunk tokens; every verified row must be passed once, in order"
        )
    cache.rows = n
    tokens = _Tokens(trunk_tokens, next_tokens[-1])
    if w.variant.mtp_wiring == "llamacpp":
        return _draft_llamacpp(w, cache, tokens, hidden, depth, choose)
    to_every_level = w.variant.mtp_wiring == "trunk_to_all"
    for level in range(len(cache.kv) if to_every_level else 1):
        cache.add(level, _trunk_rows(w, hidden))
    carried = hidden[:0]
    for k in range(depth):
        waiting = np.concatenate([*cache.take(k), hidden[:0]])
        u, start = np.concatenate([waiting, carried]), cache.done[k]
        positions = np.arange(start, start + len(u))
        m = _rows(w, k, u, tokens.at(positions + k + 1), positions, cache.kv[k])
        final = max(0, n - k - start)  # rows whose input token is verified
        cache.kv[k].rollback(len(u) - final)
        cache.done[k] += final
        cache.add(k, waiting[final:])
        tokens.drafts.append(choose(mtp_head(w, k, m[-1:])[0]))
        if not to_every_level:
            passed = _passed_on(w, k, m)
            carried = passed[final:]
            if k + 1 < len(cache.kv):
                cache.add(k + 1, passed[:final])
    return tokens.drafts


def teacher_forced(w: Weights, cache: MtpCache, ids: Array, hidden: Array) -> list[Array]:
    """Block outputs of every MTP layer over a known text: ids (T,), hidden (T, H) -> one array
    (T-1-k, H) per layer k (empty where the text is too short)."""
    if w.variant.mtp_wiring == "llamacpp":
        return _forced_llamacpp(w, cache, ids, hidden)
    trunk = u = _trunk_rows(w, hidden)
    out = []
    for k, kv in enumerate(cache.kv):
        count = max(0, len(ids) - 1 - k)
        u = (trunk if w.variant.mtp_wiring == "trunk_to_all" else u)[:count]
        m = u if not count else _rows(w, k, u, ids[k + 1 :], np.arange(count), kv)
        out.append(m)
        u = _passed_on(w, k, m)
    return out


def mtp_head(w: Weights, k: int, m: Array) -> Array:
    """Layer k's own norm and output matrix: (R, H) -> (R, V)."""
    layer = _layer(w, k)
    normed = w.norm(m, "shared_head.norm", layer)
    if w.variant.mtp_main_head:
        return w.linear(normed, "lm_head", None)
    return w.linear(normed, "shared_head.output", layer)


def _layer(w: Weights, k: int) -> int:
    """Checkpoint layer of draft position k."""
    first = w.config.num_hidden_layers
    return first if w.variant.mtp_wiring == "first_block" else first + k


def _rows(w: Weights, k: int, u: Array, tokens: Array, positions: Array, kv: LayerCache) -> Array:
    """Run rows through MTP layer k: u (R, H), tokens (R,), positions (R,) -> (R, H).

    The concatenation is embedding half first, hidden half second.
    """
    layer = _layer(w, k)
    embedded = w.norm(w.embedding(tokens), "enorm", layer)  # (R, H)
    halves = [embedded, w.norm(u, "hnorm", layer)]
    both = np.concatenate(halves[::-1] if w.variant.mtp_hidden_first else halves, axis=-1)
    r = w.linear(both, "eh_proj", layer)  # (R, 2H) -> (R, H)
    return decoder_layer(w, w.layers[layer], r, positions, kv)


def _trunk_rows(w: Weights, hidden: Array) -> Array:
    """The trunk's rows as the first MTP layer takes them."""
    return w.norm(hidden, "norm", None) if w.variant.mtp_wiring == "transformers" else hidden


def _passed_on(w: Weights, k: int, m: Array) -> Array:
    """Layer k's rows as layer k+1 takes them."""
    if w.variant.mtp_wiring != "transformers":
        return m
    return w.norm(m, "shared_head.norm", _layer(w, k))


class _Tokens:
    """x_0..x_n verified, then drafts x_{n+1}.."""

    def __init__(self, trunk: list[int], newest: int) -> None:
        self._trunk, self._newest = trunk, newest
        self.drafts: list[int] = []

    def at(self, indices: Array) -> Array:
        """Tokens at absolute indices, (R,) -> (R,)."""
        n = len(self._trunk)
        tail = [self._newest, *self.drafts]
        picked = [self._trunk[i] if i < n else tail[i - n] for i in indices.tolist()]
        return np.array(picked, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._trunk) + 1


def _draft_llamacpp(
    w: Weights,
    cache: MtpCache,
    tokens: _Tokens,
    hidden: Array,
    depth: int,
    choose: Callable[[Array], int],
) -> list[int]:
    """llama.cpp's draft-mtp: every head's prefix is built from trunk rows (h_{p-1}, x_p) at
    position p, with a row (0, x_0) first; only the draft slots are chained."""
    n = len(tokens) - 1
    for level in range(len(cache.kv)):
        if n == len(hidden):
            cache.add(level, np.zeros_like(hidden[:1]))
        cache.add(level, hidden)
    chain = hidden[:0]
    for k in range(depth):
        u, start = np.concatenate([*cache.take(k), hidden[:0]]), cache.done[k]
        positions = np.arange(start, start + len(u))
        prefix = _rows(w, k, u, tokens.at(positions), positions, cache.kv[k])
        cache.done[k] += len(u)
        slots = np.arange(n + 1, n + 1 + k)
        m = _slots(w, k, chain, tokens.at(slots), slots, cache) if k else prefix[-1:]
        chain = np.concatenate([chain, m])
        tokens.drafts.append(choose(mtp_head(w, k, m)[0]))
    return tokens.drafts


def _slots(w: Weights, k: int, chain: Array, tokens: Array, slots: Array, cache: MtpCache) -> Array:
    """Head k >= 1 over all k draft slots, slot i fed with head i's last row: chain (k, H),
    tokens and positions (k,) -> the last row (1, H). Nothing stays in the head's cache."""
    m = _rows(w, k, chain, tokens, slots, cache.kv[k])
    cache.kv[k].rollback(k)
    return m[-1:]


def _forced_llamacpp(w: Weights, cache: MtpCache, ids: Array, hidden: Array) -> list[Array]:
    """Teacher forcing under llama.cpp's wiring: at each t the prefix ends with row t."""
    out: list[list[Array]] = [[] for _ in cache.kv]
    before = np.concatenate([np.zeros_like(hidden[:1]), hidden])  # row p = h_{p-1}
    for p in range(len(ids)):
        chain = before[:0]
        for k, kv in enumerate(cache.kv):
            m = _rows(w, k, before[p : p + 1], ids[p : p + 1], np.array([p]), kv)
            if not p or p + k >= len(ids):
                continue
            if k:
                slots = np.arange(p + 1, p + 1 + k)
                m = _slots(w, k, chain, ids[slots], slots, cache)
            chain = np.concatenate([chain, m])
            out[k].append(m)
    return [np.concatenate([*rows, hidden[:0]]) for rows in out]

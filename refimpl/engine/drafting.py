"""Drafting: what the MTP layers keep of one sequence, and the chain that they draft in.

MTP layer k's row t takes the embedding of x_{t+1+k} and, for k = 0, the trunk's hidden row, else
layer k-1's output at t (see `refimpl.reference.mtp`). Rows whose token is a draft are computed
anew once that token turns out to be another one; of a draft that stood they are kept.

Axes: R rows, H hidden_size, V vocab_size. n is the number of tokens that the trunk has run, x_n
the newest one, which it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Array
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.engine.fields import Kv

RunRows = Callable[[int, Array, list[int], int], tuple[Array, Array]]
"""(level, u (R, H), tokens, position of the first row) -> rows (R, H), last row's logits (V,)."""


@dataclass(frozen=True)
class _Guessed:
    """What was drafted after n tokens, and per level the rows (R, H) that took a draft for their
    token: the outputs at the last positions before n."""

    n: int
    drafts: list[int]
    rows: list[Array]


class MtpState:
    """What drafting keeps: per MTP layer the rows done, and hidden rows that wait for it.

    `pending[k]` are rows of MTP layer k's input from position `start[k]` on whose following token
    was not verified, or that have not been needed yet. Rows that no later draft can see are
    dropped: layer k needs at most (layers - k) windows of them. Positions of layer k before
    `first(k)` are not looked at: not all of them were run.

    Args:
        records: of the layers' caches, with the field `Kv.FIRST`.
        window: the widest of the layers' windows.
    """

    def __init__(self, records: Sequence[NDArray[np.int64]], window: int) -> None:
        self._records, self._window = list(records), window
        self.pending: list[list[Array]] = [[] for _ in records]
        self.start = [0] * len(self._records)
        self._waiting = [0] * len(self._records)  # rows in each queue
        self.rows = 0
        self._guessed: _Guessed | None = None

    def first(self, level: int) -> int:
        """The first position that a layer's rows may look at."""
        return int(self._records[level][Kv.FIRST])

    def set_first(self, level: int, position: int) -> None:
        """Leave out what lies before a position."""
        self._records[level][Kv.FIRST] = position

    def add(self, level: int, rows: Array) -> None:
        """Queue rows (R, H) of a layer, not to be written to any more, and drop those that nothing
        will need."""
        if level >= len(self.pending) or not len(rows):
            return
        queue = self.pending[level]
        queue.append(np.asarray(rows, dtype=np.float32))
        self._waiting[level] += len(rows)
        needed = (len(self.pending) - level) * self._window + SPECULATIVE_ROWS
        while self._waiting[level] - len(queue[0]) >= needed:
            dropped = len(queue.pop(0))
            self.start[level] += dropped
            self._waiting[level] -= dropped

    def begin(self, level: int, position: int) -> None:
        """The next rows of a layer start at `position`; after a gap, those before it go."""
        if self.start[level] + self._waiting[level] != position:
            self.take(level)
            self.start[level] = position
            self.set_first(level, position)

    def waiting(self, level: int) -> int:
        """Rows that wait for a layer."""
        return self._waiting[level]

    def take(self, level: int) -> tuple[int, list[Array]]:
        """Position of the first queued row, and the rows; the queue is then empty."""
        rows, self.pending[level], self._waiting[level] = self.pending[level], [], 0
        return self.start[level], rows

    def shorten(self, keep: int) -> None:
        """Do without all rows that wait for a layer but the newest `keep`; where that leaves a
        gap, nothing before it is looked at any more."""
        for level in range(len(self.pending)):
            drop = self.waiting(level) - keep
            if drop > 0:
                self._drop(level, drop)
                self.set_first(level, self.start[level])
                self._guessed = None  # its rows lie behind those that were just left out

    def note(self, n: int, drafts: list[int], rows: list[Array]) -> None:
        """Keep the rows that took drafts for their tokens, until these are judged."""
        self._guessed = _Guessed(n, drafts, rows)

    def confirm(self, tokens: Sequence[int], newest: Sequence[int] = ()) -> None:
        """Rows whose drafts stood are done; `tokens`, then `newest` are all verified ones."""
        guessed, self._guessed = self._guessed, None
        if guessed is None:
            return
        stood, n = 0, guessed.n
        for draft, token in zip(guessed.drafts, [*tokens[n + 1 :], *newest], strict=False):
            if draft != token:
                break
            stood += 1
        passed, at = np.empty((0, 0), np.float32), 0  # a level's new rows, and their position
        for level, rows in enumerate(guessed.rows):
            if len(passed):
                self.begin(level, at)
                self.add(level, passed)
            at = self.start[level]
            done = min(max(0, n - level + stood - at), len(rows))
            self._drop(level, done)
            passed = rows[:done]
        if len(passed) and len(guessed.rows) < len(self.pending):
            self.begin(len(guessed.rows), at)
            self.add(len(guessed.rows), passed)

    def _drop(self, level: int, count: int) -> None:
        """Rows that wait for a layer have been run, or are left out."""
        if count:
            queue = self.pending[level]
            left = np.concatenate(queue)[count:] if queue else np.empty((0, 0), np.float32)
            self.pending[level], self._waiting[level] = [left] if len(left) else [], len(left)
            self.start[level] += count

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs; queued rows are never written to, only lists are."""
        first = [self.first(k) for k in range(len(self.start))]
        return [list(queue) for queue in self.pending], list(self.start), first, self.rows

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Back to the moment of the snapshot."""
        pending, start, first, self.rows = snapshot
        self.pending, self.start = [list(queue) for queue in pending], list(start)
        self._waiting = [sum(map(len, queue)) for queue in pending]
        for level, position in enumerate(first):
            self.set_first(level, position)
        self._guessed = None


def draft_chain(
    state: MtpState,
    tokens: list[int],
    hidden: Array,
    next_tokens: list[int],
    depth: int,
    choose: Callable[[Array], int],
    run: RunRows,
) -> list[int]:
    """Queue the newest verified rows and draft `depth` tokens (see `Backend.draft`).

    Args:
        tokens: (n,) those that the trunk has run.
        hidden, next_tokens: the newest of its rows (R, H), and the token after each.
        run: runs rows through an MTP layer.

    Raises:
        ValueError: rows were left out or come twice.
    """
    n = len(tokens)
    if len(hidden) != len(next_tokens) or state.rows + len(hidden) != n or not len(hidden):
        raise ValueError(
            f"draft() was given rows up to {state.rows + len(hidden)} with "
            f"{len(next_tokens)} tokens after {n} trunk tokens; every verified row must be "
            "passed once, in order"
        )
    state.rows = n
    state.add(0, hidden)
    if not depth:
        return []
    newest, drafts, guessed = next_tokens[-1:], list[int](), list[Array]()
    state.confirm(tokens, newest)
    carried = hidden[:0]
    for k in range(depth):
        start, waiting = state.take(k)
        u = np.concatenate([*waiting, carried]) if len(waiting) != 1 or len(carried) else waiting[0]
        count, first = len(u), start + k + 1
        ids = tokens[first : first + count]
        if len(ids) < count:
            skipped = max(0, first - n)
            ids += [*newest, *drafts][skipped : skipped + count - len(ids)]
        rows, logits = run(k, u, ids, start)
        verified = max(0, min(count, n - k - start))  # rows whose token is no draft
        state.start[k] = start + verified
        if verified < count - len(carried):
            state.add(k, u[verified : count - len(carried)])
        if k + 1 < len(state.pending):
            state.begin(k + 1, start)
            state.add(k + 1, rows[:verified])
        carried = rows[verified:]
        guessed.append(carried)
        drafts.append(int(choose(logits)))
    state.note(n, drafts, guessed)
    return drafts

"""Key/value caches of one layer: growing for full attention, ring for sliding windows.

Axes: T new rows, S rows handed out, g KV heads, D head_dim. Positions are consecutive from 0.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SPECULATIVE_ROWS = 3  # the most rows that one verification can reject (three MTP drafts)


class LayerCache(Protocol):
    """Rows of keys and values of one layer."""

    length: int

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Append (T, g, D) rows; return keys and values (S, g, D) that the new rows may see,
        and their positions (S,)."""

    def rollback(self, n: int) -> None:
        """Forget the newest `n` rows."""


class GrowingCache:
    """All rows, in an array that doubles as it fills."""

    def __init__(self, groups: int, head_dim: int, dtype: np.dtype[Any], capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._rows = np.empty((2, min(capacity, 64), groups, head_dim), dtype)

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """See `LayerCache.extend`; S is the whole length."""
        end = self.length + len(k)
        if end > self._rows.shape[1]:
            size = min(self._capacity, max(end, 2 * self._rows.shape[1]))
            grown = np.empty((2, size, *self._rows.shape[2:]), self._rows.dtype)
            grown[:, : self.length] = self._rows[:, : self.length]
            self._rows = grown
        self._rows[0, self.length : end] = k
        self._rows[1, self.length : end] = v
        self.length = end
        return self._rows[0, :end], self._rows[1, :end], np.arange(end)

    def rollback(self, n: int) -> None:
        """Forget the newest `n` rows."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot roll back {n} of {self.length} rows")
        self.length -= n


class RingCache:
    """The newest window - 1 rows plus room for rows that a verification may reject.

    A ring of exactly `window` slots would overwrite rows that are needed again after a
    rejection, hence the `SPECULATIVE_ROWS` spare ones.
    """

    def __init__(self, groups: int, head_dim: int, dtype: np.dtype[Any], window: int) -> None:
        self.length = 0
        self.window = window
        self._undoable = 0
        self._slots = window - 1 + SPECULATIVE_ROWS
        self._rows = np.empty((2, self._slots, groups, head_dim), dtype)

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """See `LayerCache.extend`; S is at most window - 1 + T."""
        first = max(0, self.length - (self.window - 1))
        old = np.arange(first, self.length) % self._slots
        keys = np.concatenate([self._rows[0, old], k])
        values = np.concatenate([self._rows[1, old], v])
        end = self.length + len(k)
        kept = min(len(k), self._slots)
        slots = np.arange(end - kept, end) % self._slots
        self._rows[0, slots] = k[len(k) - kept :]
        self._rows[1, slots] = v[len(v) - kept :]
        self._undoable = min(self._undoable + len(k), SPECULATIVE_ROWS)
        self.length = end
        return keys, values, np.arange(first, end)

    def rollback(self, n: int) -> None:
        """Forget the newest `n` rows, at most `SPECULATIVE_ROWS` since they were appended."""
        if not 0 <= n <= self._undoable:
            raise ValueError(f"cannot roll back {n} rows of a ring that keeps {self._undoable}")
        self._undoable -= n
        self.length -= n

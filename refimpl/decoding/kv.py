"""Key/value caches of one layer: growing for full attention, ring for sliding windows.

Axes: T new rows, S rows handed out, g KV heads, D head_dim. Positions are consecutive from 0.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refimpl.errors import InputError

Array = NDArray[Any]

SPECULATIVE_ROWS = 3  # the most rows that one verification can reject (three MTP drafts)


def take(
    arrays: dict[str, Array], name: str, shape: tuple[int | None, ...], dtype: DTypeLike
) -> Array:
    """Take an array of a saved cache out of `arrays`; None in `shape` stands for any size.

    Raises:
        InputError: it is missing, or of another shape or type.
    """
    found = arrays.pop(name, None)
    sizes = ", ".join("any" if n is None else str(n) for n in shape)
    wanted = f"{np.dtype(dtype)} of shape ({sizes})"
    if found is None:
        raise InputError(f"the saved state has no '{name}', expected {wanted}")
    fits = len(found.shape) == len(shape) and all(
        n is None or n == size for n, size in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype != np.dtype(dtype):
        raise InputError(
            f"the saved state has '{name}' as {found.dtype} of shape {found.shape}, expected "
            f"{wanted}"
        )
    return found


def take_tokens(arrays: dict[str, Array], capacity: int) -> list[int]:
    """Take the `tokens` (T,) of a saved cache, 1 to `capacity` of them.

    Raises:
        InputError: missing, of another form, none or too many.
    """
    found = take(arrays, "tokens", (None,), np.int64)
    if not 0 < len(found) <= capacity:
        raise InputError(f"the saved state has {len(found)} tokens, the context holds {capacity}")
    tokens: list[int] = found.tolist()
    return tokens


def require_rows(level: int, rows: int, done: int, pending: int, length: int) -> None:
    """Refuse counts of an MTP layer's rows that no run can give.

    Args:
        rows: trunk rows that the MTP layers were given, of `length` trunk tokens.
        done, pending: rows of the layer that were run, and that wait.

    Raises:
        InputError: they contradict each other.
    """
    ends = done + pending
    if not (0 <= done <= ends <= rows <= length) or (level == 0 and ends != rows):
        raise InputError(
            f"the saved state has {done} rows done and {pending} waiting in MTP layer {level}, "
            f"of {rows} in {length} tokens; these contradict each other"
        )


class LayerCache(Protocol):
    """Rows of keys and values of one layer."""

    length: int

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Append (T, g, D) rows; return keys and values (S, g, D) that the new rows may see,
        and their positions (S,)."""

    def rollback(self, n: int) -> None:
        """Forget the newest `n` rows."""

    def snapshot(self) -> Any:
        """What `restore` needs to come back to this moment."""

    def restore(self, snapshot: Any) -> None:
        """Back to the moment of `snapshot`; it stays usable. Rows that a growing cache held then
        must not have been rolled back since: it does not copy them."""

    def newest(self) -> Array:
        """A copy of the rows that are kept, oldest first: keys and values (2, S, g, D)."""

    def refill(self, length: int, arrays: dict[str, Array], name: str) -> None:
        """Take what `newest` gave at that length, as `name` in `arrays` (see `take`)."""


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

    def newest(self) -> Array:
        """See `LayerCache.newest`; all rows."""
        return self._rows[:, : self.length].copy()

    def refill(self, length: int, arrays: dict[str, Array], name: str) -> None:
        """See `LayerCache.refill`."""
        rows = take(arrays, name, (2, length, *self._rows.shape[2:]), self._rows.dtype)
        self.length = 0
        self.extend(rows[0], rows[1])

    def snapshot(self) -> int:
        """See `LayerCache.snapshot`."""
        return self.length

    def restore(self, snapshot: int) -> None:
        """See `LayerCache.restore`."""
        self.length = snapshot


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

    def newest(self) -> Array:
        """See `LayerCache.newest`; the newest window - 1 + `SPECULATIVE_ROWS` rows."""
        return self._rows[:, self._kept(self.length)]

    def refill(self, length: int, arrays: dict[str, Array], name: str) -> None:
        """See `LayerCache.refill`."""
        slots = self._kept(length)
        rows = take(arrays, name, (2, len(slots), *self._rows.shape[2:]), self._rows.dtype)
        self._rows[:, slots] = rows
        self.length, self._undoable = length, min(length, SPECULATIVE_ROWS)

    def _kept(self, length: int) -> Array:
        """Slots of the rows that are kept at a length, oldest first."""
        kept: Array = np.arange(max(0, length - self._slots), length) % self._slots
        return kept

    def snapshot(self) -> tuple[int, int, Array]:
        """See `LayerCache.snapshot`; the rows are copied, for the ring overwrites them."""
        return self.length, self._undoable, self._rows.copy()

    def restore(self, snapshot: tuple[int, int, Array]) -> None:
        """See `LayerCache.restore`."""
        self.length, self._undoable, rows = snapshot
        self._rows[:] = rows

"""A cache that outlives one generation, so that a conversation's beginning is run only once.

The next prompt of a conversation mostly begins with the tokens that the cache already holds. Two
moments can be continued from: the end of the last generation, and a mark that was set while its
prompt was run (in a chat: before the reasoning, which the next prompt drops). Sliding layers keep
rings, which can be rolled back by three rows only; that is why a mark copies their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from refimpl.backend import Array, Backend, Cache

Waiting = tuple[list[Array], list[int]]


class KeptCache:
    """One sequence's cache and which tokens it holds.

    Args:
        backend: the model; the cache belongs to it.
        capacity: the most tokens that the conversation may have.

    Attributes:
        cache: the cache; there is one after `begin`.
        waiting: the newest verified rows, (R, H) each, and the token after each row, which the MTP
            layers have not seen; None if there are none.
    """

    def __init__(self, backend: Backend, capacity: int) -> None:
        self._backend, self._capacity = backend, capacity
        self.cache: Cache
        self.waiting: Waiting | None = None
        self._ids: Sequence[int] = []  # tokens of the cache and the one after them
        self._mark: tuple[int, object] | None = None
        self._drafting = False
        self._whole = False

    def begin(self, prompt: Sequence[int], drafting: bool) -> int:
        """Prepare for `prompt` and return how many of its tokens need not be run again.

        The MTP layers' rows depend on the token after each position too, so a moment counts only
        if that token is the same as well.
        """
        if drafting != self._drafting:
            self._whole, self._mark, self._drafting = False, None, drafting
        held = self._ids
        if self._whole and _begins(prompt, held):
            done = len(held) - 1
        elif self._mark is not None and _begins(prompt, held[: self._mark[0] + 1]):
            done, snapshot = self._mark
            self.cache.restore(snapshot)
            self.waiting = None
        else:
            done, self._mark, self.waiting = 0, None, None
            self._renew()
        self._ids = list(prompt[: done + 1])
        return done

    def _renew(self) -> None:
        """An empty cache; the old one goes first, for both together may not fit the memory."""
        self._whole = False  # until there is a new one, which memory may refuse
        if hasattr(self, "cache"):
            del self.cache
        self.cache = self._backend.new_cache(self._capacity)

    def mark(self) -> None:
        """The next prompt may continue from here; the token after this moment is known."""
        self._mark = self.cache.length, self.cache.snapshot()

    def busy(self) -> None:
        """A pass over the model begins: until `hold`, the cache is not to be continued from."""
        self._whole = False

    def hold(self, ids: Sequence[int], waiting: Waiting | None) -> None:
        """The cache holds all of `ids` but the last, the newest token. Neither is copied: what is
        added to them later counts only with the next call."""
        self._ids, self.waiting, self._whole = ids, waiting, True


def _begins(prompt: Sequence[int], held: Sequence[int]) -> bool:
    return list(prompt[: len(held)]) == list(held)

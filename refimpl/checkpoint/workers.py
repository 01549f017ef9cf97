"""Work spread over all cores whose results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD_PER_THREAD = 2
"""Pieces of work that wait or run for each thread; what bounds the memory."""


class Workers:
    """Threads for functions that let go of Python's lock, such as NumPy's and compiled ones.

    Use it as a context: at its end the threads are gone.
    """

    def __init__(self, threads: int | None = None) -> None:
        from refimpl.engine.threads import default_threads

        self.threads = threads or default_threads()
        self._pool = ThreadPoolExecutor(self.threads, "refimpl-convert")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def ordered(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """function(item) for each item, in order; items are taken as results are fetched."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > AHEAD_PER_THREAD * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""The engine's own threads: every thread calls the same compiled function at the same time."""

from __future__ import annotations

import os
import threading
import weakref
from queue import SimpleQueue
from typing import Any

from refimpl.errors import InputError

MAX_THREADS = 256


def default_threads() -> int:
    """The physical cores that this process may use."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, MAX_THREADS))


class Team:
    """`size` threads, the caller's included; the others sleep between calls.

    Raises:
        InputError: size is not between 1 and 256.
    """

    def __init__(self, size: int) -> None:
        if not 1 <= size <= MAX_THREADS:
            raise InputError(f"threads is {size}, expected 1 to {MAX_THREADS}")
        self.size = size
        self._tasks: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(size - 1)]
        for number, tasks in enumerate(self._tasks, 1):
            name = f"refimpl-engine-{number}"
            threading.Thread(target=_work, args=(number, tasks), name=name, daemon=True).start()
        self._finalizer = weakref.finalize(self, _stop, self._tasks)

    def run(self, function: Any, record: int) -> None:
        """Call `function(record, number)` on every thread; it must itself wait for all of them
        before it ends (it is a ctypes function, which lets go of the interpreter's lock)."""
        for tasks in self._tasks:
            tasks.put((function, record))
        function(record, 0)

    def settle(self) -> None:
        """Wait until every thread has left the last function.

        `run` returns when all have arrived at its end; some may still look at what they waited
        for, which must not be freed before.
        """
        left = [threading.Event() for _ in self._tasks]
        for tasks, event in zip(self._tasks, left, strict=True):
            tasks.put((lambda _record, _number, event=event: event.set(), 0))
        for event in left:
            event.wait()

    def close(self) -> None:
        """End the threads, after they have left the last function."""
        if self._finalizer.alive:
            self.settle()
        self._finalizer()


def _work(number: int, tasks: SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        function, record = task
        function(record, number)


def _stop(queues: list[SimpleQueue[Any]]) -> None:
    for tasks in queues:
        tasks.put(None)

"""Reading pieces of a file from the disk into given memory, by threads, past the page cache.

Direct reads leave the page cache to what is mapped, cost next to no processor time, and several at
once keep a disk as busy as it can be: on the virtual disk this was tried on, 1.5 times as fast as
the same bytes asked for by madvise(MADV_WILLNEED), 4.5 times as fast as page faults. Where a file
system has no direct reads, ordinary ones take their place and their pages are given back.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from refimpl.engine.memory import require_memory, round_up
from refimpl.errors import CheckpointError

_HUGE_PAGES = 14  # MADV_HUGEPAGE
BLOCK = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""
PIECE_BYTES = 1 << 20
"""Most bytes of one request: small enough that the last one of a few slices is soon done."""
READERS = 4
"""Requests at once. 2 to 16 were alike; 1 was slower by a sixth."""


def supported() -> bool:
    """Whether this system can read at an offset into given memory (Windows cannot)."""
    return hasattr(os, "preadv")


def span(offset: int, length: int) -> tuple[int, int]:
    """The whole blocks [low, high) around `length` bytes at `offset`."""
    return offset // BLOCK * BLOCK, round_up(offset + length, BLOCK)


class DirectFile:
    """A file that is read past the page cache.

    Args:
        size: bytes that it has to have.

    Attributes:
        direct: whether the system reads it past the page cache.

    Raises:
        CheckpointError: it cannot be opened or has another size.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        flag = getattr(os, "O_DIRECT", 0)
        try:
            self._plain = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened a second time ({error.strerror}); experts of a model "
                "larger than memory are read from it all the time"
            ) from None
        self._fd = self._plain
        if flag:
            with contextlib.suppress(OSError):  # a file system without direct reads
                self._fd = os.open(path, os.O_RDONLY | flag)
        self.direct = self._fd != self._plain
        if os.fstat(self._plain).st_size < size:
            self.close()
            raise CheckpointError(f"{path}: the file has shrunk; restore it and start again")

    def read(self, target: memoryview, offset: int, needed: int) -> None:
        """Fill `target` (n,), whole blocks, from `offset`; the file may end after `needed` bytes.

        Raises:
            CheckpointError: it ends before.
            OSError: the disk fails.
        """
        done = 0
        while done < needed:
            count = self._some(target[done:], offset + done)
            if not count:
                raise CheckpointError(
                    f"{self.path}: bytes of the file are gone while it is in use (it became "
                    "shorter); restore it and start again"
                )
            done += count
        if not self.direct:
            self.forget(offset, len(target))

    def _some(self, target: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [target], offset)
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
        self.direct = False  # opened as direct, yet not read so
        self._fd, direct = self._plain, self._fd
        os.close(direct)
        return os.preadv(self._fd, [target], offset)

    def forget(self, offset: int, length: int) -> None:
        """Let the page cache drop a part of the file, if nobody else holds it."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._plain, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it."""
        for fd in {self._fd, self._plain}:
            with contextlib.suppress(OSError):
                os.close(fd)


class Wanted:
    """Parts of a file that are being read; `ready` is called once with all of them in memory.

    If one fails, `ready` is called all the same, so that whoever waits goes on, and the error is
    kept in `Readers.error`.
    """

    __slots__ = ("left", "ready")

    def __init__(self, ready: Callable[[], None]) -> None:
        self.left, self.ready = 0, ready


class Readers:
    """Threads that read pieces of files.

    Attributes:
        bytes_read: from disks so far.
        busy_s: seconds in which at least one request was under way.
        error: the first failure, or None.
    """

    def __init__(self, threads: int = READERS) -> None:
        self.bytes_read, self.busy_s = 0, 0.0
        self.error: BaseException | None = None
        self._pending, self._since = 0, 0.0
        self._state = threading.Condition()
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._threads = threads
        for number in range(threads):
            name = f"refimpl-reader-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def ask(
        self, file: DirectFile, offset: int, length: int, target: memoryview, ready: Any
    ) -> None:
        """Read `length` bytes at `offset`; in `target`, whole blocks, they lie behind the rest of
        their first block. `ready` is called when they are there."""
        low, high = span(offset, length)
        starts = range(low, high, PIECE_BYTES)
        wanted = Wanted(ready)
        wanted.left = len(starts)
        with self._state:
            if not self._pending:
                self._since = time.perf_counter()
            self._pending += len(starts)
        for start in starts:
            stop = min(start + PIECE_BYTES, high)
            needed = min(stop, offset + length) - start
            part = target[start - low : stop - low]
            self._tasks.put((file, part, start, needed, wanted))

    def settle(self) -> None:
        """Wait until nothing is being read."""
        with self._state:
            self._state.wait_for(lambda: not self._pending)

    def close(self) -> None:
        """End the threads."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            file, part, start, needed, wanted = task
            error: BaseException | None = None
            try:
                file.read(part, start, needed)
            except BaseException as failure:
                error = failure
            with self._state:
                self.error = self.error or error
                wanted.left -= 1
                if not wanted.left:
                    wanted.ready()
                self.bytes_read += len(part)
                self._pending -= 1
                if not self._pending:
                    self.busy_s += time.perf_counter() - self._since
                    self._state.notify_all()
            del task, part


def anonymous(size: int) -> mmap.mmap:
    """Memory to read into, in huge pages where the system has them: every request names the pages
    that it fills, and a few large ones are quickly named."""
    names = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_NORESERVE")
    flags = sum(getattr(mmap, name, 0) for name in names)
    made = mmap.mmap(-1, size, flags=flags)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        made.madvise(_HUGE_PAGES)
    return made


def slice_speed(
    slices: Sequence[tuple[str, int, int]], size_bytes: int = 256 << 20, repetitions: int = 3
) -> tuple[float, ...]:
    """Bytes per second of reading slices in random order as `Readers` does, one per repetition.

    What is on the disk's own or a host's cache cannot be told from what is not.

    Args:
        slices: path, offset and length of each.
        size_bytes: to read in a repetition, about.

    Raises:
        CheckpointError: a file cannot be read.
        InputError: no memory for the buffers.
    """
    longest = max(length for _, _, length in slices)
    stride = round_up(longest + 2 * BLOCK, BLOCK)
    count = max(1, min(size_bytes // longest, len(slices)))
    require_memory(count * stride, "the disk probe", "free memory")
    memory = memoryview(anonymous(count * stride))
    memory[:: mmap.PAGESIZE] = bytes(len(memory[:: mmap.PAGESIZE]))  # pages are there beforehand
    files = {path: DirectFile(path, 0) for path in {path for path, _, _ in slices}}
    readers, speeds = Readers(), []
    try:
        for repetition in range(repetitions):
            chosen = random.Random(repetition).sample(range(len(slices)), count)
            before, began = readers.bytes_read, time.perf_counter()
            for number, i in enumerate(chosen):
                path, offset, length = slices[i]
                low, high = span(offset, length)
                target = memory[number * stride : number * stride + high - low]
                readers.ask(files[path], offset, length, target, int)
            readers.settle()
            if readers.error is not None:
                raise readers.error
            speeds.append((readers.bytes_read - before) / (time.perf_counter() - began))
    finally:
        readers.close()
        for file in files.values():
            file.close()
    return tuple(speeds)

"""The checkpoint files under a running engine: still whole, in memory, brought into memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.checkpoint.stored import StoredTensor
from refimpl.engine.memory import available_bytes
from refimpl.errors import CheckpointError

_POPULATE_READ = 22  # MADV_POPULATE_READ (Linux 5.14)
_PART = 64 << 20
_SPARE_BYTES = 1 << 30  # left beside a file that is kept in memory whole
LARGE_BYTES = 256 << 20
"""Files below this are read so fast that nobody asks for them beforehand."""


@dataclass(frozen=True)
class MappedFile:
    """A file that tensors lie in.

    Attributes:
        path: for messages.
        size: bytes when it was opened.
        address: where the map begins.
    """

    path: str
    mapped: mmap.mmap
    size: int
    address: int

    @classmethod
    def of(cls, mapped: mmap.mmap, path: str) -> MappedFile:
        """The file behind a memory map."""
        start = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        return cls(path, mapped, len(mapped), int(start))

    def check(self) -> None:
        """Refuse to go on if the file has become shorter.

        Raises:
            CheckpointError: it has; reading what is gone would end the process.
        """
        now = self.mapped.size()
        if now < self.size:
            raise CheckpointError(
                f"{self.path}: the file shrank from {self.size} to {now} bytes while it was in "
                "use; restore it and start again"
            )

    def release(self, start: int, length: int) -> None:
        """Take whole pages of a part out of the process's memory; touched again, they are read
        again."""
        page = mmap.PAGESIZE
        low, high = -(-start // page) * page, (start + length) // page * page
        if low < high:
            with contextlib.suppress(OSError, AttributeError, ValueError):
                self.mapped.madvise(mmap.MADV_DONTNEED, low, high - low)

    def resident_bytes(self) -> int | None:
        """Bytes of the file that are in memory, or None where the system does not say."""
        page = mmap.PAGESIZE
        state = np.zeros(-(-self.size // page), dtype=np.uint8)
        try:
            mincore = ctypes.CDLL(None, use_errno=True).mincore
        except (AttributeError, OSError, TypeError):
            return None
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        if mincore(self.address, self.size, state.ctypes.data):
            return None
        return min(int(np.count_nonzero(state & 1)) * page, self.size)


def path_of(tensor: StoredTensor) -> str:
    """The path of the file that a tensor lies in."""
    return tensor.where.partition(": tensor ")[0]


def map_under(array: Any) -> mmap.mmap | None:
    """The memory map that an array is a view of, or None."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def fits_memory(files: Sequence[MappedFile], beside: int = 0) -> bool:
    """Whether the files can be in memory whole, `beside` bytes of other needs included."""
    needed = sum(file.size for file in files) + beside + _SPARE_BYTES
    return bool(needed <= available_bytes())


def read_whole(files: Sequence[MappedFile], progress: Callable[[int, int], None]) -> bool:
    """Read files into memory if they are large and fit; whether they were read."""
    if sum(file.size for file in files) < LARGE_BYTES or not fits_memory(files):
        return False
    populate(files, progress)
    return True


def populate(files: Sequence[MappedFile], progress: Callable[[int, int], None]) -> None:
    """Read the files into memory and into the process's page tables, in order.

    One sequential pass is several times as fast as the page faults of scattered experts.

    Args:
        progress: called with (bytes done, bytes in all).
    """
    populate_parts([(file, 0, file.size) for file in files], progress)


def populate_parts(
    parts: Sequence[tuple[MappedFile, int, int]], progress: Callable[[int, int], None]
) -> None:
    """As `populate`, for parts (file, start, length) of files; starts are whole pages."""
    total, done = sum(length for _, _, length in parts), 0
    for file, first, length in parts:
        for start in range(0, length, _PART):
            file.check()
            size = min(_PART, length - start)
            _touch(file, first + start, size)
            progress(done + start + size, total)
        done += length


def _touch(file: MappedFile, start: int, length: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        file.mapped.madvise(_POPULATE_READ, start, length)
        return
    part = np.frombuffer(file.mapped, dtype=np.uint8, count=length, offset=start)
    part[:: mmap.PAGESIZE].max()  # an older system: one byte of every page


def disk_bytes_read() -> int | None:
    """Bytes that this process has read from disks so far, or None where nobody counts them."""
    if not os.path.exists("/proc/self/io"):
        return None
    with contextlib.suppress(OSError, ValueError), open("/proc/self/io", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "read_bytes":
                return int(value)
    return None

"""How fast a disk is read: in order, and expert by expert, cold and from the system's memory.

A file of random bytes is written, forced to the disk and taken out of the system's memory, which
is checked. Below a virtual machine's disk there may be a cache of the host that nobody can empty.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.engine.files import MappedFile
from refimpl.errors import InputError

EXPERT_BYTES = 4096 * 1280 * 18 // 32
"""One matrix of one routed expert of the published model (hidden size times expert width), Q4_0."""

_PART = 8 << 20
_SLOT = 1 << 22  # where expert-sized reads begin: a multiple of it
_SMALLEST = 64 << 20
_SPARE_BYTES = 2 << 30
_BUDGET_S = 5.0  # of each kind of reading, and of writing
_STILL_THERE = 0.02  # share of the file in memory beyond which it is not cold
_F_NOCACHE = 48  # macOS


@dataclass(frozen=True)
class DiskSpeeds:
    """Bytes per second of each sample.

    Attributes:
        sequential, random: cold, or empty where the file could not be taken out of memory.
        warm_sequential, warm_random: from the system's memory.
        size_bytes: of the file.
        readers: threads of the expert-sized reads.
    """

    sequential: tuple[float, ...]
    random: tuple[float, ...]
    warm_sequential: tuple[float, ...]
    warm_random: tuple[float, ...]
    size_bytes: int
    readers: int


def read_disk(folder: Path, readers: int, size_bytes: int = 1 << 30) -> DiskSpeeds:
    """Write a file into a folder, read it in all four ways, remove it.

    Args:
        readers: threads that read expert-sized pieces at the same time.
        size_bytes: of the file; less where writing takes longer than five seconds.

    Raises:
        InputError: there is no room for the file, or the system lacks positioned reads.
        OSError: the folder cannot be written.
    """
    if not hasattr(os, "preadv"):
        raise InputError("this system has no positioned reads (preadv), the disk is not measured")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < size_bytes + _SPARE_BYTES:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB are free, the disk probe needs "
            f"{(size_bytes + _SPARE_BYTES) / 1e9:.1f} GB; name another folder"
        )
    with tempfile.TemporaryFile(dir=folder) as file, _mapped(file.fileno(), size_bytes) as seen:
        handle, size = file.fileno(), seen[1]
        cold = _forget(handle, seen[0])
        sequential = _in_order(handle, size) if cold else ()
        cold = cold and _forget(handle, seen[0])
        random = _expert_by_expert(handle, size, readers) if cold else ()
        _remember(handle)
        _in_order(handle, size, None)
        warm, warm_random = _in_order(handle, size), _expert_by_expert(handle, size, readers)
        return DiskSpeeds(sequential, random, warm, warm_random, size, readers)


@contextlib.contextmanager
def _mapped(handle: int, wanted: int) -> Iterator[tuple[MappedFile, int]]:
    """Fill the file; its map (to ask what is in memory), and its size."""
    size = _fill(handle, wanted)
    os.fsync(handle)
    with mmap.mmap(handle, size, access=mmap.ACCESS_READ) as mapped:
        yield MappedFile.of(mapped, "the probe's file"), size


def _fill(handle: int, wanted: int) -> int:
    """Write random bytes: at most `wanted`, and for at most the budget; how many."""
    began, written = time.perf_counter(), 0
    random = np.random.default_rng(1)
    while written < wanted:
        os.write(handle, random.bytes(_PART))
        os.fsync(handle)  # so that the clock counts the disk, not the memory before it
        written += _PART
        if written >= _SMALLEST and time.perf_counter() - began > _BUDGET_S:
            break
    return written


def _forget(handle: int, file: MappedFile) -> bool:
    """Take the file out of the system's memory; whether that worked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        there = file.resident_bytes()
        return there is not None and there <= _STILL_THERE * file.size
    return _bypass(handle, 1)


def _remember(handle: int) -> None:
    if not hasattr(os, "posix_fadvise"):
        _bypass(handle, 0)


def _bypass(handle: int, on: int) -> bool:
    """macOS: read past the system's memory, or not."""
    try:
        import fcntl

        fcntl.fcntl(handle, _F_NOCACHE, on)
    except (ImportError, OSError):
        return False
    return True


def _timed(read: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = read()
    return count / (time.perf_counter() - began)


def _in_order(handle: int, size: int, budget: float | None = _BUDGET_S) -> tuple[float, ...]:
    """Parts of 8 MiB one after the other; samples are of four parts."""
    buffer = mmap.mmap(-1, _PART)
    began, speeds = time.perf_counter(), []
    for first in range(0, size, 4 * _PART):
        places = range(first, min(first + 4 * _PART, size), _PART)

        def read(places: range = places) -> int:
            return sum(os.preadv(handle, [buffer], at) for at in places)

        speeds.append(_timed(read))
        if budget is not None and time.perf_counter() - began > budget:
            break
    return tuple(speeds)


def _expert_by_expert(handle: int, size: int, readers: int) -> tuple[float, ...]:
    """Every place at most once, in random order, `readers` at the same time."""
    places = np.random.default_rng(2).permutation(size // _SLOT) * _SLOT
    buffers = [mmap.mmap(-1, EXPERT_BYTES) for _ in range(readers)]

    def read(number: int, at: int) -> int:
        return os.preadv(handle, [buffers[number]], at)

    began, speeds, group = time.perf_counter(), [], max(readers, 8) // readers * readers
    with ThreadPoolExecutor(readers) as pool:
        for first in range(0, len(places) - group + 1, group):
            some = [int(p) for p in places[first : first + group]]

            def batch(some: list[int] = some) -> int:
                turns = range(0, group, readers)
                return sum(
                    sum(pool.map(read, range(readers), some[t : t + readers])) for t in turns
                )

            speeds.append(_timed(batch))
            if time.perf_counter() - began > _BUDGET_S:
                break
    return tuple(speeds)

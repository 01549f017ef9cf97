"""Measuring this host: memory, arithmetic, threads and disk, each figure with its spread.

A figure is the median of its samples, `low` and `high` are their quartiles. Memory is measured at
the beginning and once more at the end; where the two disagree, where samples scatter, or where
other programs compute at the same time, the machine is *busy* and says so (`HostProbe.doubts`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.others import OTHERS, other_cores

AGREEMENT = 0.10  # of the memory's speed at the end with that at the beginning
SPREAD = 0.15  # quartiles of memory and arithmetic apart, over their median

_MEMORY_TIME_S = 2.0  # for each number of threads
_MATRIX = 1536
_MATRIX_REPETITIONS = 10
_SETTLE_S = 0.3
_SMALL_CACHES_BYTES = 128 << 20
CACHE_BYTES = 8 << 20  # in the last cache of a processor that engines are fast on
_CACHE_REPETITIONS = 400
_LARGEST_BYTES = 4 << 30

Note = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Figure:
    """One measured figure in the SI unit that its key names.

    Attributes:
        key: dotted, as in a device file (`bandwidth.measured_bytes_per_s`).
        samples: at least one, as measured.
        note: how it was measured, one phrase.
        judged: whether a wide spread means that the machine is busy.
    """

    key: str
    samples: tuple[float, ...]
    note: str
    judged: bool = True

    @property
    def value(self) -> float:
        """Median of the samples."""
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; the sample itself where there is one only."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The quartiles' distance over the median."""
        low, high = self.quartiles
        return (high - low) / self.value

    def json(self) -> dict[str, Any]:
        """With every sample."""
        low, high = self.quartiles
        return {"value": self.value, "low": low, "high": high, "note": self.note,
                "samples": list(self.samples)}  # fmt: skip


@dataclass(frozen=True)
class HostProbe:
    """What a probe found.

    Attributes:
        figures: in the order measured.
        doubts: why the figures may be too low, a sentence each; none on a quiet machine.
        remarks: what was not measured, and why.
        threads: of the figures that use all of them.
        started: seconds since the epoch.
        state: of the machine at the beginning (`refimpl.benchmark.host.machine_state`).
        cache_bytes: of all last-level caches together, 0 where the system does not tell.
    """

    figures: tuple[Figure, ...]
    doubts: tuple[str, ...]
    remarks: tuple[str, ...]
    threads: int
    started: float
    seconds: float
    state: dict[str, Any] = field(default_factory=dict)
    cache_bytes: int = 0

    def figure(self, key: str) -> Figure | None:
        """The figure of a key, None where it was not measured."""
        return next((f for f in self.figures if f.key == key), None)


def thread_counts(threads: int) -> tuple[int, ...]:
    """Numbers of threads that memory is read with: all up to 8, then doublings, and all."""
    many = [8 << i for i in range(1, 12)]
    return tuple(sorted({n for n in (*range(1, 9), *many) if n <= threads} | {threads}))


def beyond_caches(caches: int, free: int, threads: int) -> int:
    """Size of the array that memory is read from, bytes: eight times all caches, at least 1 GiB.

    Args:
        caches: bytes of last-level cache, or 0 where the system does not tell.
        free: bytes of free memory, of which at most a quarter is used.
    """
    wanted = max(8 * (caches or _SMALL_CACHES_BYTES), 1 << 30, threads << 22)
    return int(min(wanted, _LARGEST_BYTES, max(free // 4, 16 << 20)))


def last_level_bytes() -> int:
    """Bytes of all last-level caches together, 0 where the system does not tell."""
    found: dict[str, tuple[int, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, text, shared = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "size", "shared_cpu_list")
            )
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
            found[f"{level}/{shared}"] = int(level), int(text[:-1]) * unit[text[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    highest = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == highest)


def judge(figures: Sequence[Figure], before: float, after: float, others: float) -> list[str]:
    """Why a machine was not quiet, a sentence each.

    Args:
        before, after: bytes/s of memory at the beginning and at the end.
        others: cores that other programs used before it began.
    """
    doubts = []
    if others > OTHERS:
        doubts.append(f"other programs were using {others:.1f} cores before the probe began")
    if abs(after / before - 1) > AGREEMENT:
        doubts.append(
            f"memory was read at {before / 1e9:.1f} GB/s at the beginning and at "
            f"{after / 1e9:.1f} GB/s at the end, expected within {AGREEMENT:.0%}"
        )
    for f in figures:
        if f.judged and f.spread > SPREAD:
            doubts.append(
                f"{f.key} scatters by {f.spread:.0%} (quartiles over median), expected at most "
                f"{SPREAD:.0%}"
            )
    return doubts


def probe_host(
    threads: int, disk: Path | None, note: Note, progress: Progress = lambda *_: None
) -> HostProbe:
    """Measure this host; takes half a minute on two cores.

    Args:
        threads: all threads that engines would use.
        disk: folder whose disk is measured, or None.

    Raises:
        InputError: not enough memory.
        OSError: the folder cannot be written.
    """
    import psutil

    from refimpl.benchmark.host import machine_state

    started, clock = time.time(), time.perf_counter()
    others = other_cores()
    state = machine_state()
    counts = thread_counts(threads)
    caches = last_level_bytes()
    size = beyond_caches(caches, psutil.virtual_memory().available, threads)
    stages: list[Callable[[], list[Figure]]] = [
        *(lambda n=n: [_memory(n, size, n == threads)] for n in counts),
        lambda: _cache(threads, caches),
        lambda: _arithmetic(threads),
        lambda: _waiting(threads),
    ]
    remarks: list[str] = []
    if disk is not None:
        stages.append(lambda: _disk(disk, threads, remarks))
    figures: list[Figure] = []
    for number, stage in enumerate(stages):
        progress(number, len(stages) + 1)
        for made in stage():
            figures.append(made)
            note(line(made))
    progress(len(stages), len(stages) + 1)
    before = next(f for f in figures if f.key == f"bandwidth.by_threads.{threads}")
    after = _memory(threads, size, True)
    progress(len(stages) + 1, len(stages) + 1)
    both = Figure(
        "bandwidth.measured_bytes_per_s", (*before.samples, *after.samples),
        f"{threads} threads, at the beginning and at the end; {before.note.partition('; ')[2]}",
    )  # fmt: skip
    figures.insert(0, both)
    return HostProbe(
        tuple(figures), tuple(judge(figures, before.value, after.value, others)), tuple(remarks),
        threads, started, time.perf_counter() - clock, state, caches,
    )  # fmt: skip


def line(f: Figure) -> str:
    """A figure with its quartiles, for the screen."""
    low, high = f.quartiles
    unit, factor = _UNITS[f.key.partition(".")[0]]
    name = f.key.replace("_bytes_per_s", "").replace("_per_s", "")
    return f"{name}: {f.value / factor:.4g} {unit} ({low / factor:.4g} to {high / factor:.4g})"


_UNITS = {
    "bandwidth": ("GB/s", 1e9), "disk": ("GB/s", 1e9), "flop": ("Gop/s", 1e9),
    "overhead": ("us", 1e-6),
}  # fmt: skip


def _memory(threads: int, size: int, longer: bool) -> Figure:
    import contextlib

    from refimpl.engine.probe import read_bandwidth
    from refimpl.engine.threads import Team

    time.sleep(_SETTLE_S)
    with contextlib.closing(Team(threads)) as team:
        (first,) = read_bandwidth(team, size, 1)
        wanted = _MEMORY_TIME_S * (1.0 if longer else 0.7)
        count = max(8, min(200, int(wanted * first / size)))
        speeds = read_bandwidth(team, size, count)
    note = f"{_threads(threads)}; each sample reads {size / 1e9:.2f} GB"
    return Figure(f"bandwidth.by_threads.{threads}", speeds, note)


def cache_speeds(threads: int) -> tuple[float, ...]:
    """Bytes/s that all threads read of an array that stays in the last cache."""
    import contextlib

    from refimpl.engine.probe import read_bandwidth
    from refimpl.engine.threads import Team

    with contextlib.closing(Team(threads)) as team:
        return read_bandwidth(team, CACHE_BYTES, _CACHE_REPETITIONS)


def _cache(threads: int, caches: int) -> list[Figure]:
    """Nothing where no cache is known that holds the array and more."""
    if caches < 2 * CACHE_BYTES:
        return []
    note = f"{_threads(threads)}; each sample reads {CACHE_BYTES / 1e6:.1f} MB that stay in cache"
    return [Figure("bandwidth.cache_bytes_per_s", cache_speeds(threads), note, judged=False)]


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _arithmetic(threads: int) -> list[Figure]:
    import contextlib

    from refimpl.engine.probe_compute import KERNEL_DTYPES, kernel_throughput
    from refimpl.engine.simd import choose_simd
    from refimpl.engine.threads import Team

    blas = f"{_threads(threads)}; float32 product of {_MATRIX} x {_MATRIX} matrices in BLAS"
    out = [Figure("flop.measured_fp32_per_s", _blas(threads), blas)]
    with contextlib.closing(Team(threads)) as team:
        for dtype in KERNEL_DTYPES:
            speeds = kernel_throughput(team, dtype)
            if speeds is not None:
                note = f"{_threads(threads)}; refimpl's {choose_simd().name} kernel within caches"
                out.append(Figure(f"flop.measured_{dtype}_per_s", speeds, note))
    return out


def _blas(threads: int) -> tuple[float, ...]:
    import numpy as np
    from threadpoolctl import threadpool_limits

    a = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    out = np.empty_like(a)
    speeds = []
    with threadpool_limits(threads):
        for _ in range(_MATRIX_REPETITIONS + 2):  # two warm up
            began = time.perf_counter()
            np.matmul(a, a, out=out)
            speeds.append(2.0 * _MATRIX**3 / (time.perf_counter() - began))
    return tuple(speeds[2:])


def _waiting(threads: int) -> list[Figure]:
    import contextlib

    from refimpl.engine.probe_compute import waiting_times
    from refimpl.engine.threads import Team

    with contextlib.closing(Team(threads)) as team:
        launches, barriers = waiting_times(team)
    note = f"{_threads(threads)} of refimpl's engine"
    return [
        Figure("overhead.launch_s", launches, f"starting and joining {note}", judged=False),
        Figure("overhead.barrier_s", barriers, f"a barrier of {note}", judged=False),
    ]


def _disk(folder: Path, threads: int, remarks: list[str]) -> list[Figure]:
    from refimpl.engine.probe_disk import EXPERT_BYTES, read_disk
    from refimpl.errors import InputError

    readers = max(1, min(threads, 16))
    try:
        found = read_disk(folder, readers)
    except InputError as error:
        remarks.append(f"disk: {error}")
        return []
    if not found.sequential or not found.random:
        remarks.append("disk: the system keeps the file in memory, so cold reads were not measured")
    file = f"file of {found.size_bytes / 1e9:.2f} GB"
    expert = f"{EXPERT_BYTES / 1e6:.2f} MB at random places, {_threads(readers)}; {file}"
    named = (
        ("disk.read_bytes_per_s", found.sequential, f"in order, cold; {file}"),
        ("disk.random_read_bytes_per_s", found.random, f"{expert}, cold"),
        ("disk.warm_read_bytes_per_s", found.warm_sequential, f"in order, in memory; {file}"),
        ("disk.warm_random_read_bytes_per_s", found.warm_random, f"{expert}, in memory"),
    )
    return [Figure(key, samples, note, judged=False) for key, samples, note in named if samples]

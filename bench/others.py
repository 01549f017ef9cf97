"""How much of the processors other programs use, while programs of ours may run beside.

The time of every process that this one did not start, itself or by its children, is read before
and after a short wait. Of processes that come and go in it, the one that collects them tells.
Loops that keep processors awake (`bench.awake`) are children and do not count. Programs outside
this container or virtual machine are not seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

OTHER_CORES = "other_cores"  # key of a round's state
OTHERS = 0.20  # cores' worth of other programs that disturb a measurement
INTERVAL_S = 0.5

Key = tuple[int, float]  # number and start of a process: numbers are used again


@dataclass(frozen=True)
class Used:
    """Processor time of one process, seconds: its own, and of ended ones that it collected."""

    own: float
    collected: float


def other_cores(
    interval_s: float = INTERVAL_S, wait: Callable[[float], None] = time.sleep
) -> float:
    """Cores that other programs keep busy: 1.0 is one of them all the time."""
    began, before = time.perf_counter(), _others()
    wait(interval_s)
    after, ended = _others(), time.perf_counter()
    return round(used_between(before, after) / (ended - began), 3)


def used_between(before: dict[Key, Used], after: dict[Key, Used]) -> float:
    """Seconds that the processes of two readings used between them.

    What a process used until it ended is in the `collected` time of its parent, with what it had
    used before the first reading, which is taken off.
    """
    none = Used(0.0, 0.0)
    own = sum(u.own - before.get(k, none).own for k, u in after.items())
    collected = sum(u.collected - before.get(k, none).collected for k, u in after.items())
    gone = sum(u.own + u.collected for k, u in before.items() if k not in after)
    return max(0.0, own) + max(0.0, collected - gone)


def _others() -> dict[Key, Used]:
    """All processes that may be read but this one and what it started."""
    import psutil

    parents: dict[int, int] = {}
    found: dict[Key, Used] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error), process.oneshot():
            if not process.pid:  # what Windows counts idle time under
                continue
            times = process.cpu_times()
            collected = getattr(times, "children_user", 0.0) + getattr(
                times, "children_system", 0.0
            )
            parents[process.pid] = process.ppid()
            key = process.pid, process.create_time()
            found[key] = Used(times.user + times.system, collected)
    own = _descendants(psutil.Process().pid, parents)
    return {key: used for key, used in found.items() if key[0] not in own}


def _descendants(root: int, parents: dict[int, int]) -> set[int]:
    """A process and all that it started, directly or not."""
    found, newest = {root}, {root}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - found
        found |= newest
    return found

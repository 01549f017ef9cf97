"""Interleaved timing: A B A B in one run, with the memory's speed probed before and after.

A *round* measures every arm once, one after the other, each between two probes of the read
bandwidth. Rounds are appended to a file of JSON lines as they finish, so a run can be cut short
(Ctrl-C) and gone on with at any later moment; nothing but the unfinished round is lost.

A round is *quiet* if its probes agree within 10 % and all reach 90 % of the best probe seen on the
machine, and if other programs used no more than a fifth of a core before it (`bench.others`; rounds
that do not say count as if none had), else *busy*; a busy one whose probes agree is *steady*. The
same is asked of one arm, or of
two that are compared, by the probes beside them: where another user of the memory comes or goes in
the middle of a round, the other arms still count. With a `Gate` each arm waits until the probe is
near the best.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from bench.others import OTHER_CORES, OTHERS
from bench.runners.base import Measurement, Runner, RunnerError, RunnerTest
from hwmodel.errors import RunFileError

AGREEMENT = 0.10  # of the probe after a round with the one before it
NEAR_BEST = 0.90  # of the best probe seen
CONFIDENCE = 0.95
FORMAT = 1
_BACKWARDS = 1 << 16  # bytes at a time

Probe = Callable[[], Sequence[float]]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One competitor of a case: who runs which test, under a name unique in the case.

    Arms beside each other with the same `turns` are measured at once, by a runner that lets them
    take turns in one process (`measure_together`), without a probe between them.
    """

    label: str
    runner: Runner
    test: RunnerTest
    turns: str = ""


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        case: what was measured.
        started: seconds since the epoch.
        host: name of the processor and number of threads of the probe: rounds of one host are
            judged together.
        probe_before, probe_after: bytes per second, each repetition of the probe.
        between: the probe after each arm but the last.
        state: load and memory of the machine when the round began, and under `OTHER_CORES` what
            other programs used of it.
        arms: measurement of each arm by its label, in the order in which they were run.
        failed: what went wrong with the arms that gave none.
        waited: the last probe before the arms that a `Gate` let wait after the one between.
    """

    case: str
    started: float
    host: str
    probe_before: tuple[float, ...]
    probe_after: tuple[float, ...]
    state: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Measurement] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    between: dict[str, tuple[float, ...]] = field(default_factory=dict)
    waited: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def probe(self) -> float:
        """Read bandwidth of the round, bytes/s: median of its probes."""
        return median(self.probes())

    @property
    def others(self) -> float:
        """Cores that other programs used before the round; 0 where it does not say."""
        return float(self.state.get(OTHER_CORES, 0.0))

    @property
    def kernels(self) -> str:
        """Hash of the engine's compiled sources in the round, with that of the draft-and-verify
        loop where it ran; '' without the engine."""
        own = [m.record for m in self.arms.values() if m.engine == "refimpl"]
        found = (next((str(r[k]) for r in own if r.get(k)), "") for k in ("kernels", "loop"))
        return " loop ".join(h for h in found if h)

    def probes(self, *labels: str) -> list[float]:
        """Medians of the probes, bytes/s: those before and after the arms named, or all."""
        order = [*self.arms]
        found = [median(self.probe_before)]
        found += [median(self.between[k]) for k in order[:-1] if k in self.between]
        found.append(median(self.probe_after))
        if not labels or len(found) != len(order) + 1:
            return found
        beside: list[float] = []
        for k in labels:
            place = order.index(k)
            before = median(self.waited[k]) if k in self.waited else found[place]
            beside += [before, found[place + 1]]
        return beside

    def is_steady(self, *labels: str) -> bool:
        """Whether the probes beside the arms named (or all probes) agree."""
        if self.waited and not labels:
            return all(self.is_steady(k) for k in self.arms)
        found = self.probes(*labels)
        return max(found) / min(found) - 1 <= AGREEMENT

    def is_quiet(self, best: float, *labels: str) -> bool:
        """Whether absolute figures of the arms named (or of the round) count; `best` is the best
        probe, bytes/s."""
        if self.waited and not labels:
            return all(self.is_quiet(best, k) for k in self.arms)
        near = min(self.probes(*labels)) >= NEAR_BEST * best
        return near and self.is_steady(*labels) and self.others <= OTHERS


@dataclass(frozen=True)
class Ratio:
    """Median of ratios between two arms of the same rounds, with an interval for that median.

    `coverage` is the chance that such an interval holds the true median: at least 0.95 where
    there are rounds enough (six), else that of the whole range.
    """

    value: float
    low: float
    high: float
    rounds: int
    coverage: float


class NotQuiet(RunnerError):
    """The memory did not become quiet in time."""


class Gate:
    """Lets an arm begin only while the memory is near its best.

    Args:
        best: the best probe seen on this host, bytes/s.
        patience_s: the longest wait for one arm, seconds.
        pause: called between probes; what it does may make the memory quiet.
        clock: of the machine, in seconds.
    """

    def __init__(
        self,
        best: float,
        patience_s: float,
        pause: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.best, self._patience_s, self._pause, self._clock = best, patience_s, pause, clock

    def wait(self, probe: Probe, last: Sequence[float] = ()) -> tuple[float, ...]:
        """The first probe near the best, beginning with the `last` one if that is known.

        Raises:
            NotQuiet: there was none in time.
        """
        until = self._clock() + self._patience_s
        found = tuple(last) or tuple(probe())
        while (speed := median(found)) < NEAR_BEST * self.best:
            if self._clock() >= until:
                raise NotQuiet(
                    f"memory was not quiet within {self._patience_s:g} s: it was read at "
                    f"{speed / 1e9:.1f} GB/s, the best seen on this host is "
                    f"{self.best / 1e9:.1f}; what was measured is kept, go on later"
                )
            self._pause()
            found = tuple(probe())
        self.best = max(self.best, speed)
        return found


def run_rounds(
    case: str,
    arms: Sequence[Arm],
    rounds: int,
    probe: Probe,
    host: str,
    keep: Callable[[Round], None],
    state: Callable[[], dict[str, Any]] = dict,
    note: Note = lambda _: None,
    gate: Gate | None = None,
) -> int:
    """Run rounds and hand each to `keep` as it ends; returns how many were finished.

    An arm that fails is left out of its round and named in it. Ctrl-C ends the run; what `keep`
    has been given stays. With a `gate` every arm waits for quiet memory.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the finished rounds were kept.
        NotQuiet: an arm waited in vain; the arms before it were kept as a round.
        RunnerError: every arm of a round failed.
    """
    for number in range(rounds):
        began, before = time.time(), gate.wait(probe) if gate else tuple(probe())
        now = state()
        done: dict[str, Measurement] = {}
        failed: dict[str, str] = {}
        after: dict[str, tuple[float, ...]] = {}
        waited: dict[str, tuple[float, ...]] = {}
        newest, late = before, None
        for group in _groups(arms):
            try:
                if gate and (quiet := gate.wait(probe, newest)) != newest:
                    waited.update((arm.label, quiet) for arm in group)
                done.update(_measured(group))
                newest = after[group[-1].label] = tuple(probe())
            except NotQuiet as error:
                late = error
                break
            except RunnerError as error:
                for arm in group:
                    failed[arm.label] = str(error)
                    note(f"{case}: {arm.label} failed: {error}")
        if not done:
            raise late or RunnerError(
                f"{case}: nothing could be measured: {next(iter(failed.values()))}"
            )
        last = after.pop([*done][-1])
        made = Round(case, began, host, before, last, now, done, failed, after, waited)
        keep(made)
        note(f"{case} {number + 1}/{rounds}: {_line(made)}")
        if late:
            raise late
    return rounds


def _groups(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms that are measured at once."""
    keys = [(arm.turns or number, number) for number, arm in enumerate(arms)]
    grouped = itertools.groupby(keys, lambda key: key[0])
    return [[arms[number] for _, number in group] for _, group in grouped]


def _measured(group: Sequence[Arm]) -> dict[str, Measurement]:
    first = group[0]
    if len(group) == 1:
        return {first.label: first.runner.measure(first.test)}
    together: Any = first.runner
    found = together.measure_together([arm.test for arm in group])
    return {arm.label: m for arm, m in zip(group, found, strict=True)}


def _line(made: Round) -> str:
    arms = ", ".join(f"{k} {m.median_ts:.1f}" for k, m in made.arms.items())
    return f"{arms} tokens/s; memory {made.probe / 1e9:.1f} GB/s{others_text(made)}"


def others_text(made: Round) -> str:
    """What to say of other programs that disturbed a round; nothing where none did."""
    return f"; other programs used {made.others:.1f} cores" if made.others > OTHERS else ""


def append_round(path: Path, made: Round) -> None:
    """Add a round to the end of a file, on the disk before this returns.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps({"format": FORMAT, **asdict(made)}, allow_nan=False)
    with open(path, "a+b") as file:
        _drop_cut_line(file)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(file: BinaryIO) -> None:
    """Take off a last line that an earlier run did not finish; it would spoil the next one."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BACKWARDS)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    file.truncate(end)


def read_rounds(path: Path) -> list[Round]:
    """All rounds of a file, oldest first; a last line that was cut short is passed over.

    Raises:
        RunFileError: the file cannot be read, or a line is no round.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RunFileError(f"{path}: cannot be read ({reason})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            found.append(_round(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise RunFileError(
                f"{path}: line {number} is no round of an interleaved run ({error})"
            ) from None
    return found


def _round(data: dict[str, Any]) -> Round:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, expected {FORMAT}")
    arms = {k: Measurement.from_json(m) for k, m in data["arms"].items()}
    made = Round(
        str(data["case"]), float(data["started"]), str(data["host"]),
        tuple(map(float, data["probe_before"])), tuple(map(float, data["probe_after"])),
        dict(data["state"]), arms, dict(data["failed"]),
        *({k: tuple(map(float, v)) for k, v in data.get(name, {}).items()}
          for name in ("between", "waited")),
    )  # fmt: skip
    probes = [made.probe_before, made.probe_after, *made.between.values(), *made.waited.values()]
    if not made.others >= 0:
        raise ValueError(f"other programs used {made.others} cores")
    if not all(p and min(p) > 0 for p in probes):
        raise ValueError("a probe without a speed")
    return made


def best_probe(rounds: Iterable[Round]) -> dict[str, float]:
    """The best probe seen on each host, bytes/s: best median of any probe."""
    best: dict[str, float] = {}
    for r in rounds:
        waited = map(median, r.waited.values())
        best[r.host] = max(*r.probes(), *waited, best.get(r.host, 0.0))
    return best


def quiet_rounds(rounds: Iterable[Round], best: dict[str, float]) -> list[Round]:
    """Those whose absolute figures count; `best` from `best_probe`."""
    return [r for r in rounds if r.is_quiet(best[r.host])]


def usable(
    rounds: Sequence[Round], best: dict[str, float], *labels: str
) -> tuple[list[Round], str]:
    """The rounds whose arms `labels` can be judged, and what they are: those where the arms were
    quiet, else those where they were steady, else all that have them."""
    mine = [r for r in rounds if all(k in r.arms for k in labels)]
    quiet = [r for r in mine if r.is_quiet(best[r.host], *labels)]
    steady = [r for r in mine if r.is_steady(*labels)]
    for found, kind in ((quiet, "quiet"), (steady, "steady"), (mine, "unsteady")):
        if found:
            return found, kind
    return [], ""


def ratio(rounds: Iterable[Round], label: str, to: str) -> Ratio | None:
    """Speed of one arm over that of another in the same rounds, or None without any."""
    pairs = [(r.arms[label], r.arms[to]) for r in rounds if label in r.arms and to in r.arms]
    return ratio_of([_over(a, b) for a, b in pairs])


def _over(a: Measurement, b: Measurement) -> float:
    """Ratio of two speeds: of medians, or, where both took turns, the median of ratios."""
    turns = a.record.get("turns") or []
    if len(turns) < 2 or turns != b.record.get("turns"):
        return a.median_ts / b.median_ts
    return median(x / y for x, y in zip(a.samples_ts, b.samples_ts, strict=True))


def ratio_of(values: Sequence[float]) -> Ratio | None:
    """Median and its interval (order statistics of the sign test), or None without values."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    tail, skip = 0.5**n, 0  # chance that the median lies below the lowest value
    while skip + 1 < n // 2:
        more = tail + math.comb(n, skip + 1) * 0.5**n
        if 1 - 2 * more < CONFIDENCE:
            break
        tail, skip = more, skip + 1
    return Ratio(
        median(ordered), ordered[skip], ordered[n - 1 - skip], n, max(0.0, 1 - 2 * tail)
    )  # fmt: skip

"""Measuring the cases of the report on the CPU engine."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.awake import SUPPORTED, Awake
from bench.engine_cases import EMBEDDED, Case, arms
from bench.interleave import (
    Gate,
    Note,
    Round,
    append_round,
    best_probe,
    read_rounds,
    run_rounds,
)
from bench.others import OTHER_CORES, other_cores
from bench.runners.base import Measurement, Runner
from refimpl.benchmark.record import loop_sources
from refimpl.engine.simd import sources_hash

ROUNDS_FILE = "rounds.jsonl"
_PROBE_BYTES = 1 << 30
_PROBE_REPETITIONS = 24  # about a third of a second: threads that just woke may share a core
_TRIES = 4  # rounds for each one that is to be quiet
_SETTLE_S = 0.3  # a process that has just ended still gives its memory back


def measure_cases(
    cases: Sequence[Case],
    models: Path,
    data: Path,
    threads: int,
    rounds: int,
    llama: dict[str, Runner],
    note: Note,
    patience_s: float | None = None,
    best: float = 0.0,
) -> list[Round]:
    """Measure cases and add their rounds to `data`/rounds.jsonl; returns the new rounds.

    Args:
        patience_s: measure only while memory is quiet, processors kept awake (`bench.awake`),
            wait for that so long at a time, and end a case when it has so many quiet `rounds` of
            the present kernels, older ones included. None: so many more rounds, quiet or not.
        best: a speed of this host's memory known from elsewhere, bytes/s.

    Raises:
        NotQuiet: `patience_s` was not enough; what was measured has been kept.
        RunnerError: an arm that has to run cannot, or a whole round failed.
        KeyboardInterrupt: Ctrl-C; finished rounds have been kept.
    """
    from refimpl.benchmark.host import cpu_name, machine_state
    from refimpl.engine.probe import read_bandwidth
    from refimpl.engine.simd import cpu_features
    from refimpl.engine.threads import Team

    data.mkdir(parents=True, exist_ok=True)
    made: list[Round] = []

    def keep(done: Round) -> None:
        append_round(data / ROUNDS_FILE, done)
        made.append(done)

    def probe() -> tuple[float, ...]:
        time.sleep(_SETTLE_S)
        return read_bandwidth(team, _PROBE_BYTES, _PROBE_REPETITIONS)

    def state() -> dict[str, Any]:
        kept_awake = patience_s is not None and SUPPORTED
        return {
            **machine_state(), "amx": "amx-tile" in cpu_features(), "kept_awake": kept_awake,
            OTHER_CORES: other_cores(),
        }  # fmt: skip

    def so_far() -> list[Round]:
        return [*before, *made]

    host, before = f"{cpu_name()}, {threads} threads", all_rounds(data)
    with contextlib.closing(Team(threads)) as team, _termination_is_an_interrupt():
        if patience_s is None:
            for case in cases:
                members = arms(case, models, llama)
                run_rounds(case.name, members, rounds, probe, host, keep, state, note)
            return made
        with Awake() as awake:
            gate = Gate(max(best, best_probe(before).get(host, 0.0)), patience_s, awake.move)
            for case in cases:
                labels = {arm.label for arm in arms(case, models, llama)}
                for left in _until_quiet(case, labels, rounds, gate, so_far, note):
                    members = arms(left, models, llama)
                    run_rounds(case.name, members, 1, probe, host, keep, state, note, gate)
    return made


def _until_quiet(
    case: Case, labels: set[str], rounds: int, gate: Gate, so_far: Callable[[], list[Round]],
    note: Note,
) -> Iterator[Case]:  # fmt: skip
    """What to measure next of a case, until the arms that it can be measured with have their
    quiet rounds."""
    for _ in range(_TRIES * rounds):
        left = unmet(case, labels, so_far(), rounds, gate.best)
        if left is None:
            return
        yield left
    if unmet(case, labels, so_far(), rounds, gate.best):
        note(f"{case.name}: still without {rounds} quiet rounds; go on later")


def unmet(
    case: Case, labels: set[str], rounds: Iterable[Round], wanted: int, best: float
) -> Case | None:
    """What of a case has fewer than `wanted` quiet rounds of the present kernels; None: nothing.

    Anchors stay as long as anything else is left: what is not quiet is compared with them.

    Args:
        labels: of the arms that can be measured; others are not waited for.
        best: the memory's best speed, bytes/s.
    """
    mine = [r for r in rounds if r.case == case.name]
    quiet = [{k for k, m in r.arms.items() if _current(m) and r.is_quiet(best, k)} for r in mine]
    if not case.apart:
        return None if sum(labels <= q for q in quiet) >= wanted else case
    able = [e for e in case.entries if e.label in labels]
    left = [e for e in able if e.anchor or sum(e.label in q for q in quiet) < wanted]
    return replace(case, entries=tuple(left)) if any(not e.anchor for e in left) else None


def _current(m: Measurement) -> bool:
    """Whether a measurement is of the present kernels and draft-and-verify loop."""
    loop = loop_sources() if m.record.get("mtp") else None
    own = m.record.get("kernels"), m.record.get("loop")
    return m.engine != "refimpl" or own == (sources_hash(), loop)


@contextlib.contextmanager
def _termination_is_an_interrupt() -> Iterator[None]:
    """SIGTERM (from `timeout`, say) ends the engine that is running too, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def warm_up(cases: Iterable[Case], models: Path) -> Iterator[str]:
    """Read the models of cases into memory and run every kernel once; what was done, by line.

    Raises:
        RunnerError: the engine cannot run a model.
    """
    done: set[tuple[Any, ...]] = set()
    for case in cases:
        own = replace(case, entries=tuple(e for e in case.entries if not e.variant))
        for arm in arms(own, models, {}) if own.entries else ():
            t = replace(arm.test, repetitions=1, n_depth=0, synthetic_kv=False)
            t = replace(t, n_gen=min(t.n_gen, 4), n_prompt=min(t.n_prompt, 64))
            key = (t.model, t.n_rows > 1, bool(t.mtp), t.kv_type, bool(t.n_prompt))
            if key in done:
                continue
            done.add(key)
            arm.runner.measure(t)
        yield f"{case.name}: {'embedded model' if case.model == EMBEDDED else case.model} is warm"


def medians(rounds: Iterable[Round]) -> list[dict[str, Any]]:
    """Each round's medians in tokens/s and its probe, for the command line."""
    return [
        {"case": r.case, "probe_bytes_per_s": r.probe, "failed": r.failed,
         "tokens_per_s": {k: m.median_ts for k, m in r.arms.items()}}
        for r in rounds
    ]  # fmt: skip


def all_rounds(data: Path) -> list[Round]:
    """The rounds of a folder, oldest first; none if it has no file yet.

    Raises:
        RunFileError: the file is no file of rounds.
    """
    path = data / ROUNDS_FILE
    return read_rounds(path) if path.is_file() else []

"""Measuring the cases of the report on the CPU engine."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.engine_cases import EMBEDDED, Case, arms
from bench.interleave import Note, Round, append_round, read_rounds, run_rounds
from bench.runners.base import Runner

ROUNDS_FILE = "rounds.jsonl"
_PROBE_BYTES = 1 << 30
_PROBE_REPETITIONS = 24  # about a third of a second: threads that just woke may share a core
_SETTLE_S = 0.3  # a process that has just ended still gives its memory back


def measure_cases(
    cases: Sequence[Case],
    models: Path,
    data: Path,
    threads: int,
    rounds: int,
    llama: dict[str, Runner],
    note: Note,
) -> list[Round]:
    """Measure cases and add their rounds to `data`/rounds.jsonl; returns the new rounds.

    Raises:
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
        return {**machine_state(), "amx": "amx-tile" in cpu_features()}

    team = Team(threads)
    with contextlib.closing(team), _termination_is_an_interrupt():
        for case in cases:
            run_rounds(
                case.name, arms(case, models, llama), rounds,
                probe, f"{cpu_name()}, {threads} threads", keep, state, note,
            )  # fmt: skip
    return made


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

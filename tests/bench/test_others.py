"""What other programs use of the processors: whose time counts, and when it makes a round busy."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench import others
from bench.awake import Awake
from bench.interleave import Round, append_round, others_text, quiet_rounds, read_rounds, usable
from bench.others import OTHER_CORES, OTHERS, Used, other_cores, used_between
from bench.runners.base import Measurement
from hwmodel.errors import RunFileError

A, B, SHELL = (1, 10.0), (2, 20.0), (3, 30.0)


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [
        ({A: Used(5, 1)}, {A: Used(5.4, 1)}, 0.4),
        ({A: Used(5, 1)}, {A: Used(5, 1), B: Used(0.3, 0)}, 0.3),  # a new one
        # one of 9 s ended after 0.2 more, and its shell collected it
        ({B: Used(9, 0), SHELL: Used(1, 7)}, {SHELL: Used(1, 16.2)}, 0.2),
        # short ones that no reading saw
        ({SHELL: Used(1, 7)}, {SHELL: Used(1.1, 7.5)}, 0.6),
        # one of 9 s ended and nobody collected its time; the rest counts
        ({A: Used(5, 1), B: Used(9, 0)}, {A: Used(5.4, 1)}, 0.4),
        # the number was used again
        ({A: Used(5, 0)}, {(1, 11.0): Used(0.1, 0)}, 0.1),
        ({}, {}, 0.0),
    ],
)
def test_time_between_two_readings(before: Any, after: Any, used: float) -> None:
    assert used_between(before, after) == pytest.approx(used)


def test_own_processes_do_not_count_and_all_others_do() -> None:
    """A child, a child's child, and the loops that keep processors awake are own ones."""
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE) as child:
        mine = psutil.Process(child.pid)
        while not mine.children():
            time.sleep(0.01)
        grandchild = mine.children()[0].pid
        with Awake() as awake:
            seen = {pid for pid, _ in others._others()}
            loops = {p.pid for p in awake._loops}
        parent = os.getppid()  # 0 if it is outside of the container
        assert (parent in seen) == psutil.pid_exists(parent)
        assert not seen & {os.getpid(), child.pid, grandchild, *loops}
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    assert other_cores(0.05) >= 0


def test_idle_time_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has a process of number 0 for it."""
    idle = psutil.Process()
    monkeypatch.setattr(idle, "_pid", 0)
    monkeypatch.setattr(psutil, "process_iter", lambda: [idle])
    assert others._others() == {}


def test_cores_are_seconds_over_the_time_between(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{A: Used(1.0, 0.0)}, {A: Used(1.3, 0.0)}])
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(others, "_others", lambda: next(readings))
    monkeypatch.setattr(others, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert other_cores(wait=lambda _: None) == 0.6


def a_round(state: dict[str, Any]) -> Round:
    arm = Measurement("e", "1", "", (1.0,), (1,))
    return Round("c", 0.0, "host", (100.0,), (100.0,), state, {"a": arm})


@pytest.mark.parametrize(
    ("state", "quiet"),
    [({}, True), ({OTHER_CORES: OTHERS}, True), ({OTHER_CORES: 0.9}, False)],
)
def test_a_round_beside_busy_programs_counts_as_a_ratio_only(
    state: dict[str, Any], quiet: bool
) -> None:
    """However quiet the memory is; a round that does not say is judged by its memory alone."""
    made, best = a_round(state), {"host": 100.0}
    assert made.is_quiet(100) == made.is_quiet(100, "a") == quiet
    assert quiet_rounds([made], best) == ([made] if quiet else [])
    assert usable([made], best, "a") == ([made], "quiet" if quiet else "steady")
    waited = replace(made, waited={"a": (100.0,)})
    assert waited.is_quiet(100) == quiet
    assert others_text(made) == ("" if quiet else "; other programs used 0.9 cores")


@pytest.mark.parametrize("value", ["much", -1.0, None])
def test_a_state_that_is_no_number_is_no_round(value: Any, tmp_path: Path) -> None:
    append_round(tmp_path / "r.jsonl", a_round({OTHER_CORES: value}))
    with pytest.raises(RunFileError, match="line 1 is no round"):
        read_rounds(tmp_path / "r.jsonl")

"""Loops of the lowest priority that keep processors awake."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from bench import awake
from bench.awake import SUPPORTED, Awake

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="processors are kept awake on Linux only")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Awake, "REST_S", 0.0)
    monkeypatch.setattr(Awake, "SETTLE_S", 0.0)


def until(true: object, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_one_loop_a_processor_that_gives_way_to_anything_else() -> None:
    with Awake() as kept:
        loops = [p.pid for p in kept._loops]
        assert len(loops) == len(os.sched_getaffinity(0))
        assert until(lambda: all(os.sched_getscheduler(p) == os.SCHED_IDLE for p in loops))
        assert until(lambda: all(len(os.sched_getaffinity(p)) == 1 for p in loops))
        assert set().union(*map(os.sched_getaffinity, loops)) == os.sched_getaffinity(0)


def test_loops_end_with_the_context_and_are_others_after_a_move() -> None:
    with Awake() as kept:
        first = [*kept._loops]
        kept.move()
        assert all(p.returncode is not None for p in first)
        second = [*kept._loops]
        assert all(p.poll() is None for p in second)
    assert all(p.returncode is not None for p in second) and not kept._loops


def test_loops_end_when_the_process_that_wanted_them_is_killed() -> None:
    code = (
        "from bench.awake import Awake; import os\n"
        "a = Awake().__enter__(); print(*(p.pid for p in a._loops), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(p) for p in out.stdout.split()]
    assert pids and until(lambda: not any(map(alive, pids)))


def test_loops_end_where_the_process_that_wanted_them_is_gone_before_they_begin() -> None:
    """Their parent is another one by then."""
    command = [sys.executable, "-S", "-c", awake._SPIN, str(min(os.sched_getaffinity(0))), "0"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_ctrl_c_at_the_terminal_is_not_for_the_loops() -> None:
    """It goes to a group of processes; loops of the same session, or priorities say nothing."""
    with Awake() as kept:
        for loop in kept._loops:
            assert os.getpgid(loop.pid) != os.getpgid(0)
            assert os.getsid(loop.pid) == os.getsid(0)


def test_loops_that_run_end_where_another_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(*_: object, **__: object) -> object:
        raise OSError("no more processes")

    kept = Awake()
    kept._loops.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
    (first,) = kept._loops
    monkeypatch.setattr(awake.subprocess, "Popen", refusing)
    with pytest.raises(OSError, match="no more"), kept:
        pytest.fail("it began")
    assert first.returncode is not None
    assert first.stdin is not None
    first.stdin.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

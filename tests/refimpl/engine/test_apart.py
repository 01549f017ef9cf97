"""The step is compiled by a second process if anything has to be compiled, and only then."""

import subprocess
import sys

import pytest

from refimpl.engine import apart
from refimpl.engine.jit import cfunc
from refimpl.engine.simd import choose_simd
from refimpl.engine.step import SIGNATURE, runner


class Process:
    """Stands for the second process: what was asked of it."""

    def __init__(self, command: list[str], **pipes: int) -> None:
        self.command = command
        self.said: list[str] = []

    def wait(self, timeout: float | None = None) -> int:
        self.said.append("wait")
        return 0

    def kill(self) -> None:
        self.said.append("kill")


@pytest.fixture
def started(monkeypatch):
    made = []

    def start(command, **pipes):
        made.append(Process(command, **pipes))
        return made[-1]

    monkeypatch.setattr(apart.subprocess, "Popen", start)
    monkeypatch.setattr(apart, "default_threads", lambda: 2)
    monkeypatch.setattr(apart, "keeps_code", lambda: True)
    return made


def compile_something():
    @cfunc(SIGNATURE)
    def nothing(step, thread):
        pass


def test_nothing_is_started_where_nothing_is_compiled(started):
    with apart.step_apart(choose_simd()):
        pass
    assert started == []


def test_one_process_compiles_the_step_and_is_waited_for(started):
    with apart.step_apart(choose_simd("portable")):
        compile_something()
        compile_something()
    (process,) = started
    assert process.command == [sys.executable, "-P", "-m", "refimpl.engine.apart", "portable"]
    assert process.said[0] == "wait"


def test_it_ends_with_what_it_was_started_for(started):
    with pytest.raises(ValueError, match="bad"), apart.step_apart(choose_simd()):
        compile_something()
        raise ValueError("bad")
    assert started[0].said == ["kill", "wait"]


def test_one_processor_compiles_alone(started, monkeypatch):
    monkeypatch.setattr(apart, "default_threads", lambda: 1)
    with apart.step_apart(choose_simd()):
        compile_something()
    assert started == []


def test_code_that_cannot_be_kept_is_not_made_elsewhere(started, monkeypatch):
    monkeypatch.setattr(apart, "keeps_code", lambda: False)
    with apart.step_apart(choose_simd()):
        compile_something()
    assert started == []


def test_the_step_is_compiled_here_where_no_process_can_be_started(monkeypatch):
    asked = []

    def fails(command, **pipes):
        asked.append(command)
        raise OSError("no more processes")

    monkeypatch.setattr(apart.subprocess, "Popen", fails)
    monkeypatch.setattr(apart, "default_threads", lambda: 2)
    monkeypatch.setattr(apart, "keeps_code", lambda: True)
    with apart.step_apart(choose_simd()):
        compile_something()
    assert len(asked) == 1


PRINT_FILE = """
import sys
from refimpl.engine.simd import choose_simd
from refimpl.engine.step import runner
print(runner(choose_simd(sys.argv[1]))._cache._cache_file._index_path)
"""


def test_both_processes_keep_the_step_in_the_same_file():
    """Else the second one would compile for nothing."""
    if not apart.keeps_code():
        pytest.skip("compiled code is not kept here")
    simd = choose_simd()
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRINT_FILE, simd.name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == runner(simd)._cache._cache_file._index_path

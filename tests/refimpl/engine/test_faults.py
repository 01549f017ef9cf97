"""A mapped file that loses its bytes ends the process with a sentence, never with a signal."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.faults import supported

pytestmark = pytest.mark.skipif(not supported(), reason="maps of this system cannot shrink")

# The check before each step is put off, as if the file shrank just after it.
SHRINKING = """
import os, sys
from refimpl.checkpoint.open import open_checkpoint
from refimpl.engine.files import MappedFile
from refimpl.engine.model import EngineModel

path, threads = sys.argv[1], int(sys.argv[2])
model = EngineModel(open_checkpoint(path), threads=threads)
cache = model.new_cache(16)
model.prefill([1, 2, 3], cache)
print("before", flush=True)
MappedFile.check = lambda self: None
os.truncate(path, 4096)
model.decode([4], cache)
print("after")
"""
FOREIGN = """
import mmap, os, sys
import numpy as np
from refimpl.checkpoint.open import open_checkpoint
from refimpl.engine.model import EngineModel

model = EngineModel(open_checkpoint(sys.argv[1]))
with open(sys.argv[2], "w+b") as file:
    file.write(bytes(8192))
    file.flush()
    other = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
    os.truncate(file.fileno(), 0)
    print(other[5000])
"""


@pytest.fixture
def copy(tiny_gguf: Callable[[str, str], StoredSource], tmp_path: Path) -> Path:
    where = tiny_gguf("tiny_b", "q8_0").stored("lm_head", None).where
    return Path(shutil.copy(where.partition(": tensor ")[0], tmp_path / "model.gguf"))


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_shrinks_in_the_middle_of_a_step(copy: Path, threads: int) -> None:
    done = run(SHRINKING, copy, threads)
    assert (done.returncode, done.stdout) == (2, "before\n")
    assert done.stderr == (
        f"refimpl: error: {copy}: bytes of the file are gone while it is in use (it became "
        "shorter, or its disk cannot be read); restore it and start again\n"
    )


def test_a_file_that_vanishes_stays_usable(copy: Path) -> None:
    """Its bytes live as long as they are mapped."""
    script = SHRINKING.replace("os.truncate(path, 4096)", "os.remove(path)")
    done = run(script, copy, 2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nafter\n", "")


def test_other_bus_errors_are_not_claimed(copy: Path, tmp_path: Path) -> None:
    done = run(FOREIGN, copy, tmp_path / "other")
    assert done.returncode == -signal.SIGBUS
    assert "refimpl" not in done.stderr

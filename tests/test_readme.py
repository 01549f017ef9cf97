"""Every block of the README runs and prints what it shows.

`console` blocks hold `$ command` lines followed by their output, compared line by line; `...`
stands for any text. The two opening blocks, which install the project, run in a copy of the
checkout against the packages of this environment, so that no network is needed; the second runs
one test instead of all of them.
"""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
INSTALL = [text for _, text in BLOCKS if "venv" in text]
CONSOLE = [text for kind, text in BLOCKS if kind == "console"]
OTHER = [text for kind, text in BLOCKS if kind == "python"]


def environment(**more: str) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], **more}


def shell(command: str, folder: Path, **more: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1), f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_block_is_of_a_kind_that_runs() -> None:
    assert len(INSTALL) == 2
    assert {kind for kind, _ in BLOCKS} <= {"bash", "console", "python"}
    assert all("venv" in text for kind, text in BLOCKS if kind == "bash")
    assert CONSOLE


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder in which the README's relative paths exist."""
    for name in ("README.md", "refimpl", "hwmodel", "bench", "reports", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("block", CONSOLE, ids=lambda b: b.splitlines()[0][2:50])
def test_console_block(block: str, workplace: Path) -> None:
    steps = re.findall(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", block, re.M)
    assert steps
    for command, expected in steps:
        printed = shell(command, workplace)
        pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
        assert re.fullmatch(pattern, printed.strip(), re.S), f"$ {command}\n{printed}"


@pytest.mark.parametrize("block", OTHER, ids=lambda b: b.splitlines()[0][:50])
def test_python_block(block: str, workplace: Path) -> None:
    subprocess.run([sys.executable, "-c", block], cwd=workplace, env=environment(), check=True)


@pytest.mark.parametrize("block", INSTALL, ids=["use", "test"])
def test_install_block(block: str, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns(".*", "checkpoints", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=skip)
    printed = shell(
        block,
        copy,
        PYTHONPATH=os.pathsep.join(site.getsitepackages()),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # pip reads 0 as: do not isolate
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTEST_ADDOPTS="tests/refimpl/test_config.py -k published_counts",
    )
    assert "passed" in printed or "return" in printed, printed

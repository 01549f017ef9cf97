"""Short files come from standard input too; reports and tables are written whole, and nothing but
files is replaced."""

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from hwmodel.cli import main
from hwmodel.files import check_writable, read_short, write_whole

DEVICE = """
schema = 1
name = "box"
class = "apple"
[memory]
total_bytes = { value = 256e9, source = "unverified", as_of = "2026-11" }
[bandwidth]
peak_bytes_per_s = { value = 6e11, source = "unverified", as_of = "2026-11" }
"""


def test_a_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="device or a pipe") as error:
        write_whole(pipe, b"data")
    assert error.value.filename == str(pipe)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_and_its_goal_is_replaced(tmp_path: Path) -> None:
    goal, link = tmp_path / "goal", tmp_path / "link"
    goal.write_bytes(b"old")
    link.symlink_to(goal)
    write_whole(link, b"new")
    assert link.is_symlink() and goal.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["goal", "link"]


def test_a_name_is_checked_without_leaving_or_changing_anything(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")
    check_writable(old)
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"] and old.read_bytes() == b"old"
    os.mkfifo(pipe := tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "no" / "file", old / "file", pipe):
        with pytest.raises(OSError) as error:
            check_writable(bad)
        assert error.value.filename == str(bad)


def test_short_files_are_read_whole_or_refused_by_size(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"12345")
    assert read_short(file, 5) == b"12345" and read_short(file, 4) is None


DASHES = [
    (
        ["workload", "-", "--device", "m4max"],
        "[[turns]]\ninput_tokens = 9\nanswer_tokens = 5\n",
    ),
    (["devices", "check", "-"], DEVICE),
    (["plan", "--device", "-"], DEVICE),
    (["plan", "--device", "m4max", "--stats", "-"], '{"acceptance": [0.9, 0.8, 0.7]}'),
]


@pytest.mark.parametrize("args", [args for args, _ in DASHES if "--stats" not in args])
def test_standard_input_has_a_name_in_refusals(args: list[str]) -> None:
    run = CliRunner().invoke(main, args, input="[")
    assert run.exit_code == 2
    assert run.output.startswith("error: standard input: not a TOML file")


@pytest.mark.parametrize(("args", "text"), DASHES)
def test_a_dash_reads_standard_input(args: list[str], text: str) -> None:
    run = CliRunner().invoke(main, args, input=text)
    assert run.exit_code == 0, run.output

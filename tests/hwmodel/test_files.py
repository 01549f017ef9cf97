"""Reports and tables are written whole, and nothing but files is replaced."""

import os
import stat
from pathlib import Path

import pytest

from hwmodel.files import write_whole


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

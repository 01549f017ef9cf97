"""Reports and tables are written whole, and nothing but files is replaced."""

import os
import stat
from pathlib import Path

import pytest

from hwmodel.files import check_writable, write_whole


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

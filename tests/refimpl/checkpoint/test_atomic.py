"""Files are replaced whole or not at all, and nothing but files is replaced."""

import os
import stat
from pathlib import Path

import pytest

from refimpl.checkpoint.atomic import atomic_file, atomic_folder, check_writable
from refimpl.checkpoint.convert import convert
from refimpl.errors import InputError


def test_a_pipe_or_device_is_refused_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match="device or a pipe"), atomic_file(tmp_path / name):
            pytest.fail("nothing may be written")
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_conversion_does_not_replace_a_pipe(made, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="device or a pipe"):
        convert(made("micro", "hf-f32"), pipe, "f32", overwrite=True)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_a_link_stays_and_its_goal_is_replaced(tmp_path: Path) -> None:
    goal, link = tmp_path / "goal", tmp_path / "folder" / "link"
    goal.write_bytes(b"old")
    link.parent.mkdir()
    link.symlink_to(goal)
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and goal.read_bytes() == b"new"
    assert os.listdir(link.parent) == ["link"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_messages_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=rf"^{tmp_path}/new/sub: is a folder") as error,
        atomic_folder(tmp_path / "new") as part,
    ):
        (part / "sub").mkdir()
        with atomic_file(part / "sub"):
            pytest.fail("nothing may be written")
    assert ".part" not in str(error.value) and os.listdir(tmp_path) == []


def test_what_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    for name, words in (
        ("nowhere/out", "the folder .*nowhere does not exist"),
        ("folder", "is a folder"),
        ("x" * 300, "cannot be written"),
    ):
        with pytest.raises(InputError, match=words):
            check_writable(tmp_path / name)
    for name in ("old", "new"):
        check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "old"]
    assert (tmp_path / "old").read_bytes() == b"old"

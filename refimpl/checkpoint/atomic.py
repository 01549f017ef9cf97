"""Files that appear whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from refimpl.errors import InputError


def replaceable(path: Path) -> Path:
    """The file that a name stands for: of a link its goal, so that the link stays.

    Raises:
        InputError: it is a folder, a device or a pipe, or no name that a file can have. Devices
            and pipes would not be written to but replaced: as root even /dev/null.
    """
    goal = Path(os.path.realpath(path))
    try:
        mode = goal.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return goal
    except OSError as error:  # a name too long, a folder that may not be searched
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a device or a pipe, expected the name of a file to write")
    return goal


def check_writable(path: Path) -> None:
    """Refuse, before a long run, a name that `atomic_file` could not write to.

    Raises:
        InputError: as there.
    """
    goal = replaceable(path)
    if not goal.parent.is_dir():
        raise InputError(f"{path}: cannot be written (the folder {path.parent} does not exist)")
    try:
        handle, name = _hidden(goal)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    os.close(handle)
    os.unlink(name)


def _hidden(goal: Path) -> tuple[int, str]:
    return tempfile.mkstemp(prefix=f".{goal.name}.", suffix=".part", dir=goal.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends without an error.

    Until then the bytes are in a hidden file of the same folder, which is removed on any error,
    Ctrl-C included.

    Raises:
        InputError: the folder is missing, `path` is no file, or the disk refuses the bytes.
    """
    goal = replaceable(path)
    try:
        handle, name = _hidden(goal)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        os.close(handle)
        with open(name, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, goal)
        sync_folder(goal.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears as `path` when the block ends without an error.

    Raises:
        InputError: `path` already holds something, or the disk refuses.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: already exists; remove it or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield part
        os.chmod(part, 0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(part, path)
        sync_folder(path.parent)
    except InputError as error:  # of a file in it, which will not be where the message says
        if str(part) not in str(error):
            raise
        raise InputError(str(error).replace(str(part), str(path))) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Reading a short file; writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

STDIN = "-"


def read_short(path: Path | str, most: int) -> bytes | None:
    """The bytes of a file, or of standard input for `-`; None where they are more than `most`.

    Raises:
        OSError: it cannot be read.
    """
    if str(path) == STDIN:
        found = sys.stdin.buffer.read(most + 1)
    else:
        with open(path, "rb") as file:
            found = file.read(most + 1)
    return None if len(found) > most else found


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the file, force it to disk, then take its place; a link stays, its goal changes.

    Raises:
        OSError: the folder cannot be written, or a device or a pipe has that name, which would not
            be written to but replaced; names the file that was wanted.
    """
    with _beside(path) as (part, goal):
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(goal)


def check_writable(path: Path) -> None:
    """Refuse, before a long computation, a name that `write_whole` could not write to.

    Raises:
        OSError: as there, or a folder has that name; names the file that was wanted.
    """
    with _beside(path) as (part, goal):
        if goal.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        open(part, "wb").close()


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """A name for what is not whole yet, gone afterwards, and the file whose place it may take."""
    goal = Path(os.path.realpath(path))
    if goal.exists() and not goal.is_file() and not goal.is_dir():
        raise OSError(errno.EINVAL, "is a device or a pipe, expected the name of a file", str(path))
    part = goal.with_name(f".{goal.name}.part")
    try:
        yield part, goal
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()

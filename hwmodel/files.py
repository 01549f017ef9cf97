"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the file, force it to disk, then take its place; a link stays, its goal changes.

    Raises:
        OSError: the folder cannot be written, or a device or a pipe has that name, which would not
            be written to but replaced; names the file that was wanted.
    """
    goal = Path(os.path.realpath(path))
    if goal.exists() and not goal.is_file() and not goal.is_dir():
        raise OSError(errno.EINVAL, "is a device or a pipe, expected the name of a file", str(path))
    beside = goal.with_name(f".{goal.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(goal)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        beside.unlink(missing_ok=True)

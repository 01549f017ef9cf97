"""Opening a stranger's file for reading: size known before anything else, then a memory map."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import CheckpointError

Bytes = NDArray[np.uint8]


def map_file(path: Path) -> Bytes:
    """The file's bytes as a read-only array (n,) over a memory map; nothing is read yet.

    Raises:
        CheckpointError: missing, empty, not a regular file, or not readable.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # asked first: opening a pipe would wait
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return np.frombuffer(mapped, dtype=np.uint8)

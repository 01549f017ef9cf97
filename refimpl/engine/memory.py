"""Memory that kernels read and write: aligned arrays, and asking before allocating."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import InputError

Bytes = NDArray[np.uint8]
ALIGNMENT = 64
_RESERVE_BYTES = 256 << 20  # left to the rest of the system


def zeroed(size: int) -> Bytes:
    """`size` zero bytes (n,), aligned to cache lines; pages are taken when first written."""
    whole = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size]


def address(array: NDArray[Any]) -> int:
    """Where an array's data lies."""
    return int(array.ctypes.data)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def require_memory(needed: int, what: str) -> None:
    """Refuse what the machine has no room for, before allocating.

    Raises:
        InputError: with the arithmetic.
    """
    import psutil

    free = psutil.virtual_memory().available
    if needed > free - _RESERVE_BYTES:
        raise InputError(
            f"{what} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB of memory are free "
            f"and {_RESERVE_BYTES / 1e9:.2f} GB of them are left to the system; ask for a shorter "
            "context or a smaller KV type"
        )

"""Memory that kernels read and write: aligned arrays, and asking before allocating."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import InputError

Bytes = NDArray[np.uint8]
ALIGNMENT = 64
_RESERVE_BYTES = 256 << 20  # left to the rest of the system
_SMALLER_CACHE = "ask for a shorter context or a smaller KV type"


def zeroed(size: int) -> Bytes:
    """`size` zero bytes (n,), aligned to cache lines; pages are taken when first written."""
    whole = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size]


def address(array: NDArray[Any]) -> int:
    """Where an array's data lies."""
    return int(array.ctypes.data)


def size_text(size: float) -> str:
    """Bytes for a sentence, in the unit that leaves digits: '39.4 MB', '0 bytes'."""
    for unit, digits, name in ((1e9, 2, "GB"), (1e6, 1, "MB"), (1e3, 1, "kB")):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size:.0f} bytes"


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def available_bytes() -> int:
    """Memory that can still be taken: what the machine has free, and what the control groups that
    this process is in (containers, services) allow. Page cache counts as free."""
    import psutil

    return min([psutil.virtual_memory().available, *_group_allowances()])


def own_bytes() -> int:
    """Memory of this process beside the files that it maps."""
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# limit, use, and the page cache within it, in both versions of Linux's control groups
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")


def _group_allowances() -> list[int]:
    """What each control group with a limit still allows; none where there are no such groups."""
    out = []
    with contextlib.suppress(OSError, ValueError):
        for line in _GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                root, names = _MOUNT / "memory", _VERSION_1
            elif not controllers:
                root, names = _MOUNT, _VERSION_2
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                out += _allowance(folder, *names)
                if folder == root:
                    break
    return out


def _allowance(folder: Path, limit: str, use: str, prefix: str) -> list[int]:
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        allowed = int((folder / limit).read_text())  # 'max' is no number: no limit
        return [max(0, allowed - int((folder / use).read_text()) + cached)]
    return []


def require_allowed(needed: int, what: str, allowed: int, file_bytes: int) -> None:
    """Refuse what goes beyond the memory that a process was allowed, before allocating.

    Args:
        allowed: bytes that the process may use, mapped files included.
        file_bytes: of the files that it maps.

    Raises:
        InputError: with the arithmetic.
    """
    left = max(0, allowed - file_bytes - own_bytes())
    if needed > left:
        raise InputError(
            f"{what} needs {size_text(needed)}, but of the {size_text(allowed)} that may be used "
            f"{size_text(left)} are left beside the model's {size_text(file_bytes)} and this "
            f"process; allow more, or {_SMALLER_CACHE}"
        )


def require_memory(needed: int, what: str, advice: str = _SMALLER_CACHE) -> None:
    """Refuse what the machine has no room for, before allocating.

    Args:
        advice: what the user can do about it; by default what makes a cache smaller.

    Raises:
        InputError: with the arithmetic.
    """
    free = available_bytes()
    if needed > free - _RESERVE_BYTES:
        raise InputError(
            f"{what} needs {size_text(needed)}, but only {size_text(free)} of memory are free "
            f"and {size_text(_RESERVE_BYTES)} of them are left to the system; {advice}"
        )

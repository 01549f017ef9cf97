"""Where a process's memory is: the checkpoint's map, caches, activations, and the rest.

Linux only (/proc/self/smaps and /proc/self/pagemap); elsewhere nothing is reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PRESENT = 63  # bit of a pagemap entry


def resident(
    model: Path | Iterable[Path],
    caches: Iterable[NDArray[Any]],
    work: Iterable[NDArray[Any]],
    experts: Iterable[NDArray[Any]] = (),
) -> dict[str, int] | None:
    """Bytes in memory by purpose, or None where the system does not say.

    Args:
        model: the checkpoint's file or files, or the folder of its files; pages of their maps
            that were touched count as 'model'.
        caches, work: arrays of keys and values, and of activations; only their pages that are
            in memory count.
        experts: memory that parts of the model were read into; counts as 'model' too.
    """
    try:
        paths = [model] if isinstance(model, Path) else model
        total, mapped = _smaps([path.resolve() for path in paths])
        mapped += _present(experts)
        kv, activations = _present(caches), _present(work)
    except OSError:
        return None
    return {
        "total_bytes": total,
        "model_bytes": mapped,
        "cache_bytes": kv,
        "activation_bytes": activations,
        "other_bytes": total - mapped - kv - activations,
    }


def resident_of(model: Any, caches: Iterable[NDArray[Any]]) -> dict[str, int] | None:
    """The same of a process that has an `EngineModel` open, all of its files counted, with the
    arrays of its caches."""
    experts = [] if model.residency is None else [model.residency.area]
    paths = [Path(file.path) for file in model.files]
    return resident(paths, caches, model.working_memory(), experts)


def _smaps(models: Sequence[Path]) -> tuple[int, int]:
    """Resident bytes of the process, and those that are maps of files or folders."""
    total = mapped = 0
    inside = False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                name = line.split(maxsplit=5)[5].strip() if line.count("/") else ""
                places = (Path(name), *Path(name).parents) if name else ()
                inside = any(model in places for model in models)
            elif line.startswith("Rss:"):
                size = int(line.split()[1]) * 1024
                total += size
                mapped += size if inside else 0
    return total, mapped


def _present(arrays: Iterable[NDArray[Any]]) -> int:
    """Bytes of arrays whose pages are in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for array in arrays:
            first = array.ctypes.data // page
            count = -(-(array.ctypes.data + array.nbytes) // page) - first
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * count), dtype=np.uint64)
            there = int(np.count_nonzero(entries >> np.uint64(_PRESENT)))
            total += min(there * page, array.nbytes)
    return total

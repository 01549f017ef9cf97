"""When an engine's kernels are used, and that old ones on disk are looked for.

A version of the kernels is *used* when an engine is opened: a file beside its compiled kernels
bears its time, renewed once a day. Only where something had to be compiled, other versions' files
that were not used for long are removed (`refimpl.engine.old_files`): the folder grows then only,
and a start with everything compiled stays as fast as it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refimpl.engine.jit import announced
from refimpl.engine.simd import Simd, sources_hash
from refimpl.engine.step import runner

_MARK_EVERY_S = 86_400


@contextlib.contextmanager
def kept_in_order(simd: Simd) -> Iterator[None]:
    """Context in which an engine's kernels are got ready: at its end they count as used, and where
    some had to be compiled, old files are removed. Costs microseconds if none had to be."""
    compiled = []
    with announced(lambda: compiled.append(True)):
        yield
        folder = folder_of(runner(simd))
    if folder is None:
        return
    with contextlib.suppress(OSError):
        mark_used(folder)
        if compiled:
            from refimpl.engine.old_files import remove_old_kernels, remove_old_quantisers

            remove_old_kernels(folder)
            remove_old_quantisers()


def mark_used(folder: Path) -> None:
    """Note that this version's kernels in `folder` are used.

    Raises:
        OSError: nothing can be written there.
    """
    mark = folder / f"kernels-{sources_hash()}.used"
    try:
        if time.time() - mark.stat().st_mtime < _MARK_EVERY_S:
            return
    except FileNotFoundError:
        pass
    mark.touch()


def folder_of(function: Any) -> Path | None:
    """Where a compiled function is kept, or None where it is not."""
    path = getattr(function._cache, "cache_path", None)
    return Path(path) if path else None

"""Numba's decorators as the engine uses them.

They are named here without their type hints: compiled functions are called with Numba's types, of
which a checker of Python types knows nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba import extending
from numba.core import caching, event, serialize, sigutils
from numba.core.bytecode import FunctionIdentity
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys


def _count_apart() -> None:
    """Let this process count versions of functions from a number of its own.

    Numba tells versions of a function apart by a number in their symbols' names, counted in each
    process from 1. Code of several processes is loaded from disk into one, where the linker takes
    the first of two symbols with the same name.
    """
    identity: Any = FunctionIdentity
    identity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "big"))


_count_apart()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_apart)

njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
overload: Any = extending.overload


def cfunc(signature: Any, **options: Any) -> Callable[[Any], Any]:
    """`numba.cfunc`, which keeps compiled code beside the sources or, where that folder is
    read-only, in the user's cache folder; where neither can be written it is not kept."""
    keep = options.pop("cache", False)

    def decorate(function: Any) -> Any:
        made: Any = CFunc(function, sigutils.normalize_signature(signature), {}, options)
        if keep:
            try:
                made._cache = _KernelCache(function)
            except RuntimeError as error:
                if "cannot cache" not in str(error):
                    raise
        with event.install_listener("numba:run_pass", _Listener()):
            made.compile()
        return made

    return decorate


class _KernelCache(caching.FunctionCache):
    """Files of its own for each kernel.

    Numba keeps all versions of a function in numbered files with one index. Two processes that
    compile different versions at the same time may take the same number, and one of them is later
    given the other's code. Here the names follow from what the version is made from, so that
    whoever writes a file writes the same.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        enclosed = tuple(cell.cell_contents for cell in function.__closure__ or ())
        target = cpu_target.target_context.codegen().magic_tuple()
        made_from = (function.__code__.co_code, serialize.dumps(enclosed), repr(target).encode())
        digest = hashlib.sha256(b"".join(made_from)).hexdigest()[:16]
        name = f"{self._impl.filename_base}-{digest}"
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = caching.IndexDataCacheFile(self.cache_path, name, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled before, or None.

        Numba's own method first makes ready to compile: that takes longer, and more memory, than
        loading all kernels of a model. Compiled code only needs the symbols of Numba's runtime.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def keeps_code() -> bool:
    """Whether there is a folder that compiled kernels can be kept in."""
    try:
        caching.FunctionCache(keeps_code)
    except RuntimeError:
        return False
    return True


class _Listener(event.Listener):
    """Hears of compilation, as against loading what is found compiled on disk."""

    def on_start(self, event: Any) -> None:
        while _waiting:
            _waiting.pop(0)()

    def on_end(self, event: Any) -> None:
        pass


_waiting: list[Callable[[], None]] = []


@contextlib.contextmanager
def announced(function: Callable[[], None] | None) -> Iterator[None]:
    """Calls `function` once if a kernel has to be compiled inside, before it is."""
    if function is not None:
        _waiting.append(function)
    try:
        yield
    finally:
        if function in _waiting:
            _waiting.remove(function)

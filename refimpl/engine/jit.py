"""Numba's decorators as the engine uses them.

They are named here without their type hints: compiled functions are called with Numba's types, of
which a checker of Python types knows nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba import extending
from numba.core import event

njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
overload: Any = extending.overload


def cfunc(signature: Any, **options: Any) -> Callable[[Any], Any]:
    """`numba.cfunc`, which keeps compiled code beside the sources or, where that folder is
    read-only, in the user's cache folder; where neither can be written it is not kept."""

    def decorate(function: Any) -> Any:
        try:
            with event.install_listener("numba:run_pass", _Listener()):
                return numba.cfunc(signature, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.cfunc(signature, **{**options, "cache": False})(function)

    return decorate


class _Listener(event.Listener):
    """Hears of compilation, as against loading what is found compiled on disk."""

    def on_start(self, event: Any) -> None:
        global _waiting
        function, _waiting = _waiting, None
        if function is not None:
            function()

    def on_end(self, event: Any) -> None:
        pass


_waiting: Callable[[], None] | None = None


@contextlib.contextmanager
def announced(function: Callable[[], None] | None) -> Iterator[None]:
    """Calls `function` once if a kernel has to be compiled inside, before it is."""
    global _waiting
    _waiting = function
    try:
        yield
    finally:
        _waiting = None

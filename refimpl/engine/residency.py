"""A model larger than memory: shared parts stay, experts come from the disk when chosen.

What every token reads (attention, norms, routers, shared experts, dense layers, embedding, head)
is used from the memory map and fits by construction. Routed experts live in *slots*, as many as
memory allows. As soon as the router of a layer has chosen, the compiled step calls a hook: those of
the chosen experts that have no slot take that of the one which has not been used for longest, and
are read as whole slices (gate, up, down) by several requests at once, past the page cache. The
step goes on meanwhile and waits for a slice only when it comes to it: experts found in memory and
slices that are read already are computed while later ones are on their way.

Which experts are in memory changes no bit of a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.disk import DirectFile, Readers
from refimpl.engine.expert_files import shared_parts
from refimpl.engine.expert_slots import Experts, Traffic
from refimpl.engine.files import populate_parts
from refimpl.engine.program import Program


class Residency:
    """The slots of a program's experts.

    Args:
        program: its MoE layers are made to use the slots.
        slots: how many; at least `minimal_slots`. More than there are experts are room for caches.

    Raises:
        CheckpointError: a file cannot be opened for reading.
    """

    def __init__(self, program: Program, source: StoredSource, slots: int) -> None:
        self._files = {f.address: DirectFile(f.path, f.size) for f in program.files}
        self._parts = shared_parts(source, program.files)
        self._experts = Experts(program, source, self._files, slots)
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        # The method itself, no Python function: Ctrl-C cannot come between step and hook.
        self._hook = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._tasks.put)
        threading.Thread(target=_serve, args=(self._experts, self._tasks), daemon=True,
                         name="refimpl-residency").start()  # fmt: skip
        close = partial(_close, self._tasks, self._experts.readers, tuple(self._files.values()))
        self._finalizer = weakref.finalize(self, close)
        hook = ctypes.cast(self._hook, ctypes.c_void_p).value
        assert hook is not None
        program.attach(hook, self._experts.answers, self._experts.order, self._experts.finish)

    @property
    def slots(self) -> int:
        """Experts that memory holds."""
        self._experts.make_room(0)
        return min(self._experts.capacity, self.experts)

    @property
    def area(self) -> NDArray[np.uint8]:
        """The memory of the slots, those that nothing was read into included."""
        return self._experts.area

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return self._experts.experts

    @property
    def max_rows(self) -> int:
        """Rows of a step whose experts have slots, whatever the router chooses."""
        return self._experts.max_rows

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self._experts.slot_bytes

    @property
    def traffic(self) -> Traffic:
        """What has been chosen and read so far."""
        return self._experts.traffic

    def read_shared(self, progress: Callable[[int, int], None]) -> None:
        """Read what every token needs into memory, and lock it there where that is allowed.

        Args:
            progress: called with (bytes done, bytes in all).
        """
        populate_parts(self._parts, progress)
        self._experts.forget_read_ahead()
        with contextlib.suppress(AttributeError, OSError):
            lock = ctypes.CDLL(None).mlock
            lock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
            for file, start, length in self._parts:
                lock(file.address + start, length)  # a refusal is no harm: they are used often

    def make_room(self, size: int) -> None:
        """Give up slots for `size` bytes of other use.

        Raises:
            InputError: too few would be left.
        """
        self._experts.make_room(size)

    def give_back(self, size: int) -> None:
        """`size` bytes that room was made for are free again; may be called from a finalizer, at
        any moment and in any thread."""
        self._experts.returned.append(size)

    def close(self) -> None:
        """End the threads and close the files."""
        self._finalizer()


def _serve(experts: Experts, tasks: SimpleQueue[Any]) -> None:
    while (layer := tasks.get()) is not None:
        try:
            experts.choose(layer)
        except BaseException as error:  # the step waits for an answer, whatever happens
            experts.fail(layer, error)


def _close(tasks: SimpleQueue[Any], readers: Readers, files: tuple[DirectFile, ...]) -> None:
    tasks.put(None)
    readers.settle()
    readers.close()
    for file in files:
        file.close()

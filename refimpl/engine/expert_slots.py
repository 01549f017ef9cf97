"""Which routed experts of a model larger than memory are held, in slots, and which are read.

As soon as a layer's router has chosen, those of the chosen experts that have no slot take that of
the one which has not been used for longest, and are read. What is in memory is computed first.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.stored import StoredSource, StoredTensor
from refimpl.config import ModelConfig
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.engine.disk import DirectFile, Readers, anonymous, span
from refimpl.engine.expert_files import area_bytes, lies_in, offset_of, slot_bytes, stacks_of
from refimpl.engine.fields import Layer, Step
from refimpl.engine.files import MappedFile
from refimpl.engine.memory import round_up, size_text
from refimpl.engine.program import Program
from refimpl.errors import InputError

_FIELDS = (Layer.GATE, Layer.UP, Layer.DOWN)
_SCAN_ROWS = SPECULATIVE_ROWS + 2
"""Steps of so many rows are prefill, which goes through all experts: what it reads gives way to
what it reads next, so that a sweep over more than fits does not empty memory of all else."""


@dataclass(frozen=True)
class _Stack:
    """One stacked tensor of a layer.

    Attributes:
        file, mapped: where it is read from, and its map.
        offset: of its first expert in the file.
        expert_bytes: of one expert.
        area: where its slices lie in a slot.
        places: addresses of the experts that are in memory (E,), else 0.
    """

    file: DirectFile
    mapped: MappedFile
    offset: int
    expert_bytes: int
    area: int
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """What has been chosen and read so far.

    Attributes:
        chosen: experts that steps used, one per step and layer.
        found: those of them that were in memory when their router chose.
        chosen_bytes, found_bytes: the same in bytes.
        bytes_read: from the disk, whole blocks.
        busy_s: seconds in which the disk had something to do.
    """

    chosen: int
    found: int
    chosen_bytes: int
    found_bytes: int
    bytes_read: int
    busy_s: float


def minimal_slots(config: ModelConfig) -> int:
    """Slots that a step of one verification needs."""
    return min(config.moe_num_experts, config.moe_top_k * (SPECULATIVE_ROWS + 1))


def require_slots(left: int, least: int, slot_bytes: int, size: int) -> None:
    """Refuse what leaves too few slots.

    Args:
        left: slots beside `size` bytes of other use, perhaps fewer than none.
        least: see `minimal_slots`.

    Raises:
        InputError: with the arithmetic.
    """
    if left < least:
        raise InputError(
            f"{size_text(size)} for a context leave room for {max(0, left)} experts in memory, "
            f"of which a step needs {least} of {size_text(slot_bytes)}; ask for a shorter "
            "context or a smaller KV type, or allow more memory"
        )


class Experts:
    """Which experts are in memory. One thread at a time changes it: that of the hook, or under
    `_lock` the caller between steps."""

    def __init__(self, program: Program, source: StoredSource, files: dict[int, DirectFile],
                 slots: int) -> None:  # fmt: skip
        config = source.config
        self._step, self._top_k = program, config.moe_top_k
        self._count = config.moe_num_experts
        self._minimum = minimal_slots(config)
        self.slot_bytes, self.capacity, self._whole = slot_bytes(source), slots, slots
        self._yielded, self.returned = 0, deque[int]()
        self._memory = anonymous(slots * self.slot_bytes + mmap.PAGESIZE)
        self._view = memoryview(self._memory)
        self._base = int(np.frombuffer(self._memory, dtype=np.uint8).ctypes.data)
        self._free = list(range(slots - 1, -1, -1))
        self._held: OrderedDict[tuple[int, int], int] = OrderedDict()  # (layer, expert) -> slot
        self._layers: dict[int, int] = {}
        self._stacks: dict[int, tuple[_Stack, ...]] = {}
        for i, tensors in stacks_of(source).items():
            self._layers[program.layer_address(i)] = i
            self._stacks[i] = self._connect(program, i, tensors, files)
        self.readers = Readers()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._answered = True
        self.answers = np.zeros(1, dtype=np.int64)
        self.order = np.zeros(self._count, dtype=np.int64)
        self._chosen = self._found = self._chosen_bytes = self._found_bytes = 0

    def _connect(self, program: Program, layer: int, tensors: list[StoredTensor],
                 files: dict[int, DirectFile]) -> tuple[_Stack, ...]:  # fmt: skip
        made, area = [], 0
        for tensor, number in zip(tensors, _FIELDS, strict=True):
            file = next(f for f in program.files if lies_in(tensor, f))
            places = np.zeros(self._count, dtype=np.int64)
            program.set_places(layer, number, places)
            size = tensor.rows.nbytes // self._count
            direct, offset = files[file.address], offset_of(tensor, file)
            made.append(_Stack(direct, file, offset, size, area, places))
            area += area_bytes(tensor)
        return tuple(made)

    @property
    def area(self) -> NDArray[np.uint8]:
        """See `Residency.area`."""
        return np.frombuffer(self._memory, dtype=np.uint8)

    @property
    def experts(self) -> int:
        """See `Residency.experts`."""
        return self._count * len(self._stacks)

    @property
    def max_rows(self) -> int:
        """See `Residency.max_rows`."""
        many = 1 << 30
        return many if self.capacity >= self._count else self.capacity // self._top_k

    @property
    def traffic(self) -> Traffic:
        """See `Residency.traffic`."""
        return Traffic(self._chosen, self._found, self._chosen_bytes, self._found_bytes,
                       self.readers.bytes_read, self.readers.busy_s)  # fmt: skip

    def forget_read_ahead(self) -> None:
        """Let memory map and page cache drop experts, which came along with their neighbours or
        when the whole file was read."""
        for stacks in self._stacks.values():
            for stack in stacks:
                stack.mapped.release(stack.offset, stack.expert_bytes * self._count)
                stack.file.forget(stack.offset, stack.expert_bytes * self._count)

    def choose(self, layer_address: int) -> None:
        """See to it that the experts in the group table come into memory."""
        self._answered = False
        layer = self._layers[layer_address]
        used = self._used(int(self._step.working(Step.GROUPS, np.int64, (1, 1))[0, 0]))
        scan = int(self._step.field(Step.ROWS)) >= _SCAN_ROWS
        with self._lock:
            self._take_back()
            missing = [e for e in used if (layer, e) not in self._held]
            size = sum(s.expert_bytes for s in self._stacks[layer])
            self._count_choice(len(used), len(missing), size)
            keep = {(layer, e) for e in used}
            if not scan:
                for e in used:
                    if (layer, e) in self._held:
                        self._held.move_to_end((layer, e))
            slots = [self._slot(keep) for _ in missing]
            for e, slot in zip(missing, slots, strict=True):
                self._held[layer, e] = slot
                if scan:
                    self._held.move_to_end((layer, e), last=False)
        self._answer(used, missing)
        gate, up, down = self._stacks[layer]
        for e, slot in zip(missing, slots, strict=True):
            self._read(gate, e, slot)
            self._read(up, e, slot)
        for e, slot in zip(missing, slots, strict=True):  # all are needed at once, and last
            self._read(down, e, slot)

    def _used(self, count: int) -> list[int]:
        """The chosen experts, ascending."""
        table = self._step.working(Step.GROUPS, np.int64, (1, 1 + count))
        used: list[int] = table[0, 1:].tolist()
        return used

    def _answer(self, used: list[int], missing: list[int]) -> None:
        """Tell the step in which order to compute: what is in memory first. Every thread begins
        with a stretch of its own, so experts are dealt out to the stretches."""
        late = set(missing)
        order = sorted(range(len(used)), key=lambda i: used[i] in late)
        threads = int(self._step.field(Step.THREADS))
        dealt = [i for thread in range(threads) for i in order[thread::threads]]
        self.order[: len(dealt)] = dealt
        self._tell()

    def _tell(self) -> None:
        self._answered = True
        self.answers[0] += 1

    def _count_choice(self, used: int, missing: int, size: int) -> None:
        self._chosen += used
        self._found += used - missing
        self._chosen_bytes += used * size
        self._found_bytes += (used - missing) * size

    def _slot(self, keep: set[tuple[int, int]]) -> int:
        """A free slot, or that of the expert which has not been used for longest."""
        if self._free:
            return self._free.pop()
        coldest = next(key for key in self._held if key not in keep)
        return self._evict(coldest)

    def _evict(self, key: tuple[int, int]) -> int:
        layer, expert = key
        for stack in self._stacks[layer]:
            stack.places[expert] = 0
        return self._held.pop(key)

    def _read(self, stack: _Stack, expert: int, slot: int) -> None:
        offset = stack.offset + expert * stack.expert_bytes
        low, high = span(offset, stack.expert_bytes)
        at = slot * self.slot_bytes + stack.area
        ready = partial(stack.places.__setitem__, expert, self._base + at + offset - low)
        self.readers.ask(stack.file, offset, stack.expert_bytes, self._view[at : at + high - low],
                         ready)  # fmt: skip

    def fail(self, layer_address: int, error: BaseException) -> None:
        """Keep an error for `finish`, and let the step go on to its end with any bytes."""
        self._failure = error
        for stack in self._stacks[self._layers[layer_address]]:
            stack.places[stack.places == 0] = self._base
        self.order[:] = np.arange(self._count)
        if not self._answered:
            self._tell()

    def finish(self) -> None:
        """After each step: raise what went wrong in it.

        Raises:
            CheckpointError, OSError: an expert could not be read.
        """
        error = self._failure or self.readers.error
        if error is None:
            return
        self.readers.settle()
        with self._lock:
            self._failure = self.readers.error = None
            for stacks in self._stacks.values():
                for stack in stacks:
                    stack.places[:] = 0
            self._free += self._held.values()
            self._held.clear()
        raise error

    def make_room(self, size: int) -> None:
        """See `Residency.make_room`."""
        with self._lock:
            self._take_back()
            yielded = self._yielded + size
            capacity = self._whole - round_up(yielded, self.slot_bytes) // self.slot_bytes
            require_slots(capacity, self._minimum, self.slot_bytes, size)
            self._resize(yielded, capacity)

    def _take_back(self) -> None:
        """Use the memory of caches that are gone."""
        while self.returned:
            yielded = self._yielded - self.returned.popleft()
            slots = self._whole - round_up(yielded, self.slot_bytes) // self.slot_bytes
            self._resize(yielded, slots)

    def _resize(self, yielded: int, capacity: int) -> None:
        """Another number of slots; those that were not used for longest go first."""
        change = capacity - self.capacity
        self._yielded, self.capacity = yielded, capacity
        while len(self._held) > capacity:
            self._evict(next(iter(self._held)))
        if change:
            self._rebuild_free(change)

    def _rebuild_free(self, change: int) -> None:
        """Free slots are those that are neither held nor given up; the latter's memory goes."""
        held = set(self._held.values())
        free = [slot for slot in range(self._whole - 1, -1, -1) if slot not in held]
        spare = self.capacity - len(held)
        self._free = free[len(free) - spare :] if spare else []
        if change < 0:
            for slot in free[: len(free) - spare]:
                with contextlib.suppress(OSError, AttributeError, ValueError):
                    at = slot * self.slot_bytes
                    self._memory.madvise(mmap.MADV_DONTNEED, at, self.slot_bytes)

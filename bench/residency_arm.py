"""One arm of `bench.residency` in a process of its own: `python -m bench.residency_arm`.

Arguments: model, arm, tokens before memory is full, timed tokens. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from refimpl.checkpoint.open import open_checkpoint
from refimpl.engine.expert_files import KEYS
from refimpl.engine.fields import Step
from refimpl.engine.files import disk_bytes_read
from refimpl.engine.memory import address
from refimpl.engine.model import EngineModel

_CONTEXT = 512
_ROWS = 64  # decoding alone needs no working memory for more
_NO_LIMIT = 1 << 62  # the memory map alone


class MappedExperts:
    """Watches, and with 'willneed' asks for, the experts of a model that is only mapped."""

    def __init__(self, model: EngineModel, ask: bool) -> None:
        self.chosen_bytes = self.found_bytes = 0
        self._program, self._ask = model.program, ask
        libc = ctypes.CDLL(None, use_errno=True)
        self._advise, self._core = libc.madvise, libc.mincore
        self._advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._core.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        source = model.source
        self._stacks = {
            model.program.layer_address(s.index): [source.stored(k, s.index).rows for k in KEYS]
            for s in source.config.layers if s.is_moe
        }  # fmt: skip
        self._count = source.config.moe_num_experts
        self._answers = np.zeros(1, dtype=np.int64)
        self._order = np.arange(self._count, dtype=np.int64)
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._hook = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._tasks.put)
        threading.Thread(target=self._serve, daemon=True).start()
        hook = ctypes.cast(self._hook, ctypes.c_void_p).value
        assert hook is not None
        self._program.attach(hook, self._answers, self._order, lambda: None)

    def without_readahead(self) -> None:
        """Page faults of experts read one page."""
        for stacks in self._stacks.values():
            for rows in stacks:
                self._advise(*_pages(address(rows), rows.nbytes), mmap.MADV_RANDOM)

    def _serve(self) -> None:
        while True:
            layer = self._tasks.get()
            count = int(self._program.working(Step.GROUPS, np.int64, (1, 1))[0, 0])
            used = self._program.working(Step.GROUPS, np.int64, (1, 1 + count))[0, 1:].tolist()
            for rows in self._stacks[layer]:
                size = rows.nbytes // self._count
                for e in used:
                    self._one(address(rows) + e * size, size)
            self._answers[0] += 1

    def _one(self, at: int, size: int) -> None:
        start, length = _pages(at, size)
        state = np.zeros(length // mmap.PAGESIZE, dtype=np.uint8)
        self._core(start, length, address(state))
        self.chosen_bytes += size
        self.found_bytes += round(size * float(np.mean(state & 1)))
        if self._ask:
            self._advise(start, length, mmap.MADV_WILLNEED)


def _pages(at: int, size: int) -> tuple[int, int]:
    low = at // mmap.PAGESIZE * mmap.PAGESIZE
    return low, -(-(at + size - low) // mmap.PAGESIZE) * mmap.PAGESIZE


def run(path: Path, arm: str, warm: int, timed: int) -> dict[str, Any]:
    """Decode random tokens; what `bench.residency.Sample` takes from it."""
    on_demand = arm == "experts on demand"
    with contextlib.closing(open_checkpoint(path)) as source:
        limit = None if on_demand else _NO_LIMIT
        model = EngineModel(source, micro_batch=_ROWS, memory_bytes=limit)
        mapped = None if on_demand else MappedExperts(model, arm == "willneed")
        if mapped and arm == "page faults, no readahead":
            mapped.without_readahead()
        model.read_ahead(lambda done, total: None)
        rng = np.random.default_rng(time.time_ns())
        ids = rng.integers(0, model.config.vocab_size, warm + timed).tolist()
        cache, seconds, before = model.new_cache(_CONTEXT), [], (0, 0, 0, 0.0)
        disk = 0
        for i, token in enumerate(ids):
            if i == warm:
                before, disk = _counts(model, mapped), disk_bytes_read() or 0
            began = time.perf_counter()
            model.decode([token], cache)
            seconds.append(time.perf_counter() - began)
        after, read = _counts(model, mapped), (disk_bytes_read() or 0) - disk
        chosen, found, direct, busy = (b - a for a, b in zip(before, after, strict=True))
        about = f"{model.description}"
        model.close()
    wall = sum(seconds[warm:])
    return {
        "cold_s": seconds[:warm], "warm_s": seconds[warm:], "hit_rate": found / chosen,
        "disk_bytes_per_token": read / timed, "disk_bytes_per_s": read / wall,
        "busy_disk_bytes_per_s": direct / busy if busy else None, "about": about,
    }  # fmt: skip


def _counts(model: EngineModel, mapped: MappedExperts | None) -> tuple[int, int, int, float]:
    """Expert bytes chosen and found, bytes read directly, and seconds in which they were."""
    if mapped is not None:
        return mapped.chosen_bytes, mapped.found_bytes, 0, 0.0
    assert model.residency is not None
    t = model.residency.traffic
    return t.chosen_bytes, t.found_bytes, t.bytes_read, t.busy_s


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))

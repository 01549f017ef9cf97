"""What decoding read and how fast, from the engine's own counters.

The compiled step counts distinct experts; everything else follows from which layers were run. All
other tensors of a layer are read once in each step, whatever the number of rows.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from refimpl.backend import Array, Cache, Step, Tokens
from refimpl.checkpoint.stored import StoredSource
from refimpl.config import ModelConfig
from refimpl.engine.caches import EngineCache
from refimpl.engine.disk import slice_speed
from refimpl.engine.expert_files import expert_slices
from refimpl.engine.files import disk_bytes_read
from refimpl.engine.model import EngineModel
from refimpl.engine.probe import read_bandwidth
from refimpl.engine.resident import resident_of
from refimpl.inventory import inventory


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights read so far: all of them, and those of routed experts."""

    weight_bytes: int
    expert_bytes: int


class TrafficCounter:
    """Turns a program's counters into bytes."""

    def __init__(self, source: StoredSource, model: EngineModel) -> None:
        self._program, self._first_mtp = model.program, source.config.num_hidden_layers
        self._fixed: dict[int | None, int] = defaultdict(int)  # without heads and experts
        self._expert: dict[int, int] = defaultdict(int)
        self._head: dict[int | None, int] = defaultdict(int)
        for spec in inventory(source.config):
            size = source.stored_bytes(spec.key, spec.layer)
            if spec.key in ("norm", "lm_head", "shared_head.norm", "shared_head.output"):
                self._head[spec.layer] += size
            elif spec.is_stacked and spec.layer is not None:
                self._expert[spec.layer] += size // spec.shape[0]
            elif spec.layer is not None:
                self._fixed[spec.layer] += size

    def now(self) -> Traffic:
        """Bytes since the model was opened."""
        fixed = 0
        for (first, stop, with_head), count in self._program.runs.items():
            size = sum(self._fixed[i] for i in range(first, stop))
            if with_head:
                size += self._head[None if stop <= self._first_mtp else stop - 1]
            fixed += count * size
        used = self._program.experts_used()
        experts = sum(used[i] * size for i, size in self._expert.items())
        return Traffic(fixed + experts, experts)


class Meter:
    """A `Backend` that measures the decoding of an engine: what comes after the last prefill.

    Times include drafting; of a file that is not in memory they include its disk.
    """

    def __init__(self, source: StoredSource, model: EngineModel) -> None:
        self._model, self._counter = model, TrafficCounter(source, model)
        self._cache: EngineCache | None = None  # the newest
        self._begin()

    def _begin(self) -> None:
        self._before, self._disk = self._counter.now(), disk_bytes_read()
        self._seconds, self._kv_values, self._steps = 0.0, 0, 0
        residency = self._model.residency
        self._fetched = None if residency is None else residency.traffic

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    def identity(self) -> dict[str, str]:
        """See `Backend.identity`."""
        return self._model.identity()

    def new_cache(self, capacity: int) -> EngineCache:
        """See `Backend.new_cache`."""
        self._cache = None  # an older one may go first
        self._cache = self._model.new_cache(capacity)
        return self._cache

    def prefill(self, tokens: Tokens, cache: Cache, all_logits: bool = False) -> Step:
        """See `Backend.prefill`; measuring begins anew after it."""
        step = self._model.prefill(tokens, cache, all_logits)
        self._begin()
        return step

    def decode(self, tokens: Tokens, cache: Cache) -> Step:
        """See `Backend.decode`."""
        first = cache.length
        began = time.perf_counter()
        step = self._model.decode(tokens, cache)
        self._seconds += time.perf_counter() - began
        self._steps += 1
        for spec in self.config.layers[: self.config.num_hidden_layers]:
            row = 2 * spec.num_attention_groups * spec.head_dim
            for position in range(first, first + len(tokens)):
                self._kv_values += row * min(position + 1, spec.window or position + 1)
        return step

    def draft_cost(self, depth: int) -> float:
        """See `Backend.draft_cost`."""
        return self._model.draft_cost(depth)

    def draft(
        self,
        cache: Cache,
        hidden: Array,
        next_tokens: Tokens,
        depth: int,
        choose: Callable[[Array], int],
    ) -> list[int]:
        """See `Backend.draft`."""
        began = time.perf_counter()
        drafts = self._model.draft(cache, hidden, next_tokens, depth, choose)
        self._seconds += time.perf_counter() - began
        return drafts

    def report(self, tokens: int) -> dict[str, Any] | None:
        """What decoding `tokens` tokens took, and this machine's read limit, probed now.

        `expert_hit_rate` is the share of expert bytes that were in memory when their router had
        chosen. For a model that fits it follows from what the process read from disks, read-ahead
        included, and is None where the system does not count that. `disk_bytes_per_s` is over the
        time in which experts were being read, its limit random reads of the same file; both are
        None for a model that fits. `resident` is this process's memory before the probe, see
        `refimpl.engine.resident`.
        """
        if not self._steps or not tokens:
            return None
        memory = self.resident()
        now, disk = self._counter.now(), disk_bytes_read()
        weights = now.weight_bytes - self._before.weight_bytes
        experts = now.expert_bytes - self._before.expert_bytes
        kv = round(self._kv_values * self._model.kv_value_bytes)
        read = None if disk is None or self._disk is None else disk - self._disk
        hits = None if read is None or not experts else max(0.0, 1 - read / experts)
        limit = median(read_bandwidth(self._model.team))
        speed = (weights + kv) / self._seconds
        return {
            "steps": self._steps,
            "weight_bytes_per_token": weights / tokens,
            "expert_bytes_per_token": experts / tokens,
            "kv_bytes_per_token": kv / tokens,
            "bytes_per_s": speed,
            "read_limit_bytes_per_s": limit,
            "share_of_read_limit": speed / limit,
            "disk_bytes": read,
            "expert_hit_rate": hits,
            **self._fetching(tokens),
            "file_bytes": sum(file.size for file in self._model.files),
            "file_bytes_in_memory": _in_memory(self._model),
            "resident": memory,
        }

    def resident(self) -> dict[str, int] | None:
        """Where this process's memory is, the newest cache's included."""
        return resident_of(self._model, [] if self._cache is None else self._cache.blocks())

    def _fetching(self, tokens: int) -> dict[str, Any]:
        """What was read of experts, for a model larger than memory; replaces the hit rate."""
        residency, before = self._model.residency, self._fetched
        if residency is None or before is None:
            return dict.fromkeys(
                ("disk_bytes_per_token", "disk_bytes_per_s", "disk_limit_bytes_per_s")
            )
        now = residency.traffic
        read, busy = now.bytes_read - before.bytes_read, now.busy_s - before.busy_s
        chosen = now.chosen_bytes - before.chosen_bytes
        speeds = slice_speed(expert_slices(self._model.source)) if read else ()
        return {
            "expert_hit_rate": (now.found_bytes - before.found_bytes) / chosen if chosen else None,
            "disk_bytes_per_token": read / tokens,
            "disk_bytes_per_s": read / busy if read else None,
            "disk_limit_bytes_per_s": median(speeds) if read else None,
        }


def _in_memory(model: EngineModel) -> int | None:
    sizes = [file.resident_bytes() for file in model.files]
    return None if None in sizes else sum(size for size in sizes if size is not None)

"""Counting and recording what a run does.

A `Trace` is passed to `prefill` and `decode`; production passes None. Counts are facts: the cost
model must predict them exactly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from refimpl.reference.numerics import Array


@dataclass
class Trace:
    """Counts by role, and copies of activations where asked for.

    Attributes:
        record: activation names to copy ("hidden", "attn_out", "ffn_out", "route_idx",
            "route_w", "route_margin", "final"), or empty.
        multiply_adds: by inventory role: matrix products; `scores` (QK and PV over visible keys
            only) of the trunk, everything of MTP layers under `mtp`.
        weight_bytes: by role, stored bytes of each tensor, or selected expert, once per step.
        kv_values_read, kv_values_written: trunk K and V values; rows that any query of the step
            can see, and rows appended (multiply by the KV type's bytes).
        steps: number of steps counted.
    """

    record: frozenset[str] = frozenset()
    multiply_adds: Counter[str] = field(default_factory=Counter)
    weight_bytes: Counter[str] = field(default_factory=Counter)
    kv_values_read: int = 0
    kv_values_written: int = 0
    steps: int = 0
    _seen: set[tuple[str, int | None, int | None]] = field(default_factory=set)
    _arrays: dict[tuple[str, int], list[Array]] = field(default_factory=lambda: defaultdict(list))

    def begin_step(self) -> None:
        """Start a step: weights read from here on count again."""
        self.steps += 1
        self._seen.clear()

    def product(self, role: str, multiply_adds: int) -> None:
        """Count a matrix product."""
        self.multiply_adds[role] += multiply_adds

    def weights(
        self, role: str, key: str, layer: int | None, expert: int | None, size_bytes: int
    ) -> None:
        """Count a tensor's stored bytes, the first time in this step."""
        if (key, layer, expert) not in self._seen:
            self._seen.add((key, layer, expert))
            self.weight_bytes[role] += size_bytes

    def kv(self, values_read: int, values_written: int) -> None:
        """Count K and V values read from and written to the trunk's cache."""
        self.kv_values_read += values_read
        self.kv_values_written += values_written

    def keep(self, name: str, layer: int, rows: Array) -> None:
        """Copy rows (T, ...) of an activation if its name is recorded."""
        if name in self.record:
            self._arrays[name, layer].append(np.array(rows))

    def rows(self, name: str, layer: int) -> Array:
        """All recorded rows (T, ...) of an activation, in order of position."""
        return np.concatenate(self._arrays[name, layer])

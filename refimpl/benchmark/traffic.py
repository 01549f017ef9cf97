"""Bytes that a decoding step reads, counted by an instrumented run of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.engine.model import EngineModel
from refimpl.reference.trace import Trace

_BEFORE = 8  # tokens in the cache before the counted steps


@dataclass(frozen=True)
class Traffic:
    """Weight bytes of one step, averaged over the steps that were counted.

    Attributes:
        rows: tokens of the step.
        steps: how many steps were counted.
        weight_bytes: by role, stored bytes of each tensor, or selected expert, once per step.
    """

    rows: int
    steps: int
    weight_bytes: dict[str, float]

    @property
    def total(self) -> float:
        """Weight bytes of all roles."""
        return sum(self.weight_bytes.values())

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, with the total."""
        return {
            "rows": self.rows,
            "steps": self.steps,
            "weight_bytes": self.weight_bytes,
            "total_weight_bytes": self.total,
        }


def step_traffic(model: EngineModel, rows: int, steps: int = 16, seed: int = 1) -> Traffic:
    """Count `steps` steps of `rows` random tokens: which experts they share is thus measured."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    cache = model.new_cache(_BEFORE + steps * rows)
    model.prefill(rng.integers(vocab, size=_BEFORE), cache)
    trace = Trace()
    for _ in range(steps):
        model.decode(rng.integers(vocab, size=rows), cache, trace)
    return Traffic(rows, steps, {k: v / steps for k, v in trace.weight_bytes.items()})

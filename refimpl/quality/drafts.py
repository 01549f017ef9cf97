"""How many drafts of the MTP layers stand on a text, by position.

Teacher-forced: behind the true text, a draft counts when it equals the trunk's own greedy choice
for the same position; the figure for position i is conditional, over places where all drafts
before it counted. In the loop: windows of the text are continued by the real draft-and-verify
loop. Axes: T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.backend import Array, Backend
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import DraftStats, GenerateOptions
from refimpl.decoding.sampling import SamplingParams
from refimpl.quality.clustered import Measured, ratio


class Conditional:
    """Counts of drafts that stood after those before them, window by window."""

    def __init__(self, depth: int) -> None:
        self._tried: list[list[float]] = [[] for _ in range(depth)]
        self._stood: list[list[float]] = [[] for _ in range(depth)]

    def add(self, tried: Sequence[int], stood: Sequence[int]) -> None:
        """One window; shorter sequences stand for positions never tried."""
        for i in range(len(self._tried)):
            self._tried[i].append(tried[i] if i < len(tried) else 0)
            self._stood[i].append(stood[i] if i < len(stood) else 0)

    def shares(self) -> list[Measured]:
        """Chance of each position given all before it."""
        return [ratio(s, t) for s, t in zip(self._stood, self._tried, strict=True)]

    def accepted_per_step(self) -> Measured:
        """Drafts accepted per verification."""
        if not self._tried:
            return Measured(0.0, None)
        return ratio([sum(s) for s in zip(*self._stood, strict=True)], self._tried[0])


def teacher_forced(greedy: Array, heads: Sequence[Array]) -> tuple[list[int], list[int]]:
    """Tried and stood by position on one window.

    Args:
        greedy: (T,) the trunk's choice after each token.
        heads: per MTP layer k its choices (T - 1 - k,); row t drafts what greedy[t + 1 + k] is.
    """
    count = len(greedy) - len(heads)
    stands = np.ones(count, dtype=bool)
    tried, stood = [], []
    for k, picks in enumerate(heads):
        tried.append(int(stands.sum()))
        stands &= picks[:count] == greedy[1 + k : 1 + k + count]
        stood.append(int(stands.sum()))
    return tried, stood


def looped(
    model: Backend, prompt: Sequence[int], depth: int, temperature: float, seed: int, new: int
) -> tuple[list[int], list[int]]:
    """Tried and stood by position while `new` tokens continue a prompt.

    Raises:
        KeyboardInterrupt: Ctrl-C, which ends a text early; figures of a part are none.
    """
    sampling = SamplingParams(temperature=temperature, seed=seed if temperature else None)
    options = GenerateOptions(max_new_tokens=new, sampling=sampling, mtp=depth, stop_tokens=())
    made = generate(model, prompt, options)
    if made.finish_reason == "interrupted":
        raise KeyboardInterrupt
    return by_position(made.mtp)


def by_position(stats: DraftStats) -> tuple[list[int], list[int]]:
    """Tried (all before stood) and stood by position."""
    stood = list(stats.accepted_by_position)
    reached = [stats.steps, *stood][: len(stood)]
    tried = [min(a, b) for a, b in zip(stats.drafted_by_position, reached, strict=True)]
    return tried, stood


def figures(found: Conditional) -> dict[str, Any]:
    """Plain data."""
    return {
        "by_position": [x.to_json() for x in found.shares()],
        "accepted_per_step": found.accepted_per_step().to_json(),
    }

"""Drafts that are accepted at given rates, for timing files of random weights.

Every matrix product of drafting and verifying is done as ever; only which tokens the logits favour
is changed, so that the loop, its policy and its rollbacks run unchanged. Tokens are random, as in
llama-bench, so that neighbouring rows choose their experts independently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refimpl.backend import Array, Backend, Cache, Step, Tokens
from refimpl.config import ModelConfig

_GOLDEN = 0.6180339887498949
_FAVOURED = np.float32(1e30)


class SimulatedAcceptance:
    """A `Backend` over another one, in which the i-th draft stands with chance `rates[i]` once
    those before it stood; a draft beyond them never does.

    The numbers of accepted drafts follow a golden-ratio sequence, whose averages come close to
    the rates within a few dozen steps.
    """

    def __init__(self, inner: Backend, rates: Sequence[float], seed: int = 1) -> None:
        self._inner = inner
        self._survival = np.cumprod(np.asarray(rates, dtype=np.float64))
        self._rng = np.random.default_rng(seed)
        self._place = float(self._rng.random())
        self._drafts: list[int] = []  # since the last step

    @property
    def config(self) -> ModelConfig:
        """The inner backend's configuration."""
        return self._inner.config

    def new_cache(self, capacity: int) -> Cache:
        """See `Backend.new_cache`."""
        return self._inner.new_cache(capacity)

    def identity(self) -> Mapping[str, str]:
        """The inner backend's."""
        return self._inner.identity()

    def prefill(self, tokens: Tokens, cache: Cache, all_logits: bool = False) -> Step:
        """See `Backend.prefill`; the favoured next token is random."""
        step = self._inner.prefill(tokens, cache, all_logits)
        return self._favour(step, [self._token()] * len(step.logits))

    def decode(self, tokens: Tokens, cache: Cache) -> Step:
        """See `Backend.decode`; logits favour as many of the drafts as are to stand, those that
        are not verified included."""
        step = self._inner.decode(tokens, cache)
        drafts, self._drafts = [int(t) for t in tokens][1:] or self._drafts, []
        accepted = self._accepted(len(drafts))
        wanted = [*drafts[:accepted], self._token()]
        if accepted < len(drafts) and wanted[-1] == drafts[accepted]:
            wanted[-1] = (wanted[-1] + 1) % self.config.vocab_size
        return self._favour(step, wanted[: len(step.logits)])

    def draft_cost(self, depth: int) -> float:
        """See `Backend.draft_cost`."""
        return self._inner.draft_cost(depth)

    def draft(
        self,
        cache: Cache,
        hidden: Array,
        next_tokens: Tokens,
        depth: int,
        choose: Callable[[Array], int],
    ) -> list[int]:
        """See `Backend.draft`; each draft is picked as ever, then replaced by a random token."""

        def random(logits: Array) -> int:
            choose(logits)
            return self._token()

        self._drafts = self._inner.draft(cache, hidden, next_tokens, depth, random)
        return self._drafts

    def _accepted(self, drafts: int) -> int:
        self._place = (self._place + _GOLDEN) % 1.0
        return int(np.count_nonzero(self._place < self._survival[:drafts]))

    def _token(self) -> int:
        return int(self._rng.integers(self.config.vocab_size))

    def _favour(self, step: Step, wanted: Sequence[int]) -> Step:
        logits = step.logits if step.logits.flags.writeable else step.logits.copy()
        for row, token in enumerate(wanted):
            logits[row, token] = _FAVOURED
        return Step(logits, step.hidden)

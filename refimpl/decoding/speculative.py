"""Draft and verify: which drafts of the MTP layers stand, and what comes after them.

The trunk runs once over the newest token and k drafts and so says, for each of the k + 1
positions, what it would have picked itself. `Picker` holds the two exact rules:

* greedy: drafts stand as long as each equals the trunk's own choice; then comes that choice.
  The text is that of plain greedy decoding.
* sampled (rejection sampling, Leviathan et al. 2023, arXiv 2211.17192, algorithm 1): a draft d
  drawn from q stands with probability min(1, p(d) / q(d)); at the first rejection the token is
  drawn from max(p - q, 0), normalised; if all stand, one more is drawn from the last p. Each
  emitted token then has the distribution p of plain sampling, whatever q is. The text for a
  given seed is another one than without drafts: only the distribution is the same.

p and q are both taken after temperature, top-k, top-p and min-p. Axis: V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.backend import Array
from refimpl.decoding.sampling import (
    Probabilities,
    SamplingParams,
    argmax,
    distribution,
    draw,
)


@dataclass(frozen=True)
class Verdict:
    """Outcome of one verification: the first `accepted` drafts stand, then comes `token`."""

    accepted: int
    token: int


def accept_probability(p: Probabilities, q: Probabilities, token: int) -> float:
    """The probability with which a draft `token` drawn from q (V,) may stand for p (V,)."""
    return min(1.0, float(p[token]) / float(q[token]))


def residual(p: Probabilities, q: Probabilities) -> Probabilities:
    """What a rejected draft is replaced from: max(p - q, 0) (V,), normalised."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    # p = q up to rounding: a rejection has then (all but) no probability, and p is the answer.
    return rest / total if total > 0 else p


class Picker:
    """Picks tokens and verifies drafts for one sequence, with one random generator.

    A step is: `begin()`, then `choose` for each draft (the backend calls it), then `verify`.
    """

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self._params = params
        self._rng = rng
        self._draft_rows: list[Probabilities] = []

    def pick(self, logits: Array) -> int:
        """The next token from the trunk's logits (V,), without drafts."""
        if self._params.greedy:
            return argmax(logits)
        return draw(distribution(logits, self._params), self._rng)

    def begin(self) -> None:
        """Forget the draft distributions of the step before."""
        self._draft_rows.clear()

    def choose(self, logits: Array) -> int:
        """A draft from an MTP layer's logits (V,); its distribution is kept for `verify`."""
        if self._params.greedy:
            return argmax(logits)
        q = distribution(logits, self._params)
        self._draft_rows.append(q)
        return draw(q, self._rng)

    def would_stand(self, logits: Array, draft: int) -> float:
        """The chance that a draft which is not to be verified would have stood before the trunk's
        logits (V,); its distribution is forgotten, nothing is drawn."""
        if self._params.greedy:
            return float(argmax(logits) == draft)
        q = self._draft_rows.pop()
        return accept_probability(distribution(logits, self._params), q, draft)

    def verify(self, logits: Array, drafts: Sequence[int]) -> Verdict:
        """Judge `drafts` (k) by the trunk's logits (k + 1, V), row i being what follows draft i-1.

        Every token of the verdict is the trunk's own pick (greedy) or has exactly the trunk's
        distribution (sampled).
        """
        if self._params.greedy:
            return _verify_greedy(logits, drafts)
        return self._verify_sampled(logits, drafts)

    def _verify_sampled(self, logits: Array, drafts: Sequence[int]) -> Verdict:
        for i, (token, q) in enumerate(zip(drafts, self._draft_rows, strict=True)):
            p = distribution(logits[i], self._params)
            if self._rng.random() >= accept_probability(p, q, token):
                return Verdict(i, draw(residual(p, q), self._rng))
        return Verdict(len(drafts), self.pick(logits[len(drafts)]))


def _verify_greedy(logits: Array, drafts: Sequence[int]) -> Verdict:
    for i, draft in enumerate(drafts):
        own = argmax(logits[i])
        if own != draft:
            return Verdict(i, own)
    return Verdict(len(drafts), argmax(logits[len(drafts)]))

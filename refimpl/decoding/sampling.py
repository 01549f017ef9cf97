"""From logits to the next token.

`distribution` turns the logits of one position into the probabilities that a token is drawn
from. The order of the steps is that of Hugging Face `generate`: temperature, top-k, top-p, min-p,
each on the renormalised outcome of the one before. (llama.cpp's default chain cuts first and
applies the temperature last, so that for the same numbers its top-p and min-p judge the
untempered distribution; with temperature 1 the two orders agree.) Axis: V vocab_size.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Array
from refimpl.errors import InputError

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """How a token is picked.

    Attributes:
        temperature: 0 picks the most probable token (greedy); otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least
            top_p; 1 keeps all. The token that crosses the sum is kept.
        min_p: keep tokens with at least min_p times the highest probability; 0 keeps all.
        seed: seed of the random generator; None draws one.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature is {self.temperature}, expected 0 (greedy) or a positive number",
        )
        _require(self.top_k >= 0, f"top-k is {self.top_k}, expected 0 (off) or more")
        _require(
            0 < self.top_p <= 1, f"top-p is {self.top_p}, expected more than 0 and at most 1 (off)"
        )
        _require(0 <= self.min_p <= 1, f"min-p is {self.min_p}, expected 0 (off) to 1")
        _require(
            self.seed is None or self.seed >= 0, f"seed is {self.seed}, expected 0 or a larger one"
        )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken, without randomness."""
        return self.temperature == 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


GREEDY = SamplingParams()


def fresh_seed() -> int:
    """A seed for a run that named none; printed with the run, it repeats it."""
    return secrets.randbelow(2**32)


def argmax(logits: Array) -> int:
    """The most probable token of (V,) logits; the lowest id where several tie.

    Raises:
        InputError: a logit is not a number.
    """
    token = int(logits.argmax())  # the first of equal maxima; the position of a NaN if any
    if not math.isfinite(logits[token]):
        raise _bad_logits(logits)
    return token


def distribution(logits: Array, params: SamplingParams) -> Probabilities:
    """The probabilities (V,) that the next token is drawn from, summing to 1.

    Args:
        logits: (V,) of any float type; minus infinity forbids a token.
        params: temperature 0 gives probability 1 to `argmax(logits)`.

    Raises:
        InputError: a logit is not a number or infinite, or all tokens are forbidden.
    """
    best = argmax(logits)
    if params.greedy:
        one_hot = np.zeros(len(logits))
        one_hot[best] = 1.0
        return one_hot
    # The largest is subtracted before the division: no overflow for any temperature.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits[best])) / params.temperature
    p = np.exp(scaled)
    p /= p.sum()
    if 0 < params.top_k < len(p):
        p = _keep(p, _most_probable(p)[: params.top_k])
    if params.top_p < 1:
        order = _most_probable(p)
        reached = np.cumsum(p[order])
        # Everything before the first token at which the sum reaches top_p, and that token.
        count = int(np.searchsorted(reached, params.top_p)) + 1
        p = _keep(p, order[:count])
    if params.min_p > 0:
        p = _keep(p, np.flatnonzero(p >= params.min_p * p.max()))
    return p


def _most_probable(p: Probabilities) -> NDArray[np.intp]:
    """Token ids (V,) by falling probability; the lower id first among equals."""
    return np.argsort(-p, kind="stable")


def _keep(p: Probabilities, ids: NDArray[np.intp]) -> Probabilities:
    """`p` with all but `ids` set to 0, summing to 1 again."""
    kept = np.zeros_like(p)
    kept[ids] = p[ids]
    return kept / kept.sum()


def draw(p: Probabilities, rng: np.random.Generator) -> int:
    """A token drawn from (V,) probabilities with one random number; never one of probability 0."""
    cumulative = np.cumsum(p)
    u = rng.random() * cumulative[-1]
    token = int(np.searchsorted(cumulative, u, side="right"))
    # u can round up to the whole sum: then the last token with a probability is meant.
    return token if token < len(p) else int(np.flatnonzero(p)[-1])


def _bad_logits(logits: Array) -> InputError:
    wrong = np.flatnonzero(~(logits < np.inf))
    if len(wrong) == 0:
        return InputError("the model forbids every token (all logits are minus infinity)")
    return InputError(
        f"the model gave {logits[wrong[0]]} as the logit of token {wrong[0]} "
        f"({len(wrong)} of {len(logits)} are not finite): the checkpoint is damaged, or its "
        "values overflow this precision; try --dtype float64"
    )

"""Perplexity of a model on a text, and its distance from another model.

KL(P || Q) is taken with P the model compared against (`against`, the base) and Q the model, as
llama-perplexity's --kl-divergence does. Logarithms are natural; the softmax is float64 over the
backend's logits. Logits exist for a piece of a window at a time (`_rows`).
Axes: T rows of a piece, V vocab_size, n_w judged tokens of window w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.backend import Array, Backend
from refimpl.errors import InputError
from refimpl.quality.clustered import Measured, Values, exponential, mean, quantile
from refimpl.quality.windows import Window
from refimpl.text.tokenizer import Tokenizer

_PIECE_VALUES = 1 << 24  # logits at a time: 64 MiB of float32 for each model
_MOST_ROWS = 256
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Distance:
    """From the base to the model: KL divergence in nats, per judged token."""

    base: Perplexity
    kl_mean: Measured
    kl_p95: Measured
    kl_max: float
    top1_agreement: Measured
    nats_delta: Measured
    perplexity_ratio: Measured


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text.

    Attributes:
        nats_per_token: mean negative log-likelihood, standard error clustered by window.
        token_standard_error: that of nats_per_token if tokens were independent, which is how
            llama-perplexity states its own.
    """

    windows: int
    judged_tokens: int
    nats_per_token: Measured
    perplexity: Measured
    token_standard_error: float


def measure(
    model: Backend, windows: Sequence[Window], progress: Progress | None = None
) -> Perplexity:
    """Perplexity over `windows`.

    Raises:
        InputError: tokens that do not fit, or logits that are not finite.
    """
    nats = []
    for i, window in enumerate(windows):
        logs = (_chosen(_log_softmax(x), y) for x, y in _judged(model, window))
        nats.append(-np.concatenate(list(logs)))
        if progress is not None:
            progress(i + 1, len(windows))
    return _perplexity(nats)


def compare(
    model: Backend, base: Backend, windows: Sequence[Window], progress: Progress | None = None
) -> tuple[Perplexity, Distance]:
    """Perplexity of `model`, and its distance from `base` on the same windows.

    Raises:
        InputError: as `measure`, or vocabularies of different sizes.
    """
    sizes = model.config.vocab_size, base.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens, expected the same; "
            "probabilities cannot be compared"
        )
    columns: list[list[Values]] = [[], [], [], []]
    for i, window in enumerate(windows):
        pieces = [
            _piece(_log_softmax(q), _log_softmax(p), targets)
            for (q, targets), (p, _) in zip(
                _judged(model, window), _judged(base, window), strict=True
            )
        ]
        for column, parts in zip(columns, zip(*pieces, strict=True), strict=True):
            column.append(np.concatenate(parts))
        if progress is not None:
            progress(i + 1, len(windows))
    own, other, kl, same = columns
    delta = mean([a - b for a, b in zip(own, other, strict=True)])
    distance = Distance(
        base=_perplexity(other),
        kl_mean=mean(kl),
        kl_p95=quantile(kl, 0.95),
        kl_max=max(float(k.max()) for k in kl),
        top1_agreement=mean(same),
        nats_delta=delta,
        perplexity_ratio=exponential(delta),
    )
    return _perplexity(own), distance


def require_same_tokens(a: Tokenizer | None, b: Tokenizer | None) -> None:
    """Refuse to compare models whose tokens mean different texts.

    Raises:
        InputError: with the first token that differs.
    """
    if a is None or b is None:
        return
    ours, theirs = a.vocabulary.tokens, b.vocabulary.tokens
    if len(ours) != len(theirs):
        raise InputError(
            f"the tokenizers have {len(ours)} and {len(theirs)} tokens, expected the same; "
            "compare models of one vocabulary"
        )
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if x != y:
            raise InputError(
                f"token {i} is {x[:40]!r} for one model and {y[:40]!r} for the other; compare "
                "models of one vocabulary"
            )


def pieces_of(
    model: Backend, window: Window, first: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Run a window piece by piece: (start, Step with all logits of the piece) from position
    `first` (default: the window's first judged one) on; what is before it gives no logits."""
    tokens, begin = window.tokens, window.first if first is None else first
    cache = model.new_cache(len(tokens))
    rows = _rows(model.config.vocab_size)
    for start in range(0, begin, rows):
        model.prefill(tokens[start : min(start + rows, begin)], cache)
    for start in range(begin, len(tokens) - 1, rows):
        part = tokens[start : min(start + rows, len(tokens) - 1)]
        yield start, model.prefill(part, cache, all_logits=True)


def _judged(model: Backend, window: Window) -> Iterator[tuple[Array, Array]]:
    """Logits (T, V) and the tokens (T,) that follow them, piece by piece."""
    for start, step in pieces_of(model, window):
        targets = window.tokens[start + 1 : start + 1 + len(step.logits)]
        yield step.logits, np.array(targets, dtype=np.int64)


def _rows(vocab: int) -> int:
    return min(_MOST_ROWS, max(1, _PIECE_VALUES // vocab))


def _log_softmax(logits: Array) -> Array:
    """(T, V) -> (T, V) float64.

    Raises:
        InputError: a logit is not finite.
    """
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError(
            "the model gives logits that are not finite: the checkpoint is damaged or its values "
            "overflow; look with 'refimpl inspect --check'"
        )
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def _chosen(logs: Array, targets: Array) -> Array:
    """Log probability of each target: (T, V), (T,) -> (T,)."""
    return np.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]


def _piece(q: Array, p: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """nats of model and base, KL(base || model), same top token: (T, V) twice -> (T,) each."""
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    same = (q.argmax(axis=-1) == p.argmax(axis=-1)).astype(np.float64)
    return -_chosen(q, targets), -_chosen(p, targets), np.maximum(kl, 0.0), same


def _perplexity(nats: Sequence[Values]) -> Perplexity:
    whole = np.concatenate(nats)
    own = mean(nats)
    error = float(whole.std()) / math.sqrt(max(1, len(whole) - 1))
    return Perplexity(len(nats), len(whole), own, exponential(own), error)

"""Means over tokens with the uncertainty that correlated tokens really have.

Tokens of one window share their subject and their context, so that a standard error that takes
them for independent is too small. Here the window is the unit: of a mean x = sum / count over
windows w, the standard error is that of a ratio of sums,

    sqrt(W / (W - 1) * sum_w (sum_w - x * count_w)^2) / count

(Cochran, Sampling Techniques, section 6.3, without the correction for a finite population).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 1
Values = NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """A figure and its standard error over windows; None where there are fewer than two."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        """Plain data."""
        return {"value": self.value, "standard_error": self.standard_error}


def mean(windows: Sequence[Values]) -> Measured:
    """Mean over all values of all windows, each (n_w,), clustered by window."""
    return ratio([float(w.sum()) for w in windows], [len(w) for w in windows])


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Measured:
    """sum(sums) / sum(counts), one entry a window; 0 where nothing was counted."""
    top, bottom = np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64)
    total = float(bottom.sum())
    if not total:
        return Measured(0.0, None)
    value = float(top.sum()) / total
    used = int((bottom > 0).sum())
    if used < 2:
        return Measured(value, None)
    spread = float(((top - value * bottom) ** 2).sum()) * used / (used - 1)
    return Measured(value, math.sqrt(spread) / total)


def quantile(windows: Sequence[Values], q: float) -> Measured:
    """Quantile over all values, its error by the bootstrap: `RESAMPLES` draws of whole windows
    with replacement, from a fixed seed."""
    value = float(np.quantile(np.concatenate(windows), q))
    if len(windows) < 2:
        return Measured(value, None)
    rng = np.random.default_rng(SEED)
    draws = [
        np.quantile(np.concatenate([windows[i] for i in picked]), q)
        for picked in rng.integers(len(windows), size=(RESAMPLES, len(windows)))
    ]
    return Measured(value, float(np.std(draws, ddof=1)))


def exponential(x: Measured) -> Measured:
    """exp of a figure, its error to first order."""
    value = math.exp(x.value)
    return Measured(value, None if x.standard_error is None else value * x.standard_error)

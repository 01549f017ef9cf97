"""Slips of the program that wrote a candidate down, not of the model: rows one off, or scaled.

Axes: R observed rows of the logits, in order of position, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_FEWEST_ROWS = 3  # of which two still agree when one falls off the end


def slip(values: Array, reference: Array, noise: float) -> str | None:
    """What the candidate's logits are, if that is the reference's with a slip: (R, V) each.

    Args:
        noise: largest rms distance of a row, in units of the reference's row, that is rounding.
    """
    if len(values) >= _FEWEST_ROWS:
        if _near(values[1:], reference[:-1], noise):
            return "each row holds the logits of the row before it: the rows are one too late"
        if _near(values[:-1], reference[1:], noise):
            return "each row holds the logits of the row after it: the rows are one too early"
    scale = float(np.vdot(reference, values) / np.vdot(reference, reference))
    if abs(scale - 1) > noise and _near(values, scale * reference, noise):
        return f"every logit is {scale:.6g} times the reference's: is a temperature applied?"
    return None


def _near(values: Array, reference: Array, noise: float) -> bool:
    size = np.sqrt(np.mean(np.square(reference), axis=-1)) + 1e-30
    gap = np.sqrt(np.mean(np.square(values - reference), axis=-1))
    return bool((gap <= noise * size).all())

"""RMSNorm. Axes: ... any leading axes, N normalised axis."""

from __future__ import annotations

import numpy as np

from refimpl.reference.numerics import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis.

    `scale` is 1 + w of the zero-centred weight w (`zero_centered` in config.json).
    """
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)  # (..., N) -> (..., 1)
    return x / np.sqrt(mean_square + x.dtype.type(eps)) * scale  # (..., N)

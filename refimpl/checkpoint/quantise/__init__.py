"""Quantisers of the block types that `refimpl convert` writes, compiled by Numba.

The K-quants and IQ4 types are written from the formats' layouts and least squares. Their root mean
square error is below that of llama-quantize without an imatrix on the same values
(tests/golden/quantize.json has the figures): llama.cpp weighs large values more, these minimise
the plain squared error. The simple types of 32 values follow llama.cpp's rules bit for bit; the
`gguf` package has them as well, but in NumPy, whose steps do not spread over many cores.

Each block's bytes depend on its own values alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_HALF_MAX = 65504.0  # scales and minima are halves
LARGEST = {
    "Q4_K": _HALF_MAX, "Q5_K": _HALF_MAX, "Q6_K": _HALF_MAX, "IQ4_NL": _HALF_MAX,
    "IQ4_XS": _HALF_MAX, "Q4_0": 8 * _HALF_MAX, "Q4_1": _HALF_MAX, "Q5_0": 16 * _HALF_MAX,
    "Q5_1": _HALF_MAX, "Q8_0": 127 * _HALF_MAX,
}  # fmt: skip
"""The types that can be made, and the greatest magnitude that each may be asked to hold."""


def quantise(name: str, rows: Array) -> Array:
    """Stored bytes (rows, row_bytes) of finite float32 values (rows, n).

    Args:
        name: a key of `LARGEST`, whose bound the values keep; n must fill whole blocks of the type.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block_values)
    out = np.empty((len(blocks), block_bytes), np.uint8)
    _kernel(name)(blocks, out)
    return out.reshape(len(rows), -1)


def _kernel(name: str) -> Callable[[Array, Array], None]:
    from refimpl.checkpoint.quantise.affine import quantise_affine
    from refimpl.checkpoint.quantise.flat import quantise_flat
    from refimpl.checkpoint.quantise.scaled import quantise_scaled

    if name in ("Q4_K", "Q5_K"):
        bits = 4 if name == "Q4_K" else 5
        return lambda x, out: quantise_affine(x, out, bits)
    if name in _FLAT:
        return lambda x, out: quantise_flat(x, out, _FLAT[name])
    size, subs, least, trials = _SCALED[name]
    return lambda x, out: quantise_scaled(x, out, size, subs, np.float32(least), trials)


def _trials(*spans: tuple[float, float, float]) -> Array:
    return np.concatenate([np.arange(*span) for span in spans]).astype(np.float32)


_TRIALS_6 = _trials((-33, -30.9, 0.25), (30, 32.1, 0.25))
_TRIALS_4 = _trials((-141, -112, 4), (98, 126, 4))
_SCALED = {
    "Q6_K": (16, 16, -128, _TRIALS_6),
    "IQ4_XS": (32, 8, -32, _TRIALS_4),
    "IQ4_NL": (32, 1, 1, _TRIALS_4),
}
"""Per type: values in a sub-block, sub-blocks in a block, least integer scale, trial numbers."""
_FLAT = {"Q8_0": 80, "Q4_0": 40, "Q4_1": 41, "Q5_0": 50, "Q5_1": 51}

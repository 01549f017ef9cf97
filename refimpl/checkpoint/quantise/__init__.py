"""Quantisers of the block types that the `gguf` package decodes but does not make.

Written from the formats' layouts and least squares; compiled by Numba. Each block's bytes depend
on its own values alone. The root mean square error is below that of llama-quantize without an
imatrix on the same values (tests/golden/quantize.json has the figures): llama.cpp weighs large
values more, these minimise the plain squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NAMES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
LARGEST = 65504.0
"""Greatest magnitude that these quantisers take: scales are halves."""


def quantise(name: str, rows: Array) -> Array:
    """Stored bytes (rows, row_bytes) of finite float32 values (rows, n) within `LARGEST`.

    Args:
        name: one of `NAMES`; n must fill whole blocks of the type.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block_values)
    out = np.empty((len(blocks), block_bytes), np.uint8)
    _kernel(name)(blocks, out)
    return out.reshape(len(rows), -1)


def _kernel(name: str) -> Callable[[Array, Array], None]:
    from refimpl.checkpoint.quantise.affine import quantise_affine
    from refimpl.checkpoint.quantise.scaled import quantise_scaled

    if name in ("Q4_K", "Q5_K"):
        bits = 4 if name == "Q4_K" else 5
        return lambda x, out: quantise_affine(x, out, bits)
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

"""Where the scales of the ggml block formats lie, and what a quantiser can have put there.

Source: the block structures of ggml-common.h in llama.cpp and the quantisers of ggml-quants.c.
Every scale is a little-endian float16 at a fixed place of its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ScaleField:
    """One float16 of a block.

    Attributes:
        offset: first byte within the block.
        is_minimum: the field scales the offsets of a format with minimum (`dmin`, `m`), not the
            codes.
        never_negative: quantisers never write a negative value here.
    """

    offset: int
    is_minimum: bool = False
    never_negative: bool = False


def _field(offset: int) -> tuple[ScaleField, ...]:
    return (ScaleField(offset),)


def _pair(offset: int) -> tuple[ScaleField, ...]:
    return (
        ScaleField(offset, never_negative=True),
        ScaleField(offset + 2, is_minimum=True, never_negative=True),
    )


_ONE = (ScaleField(0, never_negative=True), ScaleField(2, is_minimum=True))

SCALE_FIELDS: dict[str, tuple[ScaleField, ...]] = {
    "Q4_0": _field(0),
    "Q4_1": _ONE,
    "Q5_0": _field(0),
    "Q5_1": _ONE,
    "Q8_0": (ScaleField(0, never_negative=True),),
    "Q2_K": _pair(80),
    "Q3_K": _field(108),
    "Q4_K": _pair(0),
    "Q5_K": _pair(0),
    "Q6_K": _field(208),
    "IQ4_NL": _field(0),
    "IQ4_XS": _field(0),
    "IQ3_XXS": _field(0),
    "IQ3_S": _field(0),
    "IQ2_XXS": _field(0),
    "IQ2_XS": _field(0),
    "IQ2_S": _field(0),
    "IQ1_S": _field(0),
}
"""Scale fields by type name; types that are not listed have none that can be looked at."""


def field_values(rows: Array, block_bytes: int, place: ScaleField) -> Array:
    """One field of every block: stored bytes (rows, row_bytes) -> (rows, blocks) float16."""
    blocks = rows.reshape(len(rows), -1, block_bytes)
    pair = np.ascontiguousarray(blocks[:, :, place.offset : place.offset + 2])
    return pair.view("<f2")[..., 0]

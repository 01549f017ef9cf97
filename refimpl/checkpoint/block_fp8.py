"""FP8 weights with a scale for every block, as `Step-3.5-Flash-FP8` holds its routed experts.

A weight `NAME.weight` of type F8_E4M3 (float8_e4m3fn) has a companion `NAME.weight_scale_inv`
with one scale for every block of B0 x B1 values (128 x 128 as published, `weight_block_size` of
`quantization_config` in config.json), the last block of a row or column being cut off at the
edge. Despite the name it is what a stored value is multiplied by:

    w[r, c] = fp8[r, c] * scale[r div B0, c div B1]

Stacked experts (E, out, in) have scales (E, ceil(out / B0), ceil(in / B1)). Sources:
the shapes of the published shards ([288, 10, 32] and [288, 32, 10]); transformers
`integrations/finegrained_fp8.py`; `weight_dequant` of DeepSeek-V3, from which the layout comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray

from refimpl.checkpoint.block_types import BlockType

Array = NDArray[Any]

STORED_NAME = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
LARGEST = 448.0  # of float8_e4m3fn


def fp8_type() -> BlockType:
    """The type of the stored values; they mean nothing without their scales."""
    return BlockType(STORED_NAME, -1, 1, 1, None)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight (..., out, in)."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block[0]), -(-columns // block[1]))


@cache
def _values() -> Array:
    """The 256 codes as float32."""
    return np.arange(256, dtype=np.uint8).view(float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True)
class BlockScales:
    """The scales of one FP8 tensor; a `refimpl.checkpoint.stored.RowDecoder`.

    Attributes:
        scales: (E x ceil(out / B0), ceil(in / B1)), as stored (F32, BF16 or F16).
        out: rows of one matrix.
        block: (B0, B1).
    """

    scales: Array
    out: int
    block: tuple[int, int]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the scales in the file."""
        return int(self.scales.nbytes)

    def decode(self, rows: Array, index: Array) -> Array:
        """Codes (n, in) of the rows numbered `index` (n,) -> float32 values (n, in)."""
        values = _values()[rows]
        scales = self._of_rows(index).astype(np.float32)  # (n, blocks)
        width = self.block[1]
        n, columns = values.shape
        with np.errstate(all="ignore"):  # a damaged scale may be infinite; the values then say so
            if columns % width == 0:
                values.reshape(n, -1, width)[...] *= scales[:, :, None]
            else:
                values *= np.repeat(scales, width, axis=1)[:, :columns]
        return values

    def scale_faults(self, start: int, stop: int) -> dict[str, Array]:
        """What is impossible about the scales of rows start..stop, as masks (n, blocks).

        Each block of rows is counted at its first row only.
        """
        index = np.arange(start, stop)
        scales = self._of_rows(index).astype(np.float32)
        first = (index % self.out % self.block[0] == 0)[:, None]
        broken = ~np.isfinite(scales)
        return {"not finite": broken & first, "negative": ~broken & (scales < 0) & first}

    def _of_rows(self, index: Array) -> Array:
        per_matrix = -(-self.out // self.block[0])
        matrix, row = np.divmod(index, self.out)
        return self.scales[matrix * per_matrix + row // self.block[0]]


def quantise_fp8(matrix: Array, block: tuple[int, int] = DEFAULT_BLOCK) -> tuple[Array, Array]:
    """Codes (out, in) uint8 and float32 scales (ceil(out / B0), ceil(in / B1)) of a matrix.

    Each block's largest magnitude becomes the largest FP8 value, as the published quantisers do;
    a block of zeros (or of values so small that their scale would be zero) gets the scale 1.
    """
    rows, columns = matrix.shape
    height, width = (-(-n // b) for n, b in zip((rows, columns), block, strict=True))
    padded = np.zeros((height * block[0], width * block[1]), np.float32)
    padded[:rows, :columns] = matrix
    blocks = padded.reshape(height, block[0], width, block[1])
    peaks = np.abs(blocks).max(axis=(1, 3))  # (height, width)
    scales = (peaks / np.float32(LARGEST)).astype(np.float32)
    scales[scales == 0] = 1
    scaled = np.clip(blocks / scales[:, None, :, None], -LARGEST, LARGEST)
    codes = scaled.astype(float8_e4m3fn).reshape(padded.shape)[:rows, :columns]
    return np.ascontiguousarray(codes).view(np.uint8), scales

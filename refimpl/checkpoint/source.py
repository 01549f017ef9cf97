"""What the backends ask of a checkpoint, whatever its file format.

A `WeightSource` hands out one matrix, one expert or a few rows at a time, decoded from the
memory map, so that memory stays bounded for any file. Tensors are named by the short `key` of
`refimpl.inventory.TensorSpec` and a layer index (None outside the layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refimpl.config import ModelConfig

Array = NDArray[Any]


class WeightSource(Protocol):
    """Decoded weights, always in Hugging Face orientation ([out, in]), read-only."""

    @property
    def config(self) -> ModelConfig:
        """The configuration as far as the file holds its tensors (MTP layers only if present)."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Notes for the user, such as MTP layers that are declared but missing."""

    def matrix(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """A whole 2-D tensor (out, in)."""

    def expert(self, key: str, layer: int, index: int, dtype: DTypeLike) -> Array:
        """One expert's matrix (out, in) of a stacked tensor."""

    def rows(self, key: str, layer: int | None, ids: Sequence[int], dtype: DTypeLike) -> Array:
        """Selected rows (len(ids), in) of a 2-D tensor, such as embeddings."""

    def vector(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """A 1-D tensor as stored (router bias)."""

    def norm_scale(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """1 + w of a norm, from w (Hugging Face) or from the stored 1 + w (GGUF)."""

    def stored_bytes(self, key: str, layer: int | None) -> int:
        """Bytes of the tensor in the file (all experts, if stacked)."""

    def close(self) -> None:
        """Release the memory map; arrays handed out before remain valid."""


def as_dtype(values: Array, dtype: DTypeLike) -> Array:
    """`values` in `dtype`, without a copy where it already has it."""
    return values if values.dtype == np.dtype(dtype) else values.astype(dtype)

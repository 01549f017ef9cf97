"""How stored values become numbers: one table keyed by type name.

A *block* is the unit of a ggml type: `block_values` values of a row in `block_bytes` bytes
(ggml-common.h and ggml-quants.c in llama.cpp). Plain floating-point types are blocks of
one value. The decoders of the block formats are those of the `gguf` package (NumPy, on any slice
of whole rows), so every type it knows can be opened; the encoders are this project's
(`refimpl.checkpoint.quantise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from refimpl.errors import CheckpointError

Array = NDArray[Any]
Decoder = Callable[[Array], Array]


@dataclass(frozen=True)
class BlockType:
    """A stored type: its name, its size, and how rows of it are decoded.

    `decode` takes bytes (rows, row_bytes) and gives float32 (rows, row_values). `plain` is the
    NumPy type of a format that needs no decoding, else None. `ggml_id` is the type's number in
    GGUF files.
    """

    name: str
    ggml_id: int
    block_values: int
    block_bytes: int
    decode: Decoder | None
    plain: np.dtype[Any] | None = None

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of `values` values, which must fill whole blocks."""
        if values % self.block_values:
            raise CheckpointError(
                f"rows of {values} values do not fill blocks of {self.block_values} ({self.name})"
            )
        return values // self.block_values * self.block_bytes


PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(bfloat16),
}


def block_type(name: str) -> BlockType:
    """The type with that name ('F32', 'Q8_0', ...).

    Raises:
        CheckpointError: there is no such type.
    """
    found = _table().get(name)
    if found is None:
        raise CheckpointError(f"unknown stored type {name!r}")
    return found


def block_type_of_id(ggml_id: int) -> BlockType | None:
    """The type with that number in GGUF files, or None."""
    return _by_id().get(ggml_id)


def decode(kind: BlockType, rows: Array) -> Array:
    """Values (rows, n) of stored bytes (rows, row_bytes): plain types as stored, else float32.

    Raises:
        CheckpointError: no decoder is known for the type.
    """
    if kind.plain is not None:
        return rows.view(kind.plain)
    if kind.decode is None:
        raise CheckpointError(f"values of type {kind.name} cannot be decoded by this program")
    with np.errstate(all="ignore"):  # a damaged scale may be infinite; the values then say so
        return kind.decode(rows)


def encode(kind: BlockType, values: Array, where: str) -> Array:
    """Stored bytes (rows, row_bytes) of values (rows, n).

    Args:
        where: file and tensor, for messages.

    Raises:
        CheckpointError: a value is beyond the type, or not finite where blocks share a scale.
    """
    from refimpl.checkpoint import quantise

    peak = _peak(values)
    finite = math.isfinite(peak)
    if kind.plain is not None:
        with np.errstate(over="ignore"):
            plain = values.astype(kind.plain)
        if finite and peak > _FITS_ALL and not math.isfinite(_peak(plain)):
            raise CheckpointError(f"{where} holds {peak:.4g}, beyond {kind.name}; choose bf16")
        return np.ascontiguousarray(plain).view(np.uint8)
    if not finite:
        raise CheckpointError(f"{where} holds a value that is not finite; {kind.name} has none")
    if kind.name not in quantise.LARGEST:
        raise CheckpointError(f"values cannot be turned into {kind.name} by this program")
    if peak > quantise.LARGEST[kind.name]:
        raise CheckpointError(f"{where} holds {peak:.4g}, beyond {kind.name}; choose bf16")
    return quantise.quantise(kind.name, values)


_FITS_ALL = 65504.0  # no plain type overflows up to here


def _peak(values: Array) -> float:
    """The greatest magnitude; not finite if any value is not."""
    if not values.size:
        return 0.0
    wide = values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
    return max(-float(wide.min()), float(wide.max()), key=lambda v: math.inf if v != v else v)


@cache
def _table() -> dict[str, BlockType]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    table = {}
    for kind in GGMLQuantizationType:
        values, size = GGML_QUANT_SIZES[kind]
        plain = PLAIN.get(kind.name)
        decoder = None if plain is not None else _library_decoder(kind)
        table[kind.name] = BlockType(kind.name, int(kind), values, size, decoder, plain)
    return table


@cache
def _by_id() -> dict[int, BlockType]:
    return {kind.ggml_id: kind for kind in _table().values()}


def _library_decoder(kind: Any) -> Decoder | None:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import _type_traits, dequantize

    if kind not in _type_traits:
        return None
    values, size = GGML_QUANT_SIZES[kind]

    def decoder(rows: Array) -> Array:
        if not len(rows):  # which the library does not take in every type
            return np.empty((0, rows.shape[1] // size * values), np.float32)
        return dequantize(np.ascontiguousarray(rows), kind)

    return decoder

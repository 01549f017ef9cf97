"""Random weights straight as stored blocks, at the speed of the generator.

Nothing is quantised: the bytes of a block are random, and its float16 scales are set so that the
decoded values have zero mean and the wanted spread. Every such block is valid; the kernels that
read it do the work that they do on real weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.block_scales import SCALE_FIELDS, ScaleField
from refimpl.checkpoint.block_types import BlockType, block_type
from refimpl.errors import InputError

Array = NDArray[Any]
_CHUNK_BYTES = 16 << 20
_SAMPLE_BLOCKS = 1 << 14
_TABLE = 1 << 16


@dataclass(frozen=True)
class _Calibration:
    """What the scale fields must hold for unit spread: value of the scale, ratio of the minimum."""

    scale: float
    minimum: float


def can_be_random(name: str) -> bool:
    """Whether blocks of a stored type can be made here."""
    return name in SCALE_FIELDS or block_type(name).plain is not None


def random_rows(
    kind: BlockType, rows: int, values: int, std: float, rng: np.random.Generator
) -> Iterator[Array]:
    """Stored bytes (n, row_bytes) of `rows` rows of `values` values, some rows at a time.

    Args:
        std: root mean square of the decoded values; float16 scales hit it within about 1 %.

    Raises:
        InputError: the scales of the type's blocks are not known.
    """
    row_bytes = kind.row_bytes(values)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        if kind.plain is not None:
            yield _plain(kind, n * values, std, rng).reshape(n, row_bytes)
        else:
            yield _blocks(kind, n * row_bytes // kind.block_bytes, std, rng).reshape(n, row_bytes)


def _random_bytes(count: int, rng: np.random.Generator) -> Array:
    raw = rng.bit_generator.random_raw(-(-count // 8))
    return np.asarray(raw, dtype="<u8").view(np.uint8)[:count]


def _plain(kind: BlockType, count: int, std: float, rng: np.random.Generator) -> Array:
    """Normal values by table: 65,536 equally probable ones of the type."""
    assert kind.plain is not None
    table = (_normal_table() * np.float32(std)).astype(kind.plain)
    index = _random_bytes(2 * count, rng).view("<u2")
    return table[index].view(np.uint8)


@cache
def _normal_table() -> Array:
    from scipy.special import ndtri

    return ndtri((np.arange(_TABLE) + 0.5) / _TABLE).astype(np.float32)


def _blocks(kind: BlockType, count: int, std: float, rng: np.random.Generator) -> Array:
    fields, unit = _fields(kind), _calibration(kind.name)
    blocks = _random_bytes(count * kind.block_bytes, rng).reshape(count, kind.block_bytes)
    signs = _random_bytes(count, rng) & 1
    for place in fields:
        size = std * (unit.minimum if place.is_minimum else unit.scale)
        either = _float16_bytes([size, size if _one_sign(fields, place) else -size])
        blocks[:, place.offset : place.offset + 2] = either[signs]
    return blocks


def _one_sign(fields: tuple[ScaleField, ...], place: ScaleField) -> bool:
    """Whether the field keeps its sign: a quantiser's own rule, or because a minimum offsets it."""
    return place.never_negative or len(fields) > 1


def _fields(kind: BlockType) -> tuple[ScaleField, ...]:
    found = SCALE_FIELDS.get(kind.name)
    if found is None:
        raise InputError(
            f"blocks of type {kind.name} cannot be made at random; use one of "
            f"{', '.join(SCALE_FIELDS)}"
        )
    return found


def _float16_bytes(values: list[float]) -> Array:
    return np.array(values, dtype="<f2").view(np.uint8).reshape(-1, 2)


@cache
def _calibration(name: str) -> _Calibration:
    """Measured on random blocks through the type's own decoder."""
    kind, rng = block_type(name), np.random.Generator(np.random.SFC64(1))
    fields = _fields(kind)
    blocks = _random_bytes(_SAMPLE_BLOCKS * kind.block_bytes, rng).reshape(_SAMPLE_BLOCKS, -1)

    def decoded(scale: float, minimum: float) -> Array:
        for place in fields:
            value = minimum if place.is_minimum else scale
            blocks[:, place.offset : place.offset + 2] = _float16_bytes([value])
        assert kind.decode is not None
        return kind.decode(blocks).astype(np.float64)

    ratio = 0.0
    if any(place.is_minimum for place in fields):
        ratio = -float(decoded(1.0, 0.0).mean() / decoded(0.0, 1.0).mean())
    spread = float(np.sqrt(np.mean(np.square(decoded(1.0, ratio)))))
    return _Calibration(1.0 / spread, ratio / spread)

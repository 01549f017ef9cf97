"""Products by way of unpacked weights, called as the engine calls them, for tests of kernels."""

import numpy as np

from refimpl.engine.activations import FLOAT, form_bytes, prepare, scratch_bytes
from refimpl.engine.memory import address, zeroed
from refimpl.engine.simd import Simd
from refimpl.engine.tiles import Tiling
from refimpl.engine.tiles_codes import TILE_ROWS


def blob(row: np.ndarray, form: int, simd: Simd) -> tuple[np.ndarray, int]:
    """An activation row with a form behind it, and where that form begins."""
    n, at = len(row), form_bytes(FLOAT, len(row))
    made = zeroed(at + form_bytes(form, n))
    made[: 4 * n] = row.view(np.uint8)
    if form == FLOAT:
        return made, 0
    plan, scratch = np.array([0, 1, form, at], dtype=np.int64), zeroed(scratch_bytes(n))
    prepare(simd).ctypes(address(made), n, address(plan), 1, address(scratch))
    return made, at


def products(made: Tiling, simd: Simd, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x (T, n) times stored rows (R, bytes), R a multiple of 16 -> (T, R), as the engine's
    `refimpl.engine.work` goes about it: some columns at a time, `tokens` rows at a time."""
    count, columns = x.shape
    tiles, tile_bytes = zeroed(made.scratch_bytes(columns)), made.tile_bytes(columns)
    blobs = [blob(row, made.form, simd) for row in x]
    places = np.array([address(b) for b, _ in blobs], dtype=np.int64)
    y = np.full((count, len(data)), np.nan, dtype=np.float32)
    number = min(len(data), made.unit_rows) // TILE_ROWS
    for row in range(0, len(data), number * TILE_ROWS):
        for first in range(0, columns, made.columns):
            part = min(made.columns, columns - first)
            at = first * data.shape[1] // columns
            for tile in range(number):
                w = address(data) + (row + tile * TILE_ROWS) * data.shape[1] + at
                made.unpack.ctypes(w, data.shape[1], part, address(tiles) + tile * tile_bytes)
            for t in range(0, count, made.tokens):
                made.multiply.ctypes(
                    address(tiles), tile_bytes, number, first, part, columns,
                    address(places) + 8 * t, min(made.tokens, count - t), blobs[0][1],
                    address(y) + t * y.strides[0] + 4 * row, y.strides[0],
                )  # fmt: skip
    return y


def error(made: Tiling, simd: Simd, stored: tuple[np.ndarray, np.ndarray], count: int) -> float:
    """Relative rms error of the products of `count` rows of activations."""
    data, values = stored
    x = np.random.default_rng(5).standard_normal((count, values.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ values.T
    got = products(made, simd, data, x)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))

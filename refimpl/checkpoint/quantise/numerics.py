"""Small pieces of arithmetic that the quantisers share, compiled into each of them.

Everything is single precision in a fixed order without reassociation, so a block's bytes do not
depend on the number of threads, on its neighbours, or on the width of the machine's vectors.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core import caching

LANES = 64
"""Blocks that a kernel works on side by side: inner loops run over them and become vectors."""

MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TINY = np.float32(1e-30)


def compiled(function: Any) -> Any:
    """The function compiled by Numba on first use, run without Python's lock; kept on disk where
    a folder for it can be written."""
    made: Any = njit(function, nogil=True, error_model="numpy")
    try:
        made._cache = _Cache(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    return made


class _Cache(caching.FunctionCache):
    """Code on disk is of use as long as no quantiser has changed: by itself Numba looks at the
    outermost function's file only, and would go on with what other files held before."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        name = self._impl.filename_base
        self._cache_file = caching.IndexDataCacheFile(self.cache_path, name, _sources())


@cache
def _sources() -> bytes:
    """Hash of this folder's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


@compiled
def half_bits(x: Any) -> Any:
    """The bits of a finite float32 rounded to IEEE half precision, ties to even."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    bits &= np.uint32(0x7FFFFFFF)
    if bits < np.uint32(0x38800000):  # below 2**-14 halves are multiples of 2**-24
        steps = np.uint32(bits).view(np.float32) * np.float32(16777216.0)
        return sign | np.uint32((steps + MAGIC) - MAGIC)
    bits += np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return sign | ((bits >> np.uint32(13)) - np.uint32(0x1C000))


@compiled
def half_value(bits: Any) -> Any:
    """The float32 value of the bits of a finite half."""
    magnitude = np.uint32(bits) & np.uint32(0x7FFF)
    if magnitude < np.uint32(0x400):
        value = np.float32(magnitude) * np.float32(2.0**-24)
    else:
        value = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x38000000)).view(np.float32)
    return -value if np.uint32(bits) & np.uint32(0x8000) else value


@compiled
def store_half(out: Any, at: Any, bits: Any) -> None:
    """Write the bits of a half into two bytes, little-endian."""
    out[at] = np.uint8(bits & np.uint32(0xFF))
    out[at + 1] = np.uint8(bits >> np.uint32(8))


@compiled
def inverse(x: Any) -> Any:
    """1 / x, or 0 where x is too small for it."""
    return ONE / x if abs(x) > TINY else ZERO


@compiled
def within(x: Any, low: Any, high: Any) -> Any:
    """x, or the bound that it is beyond."""
    return min(max(x, low), high)


@compiled
def nearest(x: Any, low: Any, high: Any) -> Any:
    """The integer nearest to x within bounds, as float32 (|x| below 2**22)."""
    return within((x + MAGIC) - MAGIC, low, high)


@compiled
def load_tile(x: Any, first: Any, size: Any, tile: Any) -> None:
    """Blocks first..first+LANES of x (blocks, size) as tile (size x LANES), the lanes innermost;
    zeros for blocks beyond the last."""
    n = min(LANES, x.shape[0] - first)
    if n < LANES:
        tile[:] = ZERO
    for i in range(size):
        for lane in range(n):
            tile[i * LANES + lane] = x[first + lane, i]

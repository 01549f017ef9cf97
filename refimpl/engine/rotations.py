"""cos and sin of positions for compiled code, formed in float64 and kept in float32.

Decoding goes from one position to the next, so a stretch of positions is formed at once and its
steps only say where in it they begin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Array
from refimpl.engine.memory import address, zeroed
from refimpl.reference.rope import angles

_STRETCH = 64  # positions
_FEW = 8  # rows of a run that may end beyond its stretch


class Rotations:
    """Tables (rows, R/2) of cos and sin for each set of frequencies (R/2,), and `places` (2, sets):
    the addresses of the first row of the present run, cos before sin.

    Args:
        freqs: the sets.
        rows: the most rows of a run.
    """

    def __init__(self, freqs: Sequence[Array], rows: int) -> None:
        self._freqs = list(freqs)
        self._many = _tables(freqs, rows)
        # The trunk and the MTP layers run at positions side by side: two stretches at a time.
        self._few = [_tables(freqs, _STRETCH + _FEW) for _ in range(2)]
        self._formed = [-1, -1]  # which stretches they hold
        self.places: NDArray[np.int64] = np.zeros((2, len(freqs)), dtype=np.int64)
        self._start = _addresses(self._many)
        ahead = 4 * np.arange(_STRETCH)[:, None, None] * np.array([len(f) for f in freqs])
        self._within = [_addresses(tables) + ahead for tables in self._few]  # (stretch, 2, sets)

    def use(self, start: int, count: int) -> None:
        """Have `places` say where rows start, start + 1, ... lie."""
        if count > _FEW:
            self._form(self._many, start, count)
            self.places[:] = self._start
            return
        stretch, offset = divmod(start, _STRETCH)
        half = stretch % 2
        if self._formed[half] != stretch:
            self._form(self._few[half], stretch * _STRETCH, _STRETCH + _FEW)
            self._formed[half] = stretch
        self.places[:] = self._within[half][offset]

    def _form(self, tables: list[list[Array]], start: int, count: int) -> None:
        positions = np.arange(start, start + count)
        for freqs, cos, sin in zip(self._freqs, *tables, strict=True):
            cos[:count], sin[:count] = angles(positions, freqs)


def _tables(freqs: Sequence[Array], rows: int) -> list[list[Array]]:
    return [
        [zeroed(4 * rows * len(f)).view(np.float32).reshape(rows, len(f)) for f in freqs]
        for _ in range(2)
    ]


def _addresses(tables: list[list[Array]]) -> NDArray[np.int64]:
    return np.array([[address(t) for t in part] for part in tables], dtype=np.int64)

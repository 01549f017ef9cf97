"""Keys and values of one sequence, in the layout of `refimpl.engine.attention`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Array
from refimpl.config import LayerSpec, ModelConfig
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.engine.attention import KvType
from refimpl.engine.fields import Kv
from refimpl.engine.memory import Bytes, address, round_up, zeroed

GROUP = 16  # positions whose keys lie side by side


def layer_slots(spec: LayerSpec, capacity: int, rows: int, ring: bool) -> int:
    """Slots of a layer's cache, a multiple of 16.

    A ring holds the window of the first of `rows` new rows and the rows themselves, which are
    all written before any is read, and what a rejected draft may need again.
    """
    whole = round_up(capacity, GROUP)
    if spec.window is None or not ring:
        return whole
    return min(whole, round_up(spec.window - 1 + rows + SPECULATIVE_ROWS, GROUP))


def cache_bytes(config: ModelConfig, kv: KvType, capacity: int, rows: int, ring: bool) -> int:
    """Memory that the caches of all layers take."""
    total = 0
    for spec in config.layers:
        slots = layer_slots(spec, capacity, rows, ring)
        total += 2 * slots * spec.num_attention_groups * kv.row_bytes(spec.head_dim)
    return total


class LayerKv:
    """One layer's cache; `record` is what compiled code reads."""

    def __init__(self, spec: LayerSpec, kv: KvType, slots: int) -> None:
        values = slots * spec.num_attention_groups * spec.head_dim
        scale_bytes = values // 32 * 2 if kv.scaled else 0
        self._parts: list[Bytes] = [
            zeroed(size)
            for size in (values * kv.value_bytes, values * kv.value_bytes, scale_bytes, scale_bytes)
        ]
        self.record: NDArray[np.int64] = np.zeros(int(Kv.SIZE), dtype=np.int64)
        numbers = (Kv.KEYS, Kv.VALUES, Kv.KEY_SCALES, Kv.VALUE_SCALES)
        for number, part in zip(numbers, self._parts, strict=True):
            self.record[number] = address(part)
        self.record[Kv.SLOTS] = slots

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(part.nbytes for part in self._parts)


class MtpState:
    """What drafting keeps: per MTP layer the rows done, and hidden rows that wait for it.

    `pending[k]` are rows of MTP layer k's input from position `start[k]` on whose following token
    was not verified, or that have not been needed yet. Rows that no later draft can see are
    dropped: layer k needs at most (layers - k) windows of them.
    """

    def __init__(self, layers: int, window: int) -> None:
        self.pending: list[list[Array]] = [[] for _ in range(layers)]
        self.start = [0] * layers
        self.rows = 0
        self._window = window

    def add(self, level: int, rows: Array) -> None:
        """Queue rows (R, H) of a layer and drop those that nothing will need."""
        if level >= len(self.pending) or not len(rows):
            return
        queue = self.pending[level]
        queue.append(np.array(rows, dtype=np.float32))
        needed = (len(self.pending) - level) * self._window + SPECULATIVE_ROWS
        while len(queue) > 1 and sum(map(len, queue[1:])) >= needed:
            self.start[level] += len(queue.pop(0))

    def begin(self, level: int, position: int) -> None:
        """The next rows of a layer start at `position`; after a gap, those before it go."""
        if self.start[level] + sum(map(len, self.pending[level])) != position:
            self.pending[level], self.start[level] = [], position

    def take(self, level: int) -> tuple[int, list[Array]]:
        """Position of the first queued row, and the rows; the queue is then empty."""
        rows, self.pending[level] = self.pending[level], []
        return self.start[level], rows


class EngineCache:
    """Keys and values of one sequence: trunk layers, MTP layers, and what drafting keeps."""

    def __init__(self, owner: Any, config: ModelConfig, kv: KvType, capacity: int, rows: int,
                 ring: bool) -> None:  # fmt: skip
        self.owner = owner
        self.capacity = capacity
        self.tokens: list[int] = []
        self.undoable = 0
        self.layers = [
            LayerKv(spec, kv, layer_slots(spec, capacity, rows, ring)) for spec in config.layers
        ]
        n = config.num_hidden_layers
        window = max((s.window or capacity for s in config.mtp), default=0)
        self.mtp = MtpState(config.num_layers - n, window)
        addresses = [address(layer.record) for layer in self.layers]
        self.table: NDArray[np.int64] = np.array(addresses, dtype=np.int64)

    @property
    def length(self) -> int:
        """Tokens processed by the trunk and not rolled back."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def rollback(self, n: int) -> None:
        """Forget the trunk's last `n` rows, at most three since they were appended."""
        if not 0 <= n <= self.undoable:
            raise ValueError(f"cannot roll back {n} rows; {self.undoable} can be")
        self.undoable -= n
        del self.tokens[self.length - n :]

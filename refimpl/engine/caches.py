"""Keys and values of one sequence, in the layout of `refimpl.engine.kv`."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.backend import Array, Tokens
from refimpl.config import LayerSpec, ModelConfig
from refimpl.decoding.kv import SPECULATIVE_ROWS, require_rows, take, take_tokens
from refimpl.engine.drafting import MtpState
from refimpl.engine.fields import Kv
from refimpl.engine.kv import KvType
from refimpl.engine.memory import Bytes, address, round_up, zeroed
from refimpl.errors import InputError

GROUP = 16  # positions whose keys lie side by side
_NEVER = 1 << 62  # a position that no row has
_SYNTHETIC_VALUES = 1 << 20  # random values that are repeated
_VALUE_TYPES = {"f16": np.float16, "f32": np.float32, "q8_0": np.int8}


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


def context_text(config: ModelConfig, kv: KvType, capacity: int) -> str:
    """What takes the memory of a context, for messages."""
    full = [spec for spec in config.layers if spec.window is None]
    each = sum(2 * s.num_attention_groups * kv.row_bytes(s.head_dim) for s in full)
    return (
        f"a context of {capacity} tokens ({kv.name} KV: {each:,} bytes a token on "
        "full-attention layers, the rest for windows)"
    )


class LayerKv:
    """One layer's cache; `record` is what compiled code reads."""

    def __init__(self, spec: LayerSpec, kv: KvType, slots: int) -> None:
        values = slots * spec.num_attention_groups * spec.head_dim
        scale_bytes = values // 32 * 2 if kv.scaled else 0
        self._parts: list[Bytes] = [
            zeroed(size)
            for size in (values * kv.value_bytes, values * kv.value_bytes, scale_bytes, scale_bytes)
        ]
        self._window, self._slots = spec.window, slots
        g, lanes, blocks = spec.num_attention_groups, spec.head_dim, spec.head_dim // 32
        value = np.dtype(_VALUE_TYPES[kv.name])
        shapes = (
            ("keys", value, (g, slots // GROUP, lanes, GROUP)),
            ("values", value, (g, slots, lanes)),
            ("key_scales", np.dtype(np.float16), (g, slots // GROUP, blocks, GROUP)),
            ("value_scales", np.dtype(np.float16), (g, slots // GROUP, blocks, GROUP)),
        )
        self._views: dict[str, Array] = {
            name: part.view(dtype).reshape(shape)
            for (name, dtype, shape), part in zip(shapes, self._parts, strict=True)
            if part.size
        }
        self.record: NDArray[np.int64] = np.zeros(int(Kv.SIZE), dtype=np.int64)
        numbers = (Kv.KEYS, Kv.VALUES, Kv.KEY_SCALES, Kv.VALUE_SCALES)
        for number, part in zip(numbers, self._parts, strict=True):
            self.record[number] = address(part)
        self.record[Kv.SLOTS] = slots

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(part.nbytes for part in self._parts)

    def export(self, name: str, length: int) -> dict[str, Array]:
        """The rows that the next one may see at a length, oldest first: `name`.keys and
        `name`.values (n, g, D), with q8_0 also their scales (n, g, D / 32)."""
        slots = self._kept(length)
        made = {}
        for part, view in self._views.items():
            if view.ndim == 4:
                made[f"{name}.{part}"] = view[:, slots // GROUP, :, slots % GROUP]
            else:
                made[f"{name}.{part}"] = view[:, slots].transpose(1, 0, 2)
        return made

    def refill(self, name: str, length: int, arrays: dict[str, Array]) -> None:
        """Take what `export` gave at that length.

        Raises:
            InputError: missing, or of another shape or type.
        """
        slots = self._kept(length)
        for part, view in self._views.items():
            shape = (len(slots), view.shape[0], view.shape[2])
            rows = take(arrays, f"{name}.{part}", shape, view.dtype)
            if view.ndim == 4:
                view[:, slots // GROUP, :, slots % GROUP] = rows
            else:
                view[:, slots] = rows.transpose(1, 0, 2)

    def _oldest(self, length: int) -> int:
        """Position of the oldest row that is kept at a length."""
        return 0 if self._window is None else max(0, length - self._window + 1 - SPECULATIVE_ROWS)

    def _kept(self, length: int) -> Array:
        kept: Array = np.arange(self._oldest(length), length) % self._slots
        return kept

    def overwritten_at(self, length: int) -> int:
        """The position whose row takes the place of the oldest row that is kept at a length."""
        return self._oldest(length) + self._slots

    def copied(self, length: int) -> list[Array]:
        """Copies of the rows that are kept at a length, for `put_back`."""
        groups = self._groups(length)
        return [view[:, groups] for view in self._by_group()]

    def put_back(self, length: int, copies: list[Array]) -> None:
        """Have the rows again that `copied` gave at that length."""
        groups = self._groups(length)
        for view, held in zip(self._by_group(), copies, strict=True):
            view[:, groups] = held

    def _groups(self, length: int) -> Array:
        """Groups of 16 slots that hold the rows that are kept."""
        return np.unique(self._kept(length) // GROUP)

    def _by_group(self) -> list[Array]:
        return [v.reshape(v.shape[0], self._slots // GROUP, -1) for v in self._views.values()]

    def blocks(self) -> list[Bytes]:
        """The arrays that keys, values and scales live in."""
        return list(self._parts)

    def fill_synthetic(self, rng: np.random.Generator) -> None:
        """Random keys and values of about unit variance in every slot."""
        for part, view in self._views.items():
            count = min(view.size, _SYNTHETIC_VALUES)
            block: Array = rng.standard_normal(count, dtype=np.float32)
            if part.endswith("scales"):
                block = np.full(count, 1 / 64)  # codes have a standard deviation of about 64
            elif view.dtype == np.int8:
                block = rng.integers(-111, 112, count)
            flat, block = view.reshape(-1), block.astype(view.dtype)
            for at in range(0, view.size, count):
                flat[at : at + count] = block[: view.size - at]


class Moment:
    """What `EngineCache.restore` needs; of rings, copies only once rows are to be overwritten.

    Attributes:
        length, undoable: of the cache.
        mtp: see `MtpState.snapshot`.
        places: (first, stop) of the trunk and of each MTP layer: rows at these positions can be
            written without loss.
        rows: of every ring, see `LayerKv.copied`; None while the cache itself still has them.
    """

    def __init__(self, length: int, undoable: int, mtp: tuple[Any, ...]) -> None:
        self.length, self.undoable, self.mtp = length, undoable, mtp
        self.places: list[tuple[int, int]] = []
        self.rows: list[list[Array]] | None = None


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
        self.mtp = MtpState([layer.record for layer in self.layers[n:]], window)
        addresses = [address(layer.record) for layer in self.layers]
        self.table: NDArray[np.int64] = np.array(addresses, dtype=np.int64)
        self.table_address = address(self.table)
        self._moments: weakref.WeakSet[Moment] = weakref.WeakSet()  # that have no copies yet

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

    def shorten_history(self, keep: int) -> None:
        """See `refimpl.backend.Cache.shorten_history`."""
        self.mtp.shorten(keep)

    def export(self) -> dict[str, Array]:
        """tokens (T,), `LayerKv.export` of every layer as kv.I, and of the MTP layers mtp.rows
        (1,), mtp.start (layers,), where earlier rows were left out mtp.first (layers,) and, where
        rows wait, mtp.pending.K (R, H)."""
        made: dict[str, Array] = {"tokens": np.array(self.tokens, dtype=np.int64)}
        for i, layer in enumerate(self.layers):
            made |= layer.export(f"kv.{i}", self._rows_of(i, self.length, self.mtp.start))
        made["mtp.rows"] = np.array([self.mtp.rows])
        made["mtp.start"] = np.array(self.mtp.start, dtype=np.int64)
        first = np.array([self.mtp.first(k) for k in range(len(self.mtp.start))], dtype=np.int64)
        if first.any():
            made["mtp.first"] = first
        for k, rows in enumerate(self.mtp.pending):
            if rows:
                made[f"mtp.pending.{k}"] = np.concatenate(rows)
        return made

    def refill(self, arrays: dict[str, Array]) -> None:
        """Fill this empty cache with what `export` gave.

        Raises:
            InputError: anything that does not fit.
        """
        tokens = take_tokens(arrays, self.capacity)
        mtp = self.mtp
        (rows,) = take(arrays, "mtp.rows", (1,), np.int64).tolist()
        start = take(arrays, "mtp.start", (len(mtp.start),), np.int64).tolist()
        width = self.owner.config.hidden_size
        for k in range(len(start)):
            name, pending = f"mtp.pending.{k}", np.empty((0, width), np.float32)
            if name in arrays:
                pending = take(arrays, name, (None, width), np.float32)
            require_rows(k, rows, start[k], len(pending), len(tokens))
            mtp.add(k, pending)
        mtp.rows, mtp.start = rows, start
        if "mtp.first" in arrays:
            first = take(arrays, "mtp.first", (len(start),), np.int64).tolist()
            for k, position in enumerate(first):
                if not 0 <= position <= start[k]:
                    raise InputError(
                        f"the saved state has {start[k]} rows done in MTP layer {k}, the first of "
                        f"them at {position}; these contradict each other"
                    )
                mtp.set_first(k, position)
        for i, layer in enumerate(self.layers):
            layer.refill(f"kv.{i}", self._rows_of(i, len(tokens), start), arrays)
        self.tokens, self.undoable = tokens, min(len(tokens), SPECULATIVE_ROWS)

    def _rows_of(self, layer: int, length: int, start: list[int]) -> int:
        """Rows that a layer has run for good: all of the trunk's, or an MTP layer's own."""
        k = layer - (len(self.layers) - len(start))
        return length if k < 0 else start[k]

    def blocks(self) -> list[Bytes]:
        """The arrays that keys, values and scales of all layers live in."""
        return [part for layer in self.layers for part in layer.blocks()]

    def fill_synthetic(self, tokens: Tokens, seed: int = 1) -> None:
        """Make as if `tokens` had been run, with random keys and values: for timing at depths
        whose prefill would take hours.

        Raises:
            InputError: more tokens than the cache can hold.
        """
        ids = np.asarray(tokens, dtype=np.int64).tolist()
        if len(ids) > self.capacity:
            raise InputError(f"{len(ids)} tokens do not fit the context of {self.capacity}")
        for moment in list(self._moments):
            self._copy(moment)
        rng = np.random.default_rng(seed)
        for layer in self.layers:
            layer.fill_synthetic(rng)
        n = len(ids)
        self.tokens, self.undoable = ids, min(n, SPECULATIVE_ROWS)
        levels = len(self.mtp.start)
        self.mtp.restore(([[] for _ in range(levels)], [n] * levels, [0] * levels, n))

    def snapshot(self) -> Moment:
        """See `refimpl.backend.Cache.snapshot`."""
        made = Moment(self.length, self.undoable, self.mtp.snapshot())
        ends = [self.length, *self.mtp.start]
        places = [[at, _NEVER] for at in ends]
        for i, layer in self._rings():
            place = places[self._part(i)]
            place[1] = min(place[1], layer.overwritten_at(place[0]))
        made.places = [(first, stop) for first, stop in places]
        self._moments.add(made)
        return made

    def restore(self, snapshot: Moment) -> None:
        """See `refimpl.backend.Cache.restore`."""
        if snapshot.rows is not None:
            for moment in list(self._moments):
                self._copy(moment)
            for (i, layer), held in zip(self._rings(), snapshot.rows, strict=True):
                layer.put_back(snapshot.places[self._part(i)][0], held)
        self.undoable = snapshot.undoable
        self.mtp.restore(snapshot.mtp)
        del self.tokens[snapshot.length :]

    def before_run(self, layers: range, start: int, count: int) -> None:
        """Rows start..start+count-1 are about to be written: what moments need of the rows in
        their places is copied."""
        if not self._moments:
            return
        part = self._part(layers[0])
        for moment in list(self._moments):
            first, stop = moment.places[part]
            if start < first or start + count > stop:
                self._copy(moment)

    def _copy(self, moment: Moment) -> None:
        moment.rows = [layer.copied(moment.places[self._part(i)][0]) for i, layer in self._rings()]
        self._moments.discard(moment)

    def _part(self, layer: int) -> int:
        """0 for a layer of the trunk, from 1 on for MTP layers."""
        return max(0, layer - (len(self.layers) - len(self.mtp.start)) + 1)

    def _rings(self) -> list[tuple[int, LayerKv]]:
        """Layers whose old rows are overwritten by new ones, and their numbers."""
        return [
            (i, layer)
            for i, layer in enumerate(self.layers)
            if layer.record[Kv.SLOTS] < self.capacity
        ]

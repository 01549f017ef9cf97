"""A `WeightSource` over stored tensors, whatever file they lie in.

Both file formats end in the same thing: named byte ranges of a memory map with a type. Values
are decoded a matrix, an expert or a few rows at a time; decoded arrays are kept in a cache of
bounded size (least recently used first out), so a small model is decoded once and a large one
stays within the bound. float32 asked of F32 tensors is a view of the map and costs nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refimpl.checkpoint.block_types import BlockType, decode
from refimpl.checkpoint.source import as_dtype
from refimpl.config import ModelConfig
from refimpl.errors import CheckpointError, InputError
from refimpl.inventory import TensorSpec

Array = NDArray[Any]
Wanted = Callable[[TensorSpec], bool]
"""Which tensors of a checkpoint are needed, where not all are."""

DEFAULT_CACHE_BYTES = 256 << 20
DRAFTS_OFF = "drafts are off"


class RowDecoder(Protocol):
    """Decodes the rows of a tensor whose scales lie in other tensors of the file."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the scales in the file."""

    def decode(self, rows: Array, index: Array) -> Array:
        """Stored bytes (n, row_bytes) of the rows numbered `index` (n,) -> float32 (n, in)."""

    def scale_faults(self, start: int, stop: int) -> Mapping[str, Array]:
        """What cannot be about the scales of rows start..stop: a word to a mask (n, scales)."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a memory map.

    Attributes:
        spec: its row of the tensor table.
        kind: how its values are stored.
        rows: bytes (rows, row_bytes), a view of the map; a stacked tensor of E matrices
            (out, in) has E x out rows, a vector one row.
        holds_one_plus: for norms: the stored value is 1 + w (GGUF), not w (Hugging Face).
        where: file and name, for messages.
        scales: what decodes the rows where their scales lie in other tensors (FP8, mlx-lm);
            None if a row's bytes and `kind` are all it takes.
    """

    spec: TensorSpec
    kind: BlockType
    rows: Array
    holds_one_plus: bool
    where: str
    scales: RowDecoder | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, scales included."""
        return int(self.rows.size) + (0 if self.scales is None else self.scales.stored_bytes)

    def values(self, start: int, stop: int) -> Array:
        """Decoded rows start..stop, (stop - start, in); plain types as stored."""
        if self.scales is None:
            return decode(self.kind, self.rows[start:stop])
        stop = min(stop, len(self.rows))
        return self.scales.decode(self.rows[start:stop], np.arange(start, stop))

    def picked(self, index: Array) -> Array:
        """Decoded rows `index`, (len(index), in); plain types as stored."""
        rows = self.rows[index]
        return decode(self.kind, rows) if self.scales is None else self.scales.decode(rows, index)


class StoredSource:
    """Implements `refimpl.checkpoint.source.WeightSource` over stored tensors.

    `decoded_bytes` counts the stored bytes that were decoded or copied since opening (views of
    the map and cache hits cost none).
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[StoredTensor],
        warnings: Sequence[str] = (),
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._tensors = {(t.spec.key, t.spec.layer): t for t in tensors}
        self._warnings = tuple(warnings)
        self._cache = _ArrayCache(cache_bytes)
        self.cache_bytes = cache_bytes
        self._closed = False
        self.decoded_bytes = 0
        self.metadata: Mapping[str, Any] = metadata or {}

    @property
    def config(self) -> ModelConfig:
        """The configuration as far as the file holds its tensors."""
        return self._config

    @property
    def warnings(self) -> tuple[str, ...]:
        """Notes for the user, one sentence each."""
        return self._warnings

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors; none once the source is closed."""
        return tuple(self._tensors.values())

    def stored(self, key: str, layer: int | None) -> StoredTensor:
        """The tensor as it lies in the map (type and bytes), for use without decoding.

        Raises:
            InputError: the model has no such tensor, or the source is closed.
        """
        if self._closed:
            raise InputError("this checkpoint has been closed")
        found = self._tensors.get((key, layer))
        if found is None:
            place = "outside the layers" if layer is None else f"in layer {layer}"
            raise InputError(f"the model has no tensor '{key}' {place}")
        return found

    def matrix(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """A whole 2-D tensor (out, in)."""
        tensor = self.stored(key, layer)
        _require_rank(tensor, 2)
        return self._decoded(tensor, None, dtype)

    def expert(self, key: str, layer: int, index: int, dtype: DTypeLike) -> Array:
        """Expert `index` (out, in) of a stacked tensor (E, out, in)."""
        tensor = self.stored(key, layer)
        _require_rank(tensor, 3)
        if not 0 <= index < tensor.spec.shape[0]:
            n = tensor.spec.shape[0]
            raise InputError(f"expert {index} asked of '{key}' in layer {layer}, it has {n}")
        return self._decoded(tensor, int(index), dtype)

    def rows(self, key: str, layer: int | None, ids: Sequence[int], dtype: DTypeLike) -> Array:
        """Rows `ids` of a 2-D tensor, (len(ids), in); only these are decoded."""
        tensor = self.stored(key, layer)
        _require_rank(tensor, 2)
        index = np.asarray(ids, dtype=np.int64)
        out_of_range = (index < 0) | (index >= tensor.spec.shape[0])
        if out_of_range.any():
            row = int(index[out_of_range][0])
            raise InputError(f"row {row} asked of '{key}', it has {tensor.spec.shape[0]} rows")
        self.decoded_bytes += len(index) * tensor.rows.shape[1]
        return _frozen(as_dtype(tensor.picked(index), dtype))

    def vector(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """A 1-D tensor (n,) as stored."""
        tensor = self.stored(key, layer)
        _require_rank(tensor, 1)
        return self._decoded(tensor, None, dtype)

    def norm_scale(self, key: str, layer: int | None, dtype: DTypeLike) -> Array:
        """1 + w of a norm (n,): formed in float64 from a stored w, then rounded once."""
        tensor = self.stored(key, layer)
        if not tensor.spec.plus_one:
            raise InputError(f"'{key}' is not the weight of a norm")
        if tensor.holds_one_plus:
            return self._decoded(tensor, None, dtype)
        return _frozen((1.0 + self._decoded(tensor, None, np.float64)).astype(dtype))

    def stored_bytes(self, key: str, layer: int | None) -> int:
        """Bytes of the tensor in the file (all experts, if stacked)."""
        return self.stored(key, layer).stored_bytes

    def close(self) -> None:
        """Let go of the memory map; arrays handed out before keep it alive for themselves."""
        self._closed = True
        self._tensors.clear()
        self._cache.clear()

    def _decoded(self, tensor: StoredTensor, index: int | None, dtype: DTypeLike) -> Array:
        spec, wanted = tensor.spec, np.dtype(dtype)
        shape = spec.shape if index is None else spec.shape[1:]
        n = tensor.rows.shape[0] if index is None else shape[0]
        start = 0 if index is None else index * n

        def make() -> Array:
            values = tensor.values(start, start + n)
            if values.dtype != wanted or tensor.kind.plain is None:
                self.decoded_bytes += n * tensor.rows.shape[1]
            return _frozen(np.require(as_dtype(values, wanted), None, "A").reshape(shape))

        if tensor.kind.plain == wanted and tensor.rows.ctypes.data % wanted.itemsize == 0:
            return make()  # a view of the map
        return self._cache.get((spec.key, spec.layer, index, wanted.str), make)


class _ArrayCache:
    """Decoded arrays up to a number of bytes, least recently used first out. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arrays: OrderedDict[tuple[Any, ...], Array] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], Array]) -> Array:
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if made.nbytes <= self._max_bytes and key not in self._arrays:
                self._arrays[key] = made
                self._bytes += made.nbytes
                while self._bytes > self._max_bytes:
                    self._bytes -= self._arrays.popitem(last=False)[1].nbytes
        return made

    def clear(self) -> None:
        with self._lock:
            self._arrays.clear()
            self._bytes = 0


def _require_rank(tensor: StoredTensor, rank: int) -> None:
    if len(tensor.spec.shape) != rank:
        raise InputError(
            f"'{tensor.spec.key}' has {len(tensor.spec.shape)} dimensions, asked for {rank}"
        )


def _frozen(values: Array) -> Array:
    values.flags.writeable = False
    return values


def missing_mtp(specs: Iterable[TensorSpec], present: Callable[[TensorSpec], bool]) -> bool:
    """Whether MTP layers are declared and none of their tensors is present.

    A file that holds only some of them is damaged; the caller's check of every tensor says which.
    """
    declared = [t for t in specs if t.role == "mtp"]
    return bool(declared) and not any(present(t) for t in declared)


def no_mtp_warning(where: object, config: ModelConfig) -> str:
    """The note for files that declare MTP layers without holding them."""
    n = config.num_nextn_predict_layers
    return f"{where}: declares {n} MTP layers but holds none of their tensors; {DRAFTS_OFF}"


def missing_tensor(where: object, name: str, shape: tuple[int, ...], hint: str) -> CheckpointError:
    """The refusal for a tensor that the configuration demands and the file lacks."""
    return CheckpointError(f"{where}: tensor {name} is missing, expected shape {shape}; {hint}")


def extra_warning(where: object, names: Iterable[str]) -> str:
    """The note for tensors that the configuration does not know."""
    extra = sorted(names)
    shown = ", ".join(f"{name!r:.80}" for name in extra[:3]) + (", ..." if len(extra) > 3 else "")
    return f"{where}: {len(extra)} tensors are not part of this model and not used: {shown}"

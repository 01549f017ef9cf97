"""State files: a prompt that has been run, so that a long prefix is paid for once.

Layout, little-endian: magic (8 bytes), version (u32), zero (u32), SHA-256 of all that follows (32
bytes), then a safetensors file: its header with `__metadata__` {weights, arithmetic} as
`Backend.identity` gives them, and the arrays that `Cache.export` names, with the last row's
`logits` (V,) and the `hidden` rows (R, H) that the MTP layers have not seen yet.

A state belongs to one model and one arithmetic (of the engine: one version of its kernels, as sums
in another order have other bits): what is generated from it has the same bits as without it. So a
file is used only if magic, version, checksum and identity are right, if every array has the shape
and type that the model's own cache has, and if the prompt begins with its tokens. Sizes are checked
against the file's before anything is copied; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backend import Array, Backend, Cache, Step
from refimpl.checkpoint.atomic import atomic_file, check_writable
from refimpl.checkpoint.mapped import map_file
from refimpl.checkpoint.safetensors_read import Entry, parse_safetensors
from refimpl.decoding.kv import take
from refimpl.errors import CheckpointError, InputError

MAGIC = b"REFSTATE"
VERSION = 1
_PREFIX = struct.Struct("<8sII32s")
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I8": "i1"}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_FINGERPRINT_SHOWN = 12


@dataclass(frozen=True)
class SavedPrompt:
    """A state file that has been checked against the backend that is to use it.

    Attributes:
        path: the file.
        tokens: (T,) ids that have been run.
        arrays: views of the file's bytes by name.
    """

    path: Path
    tokens: tuple[int, ...]
    arrays: Mapping[str, Array]

    def require_prefix(self, prompt: list[int]) -> None:
        """Refuse a prompt that does not begin with these tokens.

        Raises:
            InputError: with the first token that differs.
        """
        for at, (mine, theirs) in enumerate(zip(self.tokens, prompt, strict=False)):
            if mine != theirs:
                raise InputError(
                    f"{self.path}: the prompt does not begin with the {len(self.tokens)} tokens of "
                    f"this state (token {at} is {theirs}, the state has {mine}); give a prompt "
                    "that continues it, or make a new state"
                )
        if len(self.tokens) > len(prompt):
            raise InputError(
                f"{self.path}: the state has {len(self.tokens)} tokens, the prompt only "
                f"{len(prompt)}; give a prompt that begins with all of them"
            )

    def fill(self, cache: Cache, config: Any) -> Step:
        """Fill an empty cache; the step (logits (1, V), hidden (R, H)) that the tokens ended in.

        Raises:
            InputError: an array that this model's cache does not have, or not like that.
        """
        arrays = dict(self.arrays)
        try:
            cache.refill(arrays)
            layers = config.num_nextn_predict_layers
            logits = arrays.get("logits")
            dtype = np.dtype(np.float32) if logits is None else logits.dtype
            if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
                raise InputError(f"the saved state has logits of type {dtype}, expected floats")
            logits = take(arrays, "logits", (config.vocab_size,), dtype)
            hidden = take(arrays, "hidden", (None, config.hidden_size), dtype)
            rows = self._fed if layers else len(self.tokens) - 1
            if len(hidden) != len(self.tokens) - rows:
                raise InputError(
                    f"the saved state has {len(hidden)} hidden rows, "
                    f"expected {len(self.tokens) - rows}"
                )
            if arrays:
                raise InputError(f"the saved state has an unknown array {min(arrays)[:60]!r}")
        except InputError as error:
            raise InputError(f"{self.path}: {error}; make a new state file") from None
        return Step(np.array(logits[None]), np.array(hidden))

    @property
    def _fed(self) -> int:
        """Rows that the MTP layers have seen."""
        return int(self.arrays["mtp.rows"][0])


def save_state(path: Path, backend: Backend, cache: Cache, step: Step) -> None:
    """Write the state after a prompt whose last chunk gave `step`, whole or not at all.

    The MTP layers must have seen all rows but those of `step`.

    Raises:
        InputError: the file cannot be written.
    """
    hidden = step.hidden if backend.config.num_nextn_predict_layers else step.hidden[-1:]
    arrays = cache.export() | {"logits": step.logits[-1], "hidden": hidden}
    header: dict[str, Any] = {"__metadata__": dict(backend.identity())}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    told = hashlib.sha256()
    with atomic_file(path) as file:
        file.write(bytes(_PREFIX.size))
        for part in (len(text).to_bytes(8, "little"), text, *arrays.values()):
            data = _bytes_of(part) if isinstance(part, np.ndarray) else part
            told.update(data)
            file.write(data)
        file.seek(0)
        file.write(_PREFIX.pack(MAGIC, VERSION, 0, told.digest()))


def read_state(path: Path, backend: Backend) -> SavedPrompt:
    """Map a state file and check that it is whole and belongs to this backend.

    Raises:
        CheckpointError: no state file, of another version, truncated or damaged.
        InputError: of another model or arithmetic, or with tokens that the model does not have.
    """
    data = map_file(path)
    head = data[: _PREFIX.size].tobytes()
    if len(head) < _PREFIX.size or head[:8] != MAGIC:
        raise CheckpointError(
            f"{path}: begins with {head[:8]!r}, a state file begins with {MAGIC!r}; make one with "
            "--save-state"
        )
    _, version, zero, digest = _PREFIX.unpack(head)
    if (version, zero) != (VERSION, 0):
        raise CheckpointError(
            f"{path}: state file version {version}.{zero}, this program reads {VERSION}; make it "
            "again with --save-state"
        )
    body = data[_PREFIX.size :]
    if hashlib.sha256(body.data).digest() != digest:
        raise CheckpointError(
            f"{path}: its checksum is wrong; truncated or damaged file, make it again"
        )
    entries, metadata = parse_safetensors(path, body)
    _require_identity(path, metadata, backend.identity())
    arrays = {name: _array(path, name, entry) for name, entry in entries.items()}
    try:
        tokens = take(dict(arrays), "tokens", (None,), np.int64)
        take(dict(arrays), "mtp.rows", (1,), np.int64)
    except InputError as error:
        raise InputError(f"{path}: {error}; make a new state file") from None
    vocab = backend.config.vocab_size
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab:
        raise InputError(
            f"{path}: holds {len(tokens)} tokens, not all of them ids of a vocabulary of {vocab}"
        )
    return SavedPrompt(path, tuple(tokens.tolist()), arrays)


def check_state_output(path: Path, *inputs: str | Path | None) -> None:
    """Refuse, before a long run, an output that would replace anything but an older state file.

    Raises:
        InputError: the folder is missing or may not be written to, or `path` is one of `inputs`
            or no state file.
    """
    check_writable(path)
    if not path.exists():
        return
    if any(Path(p).exists() and path.samefile(p) for p in inputs if p is not None):
        raise InputError(f"{path}: is read by this run; choose another name for the state file")
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path}: exists and is no state file; choose another name")


def _require_identity(path: Path, found: Mapping[str, Any], mine: Mapping[str, str]) -> None:
    weights, arithmetic = (str(found.get(k))[:200] for k in ("weights", "arithmetic"))
    if weights != mine["weights"]:
        raise InputError(
            f"{path}: was made with another model ({weights[:_FINGERPRINT_SHOWN]!r}, this one is "
            f"'{mine['weights'][:_FINGERPRINT_SHOWN]}'); use that model, or make a new state"
        )
    if arithmetic != mine["arithmetic"]:
        raise InputError(
            f"{path}: was computed by {arithmetic!r}, this run by '{mine['arithmetic']}'; choose "
            "the same --backend and --dtype, or make a new state"
        )


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array(path: Path, name: str, entry: Entry) -> Array:
    kind = _TYPES.get(entry.dtype)
    if kind is None:
        raise CheckpointError(f"{path}: array {name[:60]!r} has type {entry.dtype}; no state file")
    array: Array = entry.data.view(kind).reshape(entry.shape)
    return array

"""GGUF headers, read strictly from a memory map.

Format: ggml docs/gguf.md (versions 2 and 3, little-endian): magic, version, counts, typed
key-value pairs, tensor descriptions, then aligned tensor bytes. The reader is ours because the
one in the `gguf` package trusts the file: it bounds neither dimensions nor counts, lets element
products wrap, and makes a Python object per token (llama.cpp issue 25378). Here every count,
length, offset, type and product is checked against the file's real size, in Python integers that
cannot wrap, before anything is allocated; arrays of strings stay undecoded until asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.block_types import BlockType, block_type_of_id
from refimpl.checkpoint.mapped import Bytes, map_file
from refimpl.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 512 << 20
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_ARRAY = 1 << 24
MAX_STRINGS = 1 << 22
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 64
MAX_STRING_BYTES = 64 << 20
MAX_DIMS = 4
MAX_DIMENSION = 1 << 48
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # shortest pair: a key of one letter with a one-byte value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # shortest description: one letter, one dimension
_LIST_LIMIT = 4096  # numeric arrays up to this length become lists of Python numbers

_STRING, _ARRAY, _BOOL, _UINT32 = 8, 9, 7, 4
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}


class StringArray(Sequence[str]):
    """Strings of a GGUF array, decoded when asked for; only their bounds have been checked."""

    def __init__(self, data: bytes, count: int, where: str) -> None:
        self._data, self._count, self._where = data, count, where
        self._decoded: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def _all(self) -> list[str]:
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    def _decode(self) -> list[str]:
        data, at, result = self._data, 0, []
        try:
            for _ in range(self._count):
                stop = at + 8 + int.from_bytes(data[at : at + 8], "little")
                result.append(data[at + 8 : stop].decode("utf-8"))
                at = stop
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._where}: entry {len(result)} is not UTF-8") from None
        return result


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file: name, type, dimensions fastest first, bytes (n,) in the map."""

    name: str
    kind: BlockType
    dims: tuple[int, ...]
    data: Bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions slowest first, as NumPy and Hugging Face state them."""
        return self.dims[::-1]

    @property
    def rows(self) -> Bytes:
        """The bytes as (rows, row_bytes)."""
        return self.data.reshape(-1, self.kind.row_bytes(self.dims[0]))


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file: metadata by full key, tensors by name.

    Of a split model, `missing_parts` names the files that are not there, and `part_of` the file
    of each tensor.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    missing_parts: tuple[str, ...] = ()
    part_of: dict[str, str] = field(default_factory=dict)


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and check its header.

    Metadata values are int, float, bool, str, lists of numbers (NumPy arrays beyond 4096
    entries) or `StringArray`.

    Raises:
        CheckpointError: not GGUF, another version or byte order, truncated, damaged or unsafe;
            says what was found where.
    """
    data = map_file(path)
    cursor = _Cursor(path, data)
    _check_magic(path, data)
    cursor.at = 4
    version = cursor.scalar(_UINT32, "version")
    _check_version(path, version)
    n_tensors = cursor.count("tensor count", _MIN_TENSOR_BYTES, MAX_TENSORS)
    n_keys = cursor.count("metadata count", _MIN_KEY_BYTES, MAX_KEYS)
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for i in range(n_keys):
        key = cursor.string(f"metadata key {i}", 1, MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {_shown(key)} appears twice")
        kind = cursor.scalar(_UINT32, f"type of {_shown(key)}")
        metadata[key] = cursor.value(kind, _shown(key))
        if key == "general.alignment":
            alignment = _checked_alignment(cursor, kind, metadata[key])
    infos = [_tensor_info(cursor, i) for i in range(n_tensors)]
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, _place_tensors(path, data, infos, start, alignment))


def _check_magic(path: Path, data: Bytes) -> None:
    found = data[:4].tobytes()
    if found != MAGIC:
        raise CheckpointError(f"{path}: begins with {found!r}, a GGUF file begins with {MAGIC!r}")


def _check_version(path: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise CheckpointError(f"{path}: a big-endian GGUF file; only little-endian can be read")
    raise CheckpointError(f"{path}: GGUF version {version}, this program reads versions 2 and 3")


def _checked_alignment(cursor: _Cursor, kind: int, value: Any) -> int:
    power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
    if kind != _UINT32 or not power_of_two or not 8 <= value <= MAX_ALIGNMENT:
        raise cursor.error(
            f"general.alignment is {str(value)[:50]} of type {kind}, expected a power of two "
            f"from 8 to {MAX_ALIGNMENT} as a 32-bit unsigned integer"
        )
    return int(value)


def _shown(name: str) -> str:
    """A name from the file, fit for a one-line message."""
    return name if name.isprintable() and len(name) <= 100 else f"{name!r:.100}"


class _Cursor:
    """A position in the header; every read is checked against the file's end."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.view, self.at = path, memoryview(data.data), 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} (at byte {self.at})")

    def require(self, n: int, what: str) -> None:
        left = len(self.view) - self.at
        if n > left:
            raise self.error(f"{what} needs {n} bytes, {left} are left; truncated or damaged file")
        if self.at + n > MAX_HEADER_BYTES:
            raise self.error(f"{what} makes the header larger than {MAX_HEADER_BYTES} bytes")

    def require_length(self, n: int, limit: int, what: str) -> None:
        if n > limit:
            raise self.error(f"{what} is an array of {n} elements, at most {limit} are read")

    def scalar(self, kind: int, what: str) -> Any:
        form = _SCALARS[kind]
        self.require(form.size, what)
        (value,) = form.unpack_from(self.view, self.at)
        if kind == _BOOL and value > 1:
            raise self.error(f"{what} is {value}, expected 0 or 1 for a truth value")
        self.at += form.size
        return bool(value) if kind == _BOOL else value

    def count(self, what: str, least_bytes: int, limit: int) -> int:
        value: int = self.scalar(10, what)
        most = min(limit, (len(self.view) - self.at) // least_bytes)
        if value > most:
            raise self.error(f"{what} {value} is more than a file of this size can hold ({most})")
        return value

    def string(self, what: str, least: int = 0, most: int = MAX_STRING_BYTES) -> str:
        n = self.scalar(10, f"length of {what}")
        if not least <= n <= most:
            raise self.error(f"{what} has {n} bytes, expected {least} to {most}")
        self.require(n, what)
        try:
            text = str(self.view[self.at : self.at + n], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None
        self.at += n
        return text

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise self.error(f"{key} has unknown type {kind}")

    def _array(self, key: str) -> Any:
        kind = self.scalar(_UINT32, f"element type of {key}")
        n = self.scalar(10, f"length of {key}")
        if kind == _STRING:
            return self._strings(key, n)
        if kind not in _SCALARS:
            problem = "nested arrays are not read" if kind == _ARRAY else f"unknown type {kind}"
            raise self.error(f"{key} is an array with elements of type {kind}: {problem}")
        form = _SCALARS[kind]
        self.require_length(n, MAX_ARRAY, key)
        self.require(n * form.size, f"{key} with {n} elements")
        if n == 0:
            return []
        values: NDArray[Any] = np.frombuffer(self.view, form.format, n, self.at)
        if kind == _BOOL and values.max() > 1:
            raise self.error(f"{key} holds a truth value other than 0 or 1")
        self.at += n * form.size
        if kind == _BOOL:
            values = values.astype(bool)
        return values.tolist() if n <= _LIST_LIMIT else values

    def _strings(self, key: str, n: int) -> StringArray:
        self.require_length(n, MAX_STRINGS, key)
        self.require(8 * n, f"{key} with {n} strings")
        start, at, end, view = self.at, self.at, len(self.view), self.view
        for i in range(n):
            if at + 8 > end:
                raise self.error(f"{key} ends inside string {i} of {n}; truncated or damaged file")
            at += 8 + int.from_bytes(view[at : at + 8], "little")
        self.require(at - start, key)
        self.at = at
        return StringArray(bytes(view[start:at]), n, f"{self.path}: {key}")


@dataclass(frozen=True)
class _Info:
    name: str
    kind: BlockType
    dims: tuple[int, ...]
    offset: int
    size: int


def _tensor_info(cursor: _Cursor, index: int) -> _Info:
    name = cursor.string(f"name of tensor {index}", 1, MAX_NAME_BYTES)
    n_dims = cursor.scalar(_UINT32, f"dimensions of {_shown(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(
            f"tensor {_shown(name)} has {n_dims} dimensions, expected 1 to {MAX_DIMS}"
        )
    dims = tuple(cursor.scalar(10, f"size of {_shown(name)}") for _ in range(n_dims))
    if not all(1 <= d <= MAX_DIMENSION for d in dims):
        raise cursor.error(f"tensor {_shown(name)} has dimensions {dims}, each must be at least 1")
    type_id = cursor.scalar(_UINT32, f"type of {_shown(name)}")
    kind = block_type_of_id(type_id)
    if kind is None:
        raise cursor.error(f"tensor {_shown(name)} has unknown type {type_id}")
    if dims[0] % kind.block_values:
        raise cursor.error(
            f"tensor {_shown(name)} has rows of {dims[0]} values, {kind.name} needs a multiple of "
            f"{kind.block_values}"
        )
    offset = cursor.scalar(10, f"offset of {_shown(name)}")
    return _Info(name, kind, dims, offset, kind.row_bytes(dims[0]) * math.prod(dims[1:]))


def _place_tensors(
    path: Path, data: Bytes, infos: list[_Info], start: int, alignment: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for info in sorted(infos, key=lambda i: i.offset):
        shown = f"{path}: tensor {_shown(info.name)}"
        if info.offset % alignment:
            raise CheckpointError(f"{shown} is at {info.offset}, not a multiple of {alignment}")
        if start + info.offset + info.size > len(data):
            raise CheckpointError(
                f"{shown} ends at byte {start + info.offset + info.size} "
                f"({start} + {info.offset} + {info.size}), the file has {len(data)}; "
                "truncated or damaged file"
            )
        if info.offset < end:
            raise CheckpointError(f"{shown} at {info.offset} overlaps the one before it ({end})")
        if info.name in tensors:
            raise CheckpointError(f"{shown} appears twice")
        end = info.offset + info.size
        values = data[start + info.offset : start + end]
        tensors[info.name] = GgufTensor(info.name, info.kind, info.dims, values)
    return tensors

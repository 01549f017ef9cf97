"""Safetensors files, checked strictly before anything is allocated.

Format: https://huggingface.co/docs/safetensors. The header is read by hand because the
`safetensors` package hands bfloat16 to NumPy only as raw bytes of the whole tensor (no memory-
mapped slice of one expert without torch), while the check itself is short: the header's length
against the file, a bound on the JSON, and byte ranges that tile the rest of the file exactly,
each as long as its shape and type say.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.checkpoint.mapped import Bytes, map_file
from refimpl.errors import CheckpointError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16
MAX_DIMS = 8
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: type name, shape, and its bytes (n,) in the map."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


def read_safetensors(path: Path) -> dict[str, Entry]:
    """Map a file and check its header; tensors by name.

    Raises:
        CheckpointError: not a safetensors file, damaged, or unsafe; says what was found.
    """
    return parse_safetensors(path, map_file(path))[0]


def parse_safetensors(path: Path, data: Bytes) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors by name and the `__metadata__` in bytes (n,) of this layout.

    Raises:
        CheckpointError: as `read_safetensors`.
    """
    size = len(data)
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length < 2 or length > size - 8:
        raise CheckpointError(
            f"{path}: header of {length} bytes does not fit a file of {size} bytes "
            "(truncated, or not a safetensors file)"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES}")
    header = _parse(path, data[8 : 8 + length].tobytes())
    body = data[8 + length :]
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, value, len(body))
    _require_tiling(path, entries, len(body))
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ of the header is not an object")
    return {n: Entry(d, shape, body[a:b]) for n, (d, shape, a, b) in entries.items()}, metadata


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path}: the header names a tensor or field twice")
        return result

    if text[:1] != b"{":
        raise CheckpointError(f"{path}: the header is not a JSON object (not a safetensors file)")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0][:100]
        raise CheckpointError(f"{path}: the header is not valid JSON ({reason})") from None
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, at most {MAX_TENSORS}")
    return header


def _entry(path: Path, name: str, value: Any, body: int) -> tuple[str, tuple[int, ...], int, int]:
    shown = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{shown} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{shown} has unknown dtype {str(dtype)[:50]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{shown} has shape {str(shape)[:100]}, expected up to 8 sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= body:
        raise CheckpointError(
            f"{shown} has data_offsets {str(offsets)[:100]} outside the {body} bytes of data "
            "(truncated or damaged file)"
        )
    expected = math.prod(shape) * bits // 8
    found = offsets[1] - offsets[0]
    if expected != found:
        raise CheckpointError(
            f"{shown}: {dtype} of shape {shape} takes {expected} bytes, its range has {found}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    """A list of integers from 0 to 2^48 (so that no product is expensive to form)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def _require_tiling(
    path: Path, entries: dict[str, tuple[str, tuple[int, ...], int, int]], body: int
) -> None:
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda e: (e[1][2], e[1][3])):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name[:200]!r} at byte {start} {what} ({end})")
        end = stop
    if end != body:
        raise CheckpointError(f"{path}: {body} bytes of data, the header describes {end}")

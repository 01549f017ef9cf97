"""GGUF models split over several files, as large ones are published.

Each part is a GGUF file of its own; `split.count`, `split.no` and the names
`NAME-00001-of-00003.gguf` tie them together (llama.cpp, llama_split_path). Metadata of the model
is in the first part.
"""

from __future__ import annotations

import re
from pathlib import Path

from refimpl.checkpoint.gguf_read import GgufFile, read_gguf
from refimpl.errors import CheckpointError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 4096


def read_gguf_parts(path: Path, partial: bool = False) -> GgufFile:
    """Read a GGUF file and, if it is the first of several parts, the others beside it.

    Args:
        partial: parts may be missing; they are named in `missing_parts`.

    Raises:
        CheckpointError: a part is damaged, missing, or not the one that its name says.
    """
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: split.count is {str(count)[:50]}, expected a small number")
    if count <= 1:
        return first
    match = _NAME.fullmatch(path.name)
    number = _number(first, "split.no")
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts, expected a name ending in -00001-of-{count:05d}.gguf"
        )
    names = [f"{match[1]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    if number != 0 or path.name != names[0]:
        raise CheckpointError(f"{path}: not the first of {count} parts; open {names[0]}")
    tensors = dict(first.tensors)
    part_of = dict.fromkeys(tensors, path.name)
    missing = []
    for i, name in enumerate(names[1:], start=1):
        other = path.with_name(name)
        if not other.is_file():
            missing.append(name)
            if partial:
                continue
            raise CheckpointError(f"{other}: part {i + 1} of {count} is missing; download it too")
        part = read_gguf(other)
        if _number(part, "split.no") != i or _number(part, "split.count") != count:
            raise CheckpointError(f"{other}: is not part {i + 1} of {count} of this model")
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise CheckpointError(f"{other}: tensor {twice[0]!r:.100} is in an earlier part too")
        tensors.update(part.tensors)
        part_of.update(dict.fromkeys(part.tensors, name))
    total = first.metadata.get("split.tensors.count")
    if not missing and type(total) is int and total != len(tensors):
        raise CheckpointError(
            f"{path}: its {count} parts hold {len(tensors)} tensors, split.tensors.count is {total}"
        )
    return GgufFile(path, first.metadata, tensors, tuple(missing), part_of)


def _number(file: GgufFile, key: str) -> int | None:
    """An integer of the metadata; None if it is missing or anything else."""
    value = file.metadata.get(key)
    return value if type(value) is int else None

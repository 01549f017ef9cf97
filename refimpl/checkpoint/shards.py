"""Which files of a checkpoint a few layers lie in, so that only these need to be downloaded.

For a folder with `model.safetensors.index.json` no shard need be there: config.json and the index
say it all. Parts of a split GGUF file have no index; the headers of those that are there are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.checkpoint.gguf_parts import read_gguf_parts
from refimpl.checkpoint.gguf_source import config_of, find_tensor
from refimpl.checkpoint.hf_layout import layout_of
from refimpl.checkpoint.hf_read import INDEX_NAME, read_index
from refimpl.checkpoint.safetensors_read import read_safetensors
from refimpl.checkpoint.stored import Wanted
from refimpl.config_io import from_hf, read_config_json
from refimpl.inventory import gguf_inventory, inventory


@dataclass(frozen=True)
class Shard:
    """One file and how many of the wanted tensors it holds."""

    name: str
    tensors: int
    present: bool


@dataclass(frozen=True)
class Shards:
    """The files that hold the wanted tensors.

    Attributes:
        nowhere: wanted tensors that no file is known to hold.
    """

    files: tuple[Shard, ...]
    nowhere: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every wanted tensor is in a file that is there."""
        return not self.nowhere and all(f.present for f in self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        files = [{"name": f.name, "tensors": f.tensors, "present": f.present} for f in self.files]
        return {"files": files, "nowhere": list(self.nowhere), "complete": self.complete}


def shards_of(path: Path, wanted: Wanted) -> Shards:
    """The files that hold the tensors `wanted`.

    Raises:
        CheckpointError, ConfigError: config.json, the index or a header cannot be read.
    """
    return _of_folder(path, wanted) if path.is_dir() else _of_gguf(path, wanted)


def _of_folder(folder: Path, wanted: Wanted) -> Shards:
    data = read_config_json(folder / "config.json")
    if (folder / INDEX_NAME).exists():
        where = read_index(folder / INDEX_NAME)
    else:
        files = sorted(folder.glob("model*.safetensors"))
        where = {name: file.name for file in files for name in read_safetensors(file)}
    layout = layout_of(data, where)
    names, nowhere = [], []
    for spec in inventory(from_hf(data)):
        if wanted(spec):
            known = layout.name(spec) in where
            names += [n for n in (layout.name(spec), *layout.companions(spec)) if n in where]
            nowhere += [] if known else [layout.name(spec)]
    return _counted(folder, [where[name] for name in names], nowhere)


def _of_gguf(path: Path, wanted: Wanted) -> Shards:
    file = read_gguf_parts(path, partial=True)
    names, nowhere = [], []
    for spec in gguf_inventory(config_of(file)):
        if wanted(spec):
            found = find_tensor(file, spec)
            if found is None:
                nowhere.append(spec.gguf_name)
            else:
                names.append(file.part_of.get(found.name, path.name))
    return _counted(path.parent, names, nowhere)


def _counted(folder: Path, names: list[str], nowhere: Iterable[str]) -> Shards:
    files = (Shard(n, names.count(n), (folder / n).is_file()) for n in sorted(set(names)))
    return Shards(tuple(files), tuple(nowhere))

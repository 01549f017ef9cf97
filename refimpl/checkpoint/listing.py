"""What tensors a checkpoint holds, whole or not: names, types, sizes, and what is missing.

Opening a checkpoint (`refimpl.checkpoint.open`) refuses one that lacks a tensor; a listing says
which. Nothing but headers is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refimpl.checkpoint.gguf_parts import read_gguf_parts
from refimpl.checkpoint.gguf_read import GgufFile
from refimpl.checkpoint.gguf_source import config_of, find_tensor
from refimpl.checkpoint.hf_read import INDEX_NAME, read_index
from refimpl.checkpoint.safetensors_read import read_safetensors
from refimpl.config import ModelConfig
from refimpl.config_io import load_hf_config
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec, gguf_inventory, inventory

SCALE_SUFFIX = "_scale_inv"  # block scales of FP8 tensors: NAME.weight_scale_inv


@dataclass(frozen=True)
class Listed:
    """One tensor of a file.

    Attributes:
        kind: stored type by name ('BF16', 'Q4_K', ...).
        shape: Hugging Face order, slowest dimension first.
        spec: its row of the tensor table; None for a tensor that the model does not know.
        scale: the tensor holds the block scales of `spec` rather than its values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stored_bytes: int
    spec: TensorSpec | None
    scale: bool = False

    @property
    def fits(self) -> bool:
        """Whether name and shape are those of the tensor table."""
        return self.spec is not None and (self.scale or self.shape == self.spec.shape)


@dataclass(frozen=True)
class Listing:
    """The tensors of a checkpoint beside those that its configuration demands.

    Attributes:
        form: 'GGUF' or 'safetensors'.
        files: names of the files that hold tensors; `missing_files` are named and not there.
        config: as declared, whether or not the tensors are there.
        missing: tensors that the configuration demands and no file holds.
        metadata: GGUF metadata, empty for safetensors.
    """

    path: Path
    form: str
    files: tuple[str, ...]
    missing_files: tuple[str, ...]
    config: ModelConfig
    tensors: tuple[Listed, ...]
    missing: tuple[TensorSpec, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unexpected(self) -> tuple[Listed, ...]:
        """Tensors that are not part of the model."""
        return tuple(t for t in self.tensors if t.spec is None)

    @property
    def misshapen(self) -> tuple[Listed, ...]:
        """Tensors of the model with another shape."""
        return tuple(t for t in self.tensors if t.spec is not None and not t.fits)

    @property
    def mtp_present(self) -> int:
        """How many of the declared MTP layers have all their tensors."""
        broken = {t.layer for t in self.missing} | {t.spec.layer for t in self.misshapen if t.spec}
        return sum(spec.index not in broken for spec in self.config.mtp)


def list_checkpoint(path: Path) -> Listing:
    """List a folder with config.json and safetensors files, or a GGUF file.

    Raises:
        CheckpointError, ConfigError: the headers or the configuration cannot be read.
    """
    if path.is_dir():
        return _list_folder(path)
    file = read_gguf_parts(path)
    config = config_of(file)
    return _list_gguf(path, file, config)


def _list_gguf(path: Path, file: GgufFile, config: ModelConfig) -> Listing:
    specs = gguf_inventory(config)
    found = [(spec, find_tensor(file, spec)) for spec in specs]
    of_name = {tensor.name: spec for spec, tensor in found if tensor is not None}
    tensors = tuple(
        Listed(t.name, t.kind.name, t.shape, int(t.data.size), of_name.get(t.name))
        for t in file.tensors.values()
    )
    missing = tuple(spec for spec, tensor in found if tensor is None)
    count = max(1, int(file.metadata.get("split.count", 1)))
    names = (path.name,) if count == 1 else tuple(
        path.name.replace("-00001-of-", f"-{i:05d}-of-") for i in range(1, count + 1)
    )  # fmt: skip
    return Listing(path, "GGUF", names, (), config, tensors, missing, file.metadata)


def _list_folder(folder: Path) -> Listing:
    config = load_hf_config(folder / "config.json")
    names = sorted(p.name for p in folder.glob("model*.safetensors"))
    if (folder / INDEX_NAME).exists():
        names = sorted(set(read_index(folder / INDEX_NAME).values()))
    if not names:
        raise CheckpointError(f"{folder}: no model*.safetensors beside config.json")
    present = [name for name in names if (folder / name).is_file()]
    absent = tuple(name for name in names if name not in present)
    specs = inventory(config)
    of_name = {spec.hf_name: spec for spec in specs}
    tensors = tuple(_listed(folder, present, of_name))
    held = {t.name for t in tensors}
    missing = tuple(spec for spec in specs if spec.hf_name not in held)
    return Listing(folder, "safetensors", tuple(present), absent, config, tensors, missing)


def _listed(
    folder: Path, names: Iterable[str], of_name: Mapping[str, TensorSpec]
) -> Iterable[Listed]:
    for file in names:
        for name, entry in read_safetensors(folder / file).items():
            base = name.removesuffix(SCALE_SUFFIX)
            spec, size = of_name.get(base), int(entry.data.size)
            yield Listed(name, entry.dtype, entry.shape, size, spec, scale=base != name)

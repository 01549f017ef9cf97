"""What tensors a checkpoint holds, whole or not: names, types, sizes, and what is missing.

Opening a checkpoint (`refimpl.checkpoint.open`) refuses one that lacks a tensor; a listing says
which. Nothing but headers is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refimpl.checkpoint.gguf_parts import read_gguf_parts
from refimpl.checkpoint.gguf_read import GgufFile
from refimpl.checkpoint.gguf_source import config_of, find_tensor
from refimpl.checkpoint.hf_layout import Layout, layout_of
from refimpl.checkpoint.hf_read import INDEX_NAME, indexed_names, read_index
from refimpl.checkpoint.pair import held_already, joined_config, needed
from refimpl.checkpoint.safetensors_read import Entry, read_safetensors
from refimpl.config import ModelConfig
from refimpl.config_io import from_hf, read_config_json
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec, gguf_inventory, inventory


@dataclass(frozen=True)
class Listed:
    """One tensor of a file.

    Attributes:
        kind: stored type by name ('BF16', 'Q4_K', 'F8_E4M3', 'MLX4_G64', ...).
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
        faults: tensors that cannot be decoded (scales missing or of another shape, a type that
            is not read), each with a sentence.
        layout: of a folder: how it names tensors.
        mtp_only: a GGUF file of MTP layers alone, to be used beside the main model's.
    """

    path: Path
    form: str
    files: tuple[str, ...]
    missing_files: tuple[str, ...]
    config: ModelConfig
    tensors: tuple[Listed, ...]
    missing: tuple[TensorSpec, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[tuple[TensorSpec, str], ...] = ()
    layout: Layout = field(default_factory=Layout)
    mtp_only: bool = False

    def file_name(self, spec: TensorSpec) -> str:
        """What the files call a tensor of the table."""
        return spec.gguf_name if self.form == "GGUF" else self.layout.name(spec)

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


def list_checkpoint(path: Path, mtp_path: Path | None = None) -> Listing:
    """List a folder with config.json and safetensors files, or a GGUF file.

    Args:
        mtp_path: a second checkpoint with the MTP layers; of it nothing else is listed.

    Raises:
        CheckpointError, ConfigError: the headers or the configuration cannot be read, or the two
            do not belong together.
    """
    if mtp_path is not None:
        return _joined(list_checkpoint(path), list_checkpoint(mtp_path))
    if path.is_dir():
        return _list_folder(path)
    file = read_gguf_parts(path, partial=True)
    config = config_of(file)
    return _list_gguf(path, file, config)


def _joined(main: Listing, mtp: Listing) -> Listing:
    if any(t.spec is not None and needed(t.spec) for t in main.tensors):
        raise held_already(main.path, mtp.path)
    trunk = main.config.without_mtp()
    config = joined_config(main.path, trunk, mtp.path, mtp.config)
    layers = [t for t in mtp.tensors if t.spec is not None and needed(t.spec)]
    missing = [s for s in main.missing if not needed(s)] + [s for s in mtp.missing if needed(s)]
    return dataclasses.replace(
        main,
        files=(*main.files, *(str(mtp.path / f if mtp.path.is_dir() else f) for f in mtp.files)),
        config=config,
        tensors=(*main.tensors, *layers),
        missing=tuple(missing),
        missing_files=(*main.missing_files, *mtp.missing_files),
        faults=main.faults + tuple(f for f in mtp.faults if needed(f[0])),
    )


def _list_gguf(path: Path, file: GgufFile, config: ModelConfig) -> Listing:
    specs = gguf_inventory(config)
    found = [(spec, find_tensor(file, spec)) for spec in specs]
    of_name = {tensor.name: spec for spec, tensor in found if tensor is not None}
    tensors = tuple(
        Listed(t.name, t.kind.name, t.shape, int(t.data.size), of_name.get(t.name))
        for t in file.tensors.values()
    )
    missing = tuple(spec for spec, tensor in found if tensor is None)
    held = {tensor.name for _, tensor in found if tensor is not None}
    mtp_only = "blk.0.attn_norm.weight" not in held and any(
        spec.role == "mtp" for spec, tensor in found if tensor is not None
    )
    mtp_only = mtp_only and not file.missing_parts
    if mtp_only:
        missing = tuple(spec for spec in missing if spec.role == "mtp")
    count = max(1, int(file.metadata.get("split.count", 1)))
    names = (path.name,) if count == 1 else tuple(
        path.name.replace("-00001-of-", f"-{i:05d}-of-") for i in range(1, count + 1)
    )  # fmt: skip
    present = tuple(name for name in names if name not in file.missing_parts)
    return Listing(
        path, "GGUF", present, file.missing_parts, config, tensors, missing, file.metadata,
        mtp_only=mtp_only,
    )  # fmt: skip


def _list_folder(folder: Path) -> Listing:
    data = read_config_json(folder / "config.json")
    config = from_hf(data)
    names = sorted(p.name for p in folder.glob("model*.safetensors"))
    if (folder / INDEX_NAME).exists():
        names = sorted(set(read_index(folder / INDEX_NAME).values()))
    if not names:
        raise CheckpointError(f"{folder}: no model*.safetensors beside config.json")
    present = [name for name in names if (folder / name).is_file()]
    absent = tuple(name for name in names if name not in present)
    layout = layout_of(data, indexed_names(folder))
    specs = inventory(config)
    found = {
        name: (file, entry)
        for file in present
        for name, entry in read_safetensors(folder / file).items()
    }
    of_name = {layout.name(spec): spec for spec in specs}
    tensors = tuple(_listed(layout, name, entry, of_name) for name, (_, entry) in found.items())
    missing = tuple(spec for spec in specs if layout.name(spec) not in found)
    faults = tuple(_faults(folder, layout, [t for t in tensors if t.fits], found))
    return Listing(
        folder, "safetensors", tuple(present), absent, config, tensors, missing,
        faults=faults, layout=layout,
    )  # fmt: skip


def _listed(layout: Layout, name: str, entry: Entry, of_name: Mapping[str, TensorSpec]) -> Listed:
    base, size = layout.base(name), int(entry.data.size)
    if base != name:
        return Listed(name, entry.dtype, entry.shape, size, of_name.get(base), scale=True)
    kind, shape = layout.shown(name, entry)
    return Listed(name, kind, shape, size, of_name.get(name))


def _faults(
    folder: Path, layout: Layout, tensors: Iterable[Listed], found: Mapping[str, tuple[str, Entry]]
) -> Iterator[tuple[TensorSpec, str]]:
    for t in tensors:
        if t.spec is not None and not t.scale:
            try:
                layout.stored(folder, t.spec, found)
            except CheckpointError as error:
                yield t.spec, str(error)

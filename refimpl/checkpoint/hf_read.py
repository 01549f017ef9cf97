"""Hugging Face checkpoint folders: config.json beside one or many safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from refimpl.checkpoint.hf_layout import Layout, layout_of
from refimpl.checkpoint.safetensors_read import Entry, read_safetensors
from refimpl.checkpoint.stored import (
    DEFAULT_CACHE_BYTES,
    StoredSource,
    Wanted,
    extra_warning,
    missing_mtp,
    no_mtp_warning,
)
from refimpl.config_io import from_hf, read_config_json
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec, inventory

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
_MAX_FILE_NAME_BYTES = 255


def open_hf(
    folder: Path, cache_bytes: int = DEFAULT_CACHE_BYTES, wanted: Wanted | None = None
) -> StoredSource:
    """Open a folder with config.json and model*.safetensors.

    Weights are BF16, F16, F32, or FP8 with block scales; folders of mlx-lm are read too (see
    `refimpl.checkpoint.hf_layout`). Every tensor that the configuration demands is checked by
    name, shape and type. MTP layers that are declared but wholly absent become a warning and are
    switched off.

    Args:
        wanted: the tensors that are needed; shards that hold none of them may be missing.

    Raises:
        ConfigError: config.json contradicts itself.
        CheckpointError: names the file and tensor, what was found and what was expected.
    """
    data = read_config_json(folder / "config.json")
    config = from_hf(data)
    if wanted is not None:
        specs = [spec for spec in inventory(config) if wanted(spec)]
        layout = layout_of(data, indexed_names(folder))
        found = _all_entries(folder, _names(layout, specs))
        tensors = [layout.stored(folder, spec, found) for spec in specs]
        return StoredSource(config, tensors, (), cache_bytes)
    found = _all_entries(folder)
    layout = layout_of(data, found)
    warnings = []
    specs = list(inventory(config))
    if missing_mtp(specs, lambda t: layout.name(t) in found):
        warnings.append(no_mtp_warning(folder, config))
        config = config.without_mtp()
        specs = list(inventory(config))
    tensors = [layout.stored(folder, spec, found) for spec in specs]
    extra = found.keys() - _names(layout, specs)
    if extra:
        warnings.append(extra_warning(folder, extra))
    return StoredSource(config, tensors, warnings, cache_bytes)


def _names(layout: Layout, specs: Iterable[TensorSpec]) -> set[str]:
    """Names of the tensors `specs` and of their scales."""
    return {name for s in specs for name in (layout.name(s), *layout.companions(s))}


def indexed_names(folder: Path) -> Iterable[str]:
    """Names of all tensors of a folder, whether or not their shards are there, from the index or,
    without one, from the headers.

    Raises:
        CheckpointError: the index or a header is damaged.
    """
    if (folder / INDEX_NAME).exists():
        return read_index(folder / INDEX_NAME).keys()
    files = sorted(folder.glob("model*.safetensors"))
    return [name for file in files for name in read_safetensors(file)]


def _all_entries(
    folder: Path, only: AbstractSet[str] | None = None
) -> dict[str, tuple[str, Entry]]:
    """Tensor name to (file name, entry) over all shards, or those that hold the tensors `only`."""
    index = folder / INDEX_NAME
    found: dict[str, tuple[str, Entry]] = {}
    if index.exists():
        weight_map = read_index(index)
        if only is not None:
            needed = {weight_map[name] for name in only & weight_map.keys()}
            weight_map = {n: file for n, file in weight_map.items() if file in needed}
        files = sorted(set(weight_map.values()))
    else:
        weight_map = {}
        files = sorted(p.name for p in folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no model*.safetensors beside config.json")
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: shard {name} is missing, {INDEX_NAME} names it; complete the download"
            )
        for tensor, entry in read_safetensors(folder / name).items():
            if tensor in found:
                other = found[tensor][0]
                raise CheckpointError(f"{folder}: tensor {tensor} is in both {other} and {name}")
            found[tensor] = (name, entry)
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor][0] != name:
            raise CheckpointError(
                f"{folder / name}: tensor {tensor} is missing, {INDEX_NAME} says it is here"
            )
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name, as `model.safetensors.index.json` states it.

    Raises:
        CheckpointError: damaged, or a name that is not a file of this folder.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:100]})") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no 'weight_map' from tensor names to file names")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and name.isprintable()
        plain = plain and len(name.encode()) <= _MAX_FILE_NAME_BYTES
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {str(name)[:100]!r} is not the name of a safetensors file in this folder"
            )
    return weight_map

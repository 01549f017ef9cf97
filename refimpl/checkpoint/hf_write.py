"""Writing Hugging Face checkpoints: `config.json` and sharded safetensors.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, tensor bytes).
Tensors are written chunk by chunk, so memory stays at one chunk (one expert, a few rows).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refimpl.checkpoint.atomic import atomic_file, atomic_folder
from refimpl.checkpoint.block_types import BlockType, block_type, encode
from refimpl.config import ModelConfig
from refimpl.config_io import to_hf
from refimpl.errors import InputError
from refimpl.inventory import TensorSpec, inventory

Array = NDArray[Any]
Chunks = Callable[[TensorSpec], Iterable[Array]]
"""Gives a tensor's values in order, as arrays that follow each other along the first axis;
norms in the Hugging Face convention (w, multiply by 1 + w)."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
DEFAULT_SHARD_BYTES = 5_000_000_000
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_hf(
    config: ModelConfig,
    chunks: Chunks,
    out_dir: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint folder; it appears whole or not at all.

    Args:
        chunks: gives the values of each tensor of `inventory(config)`.
        dtype: 'bf16', 'f16' or 'f32'; the router's selection bias is always F32, because the
            published code keeps that parameter in float32.
        max_shard_bytes: a new shard starts before this size is passed; one tensor is never split.
        extra_files: name to contents of files to put beside it, such as tokenizer.json.

    Raises:
        InputError: unknown dtype, or `out_dir` exists already or cannot be written.
        CheckpointError: a value is beyond the type.
    """
    if dtype not in STORED:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(STORED)}")
    shards = _plan_shards(inventory(config), dtype, max_shard_bytes)
    total = sum(_stored_bytes(t, dtype) for shard in shards for t in shard)
    names = _shard_names(len(shards))
    done = 0
    with atomic_folder(out_dir) as part:
        for name, shard in zip(names, shards, strict=True):
            done = _write_shard(part / name, shard, chunks, dtype, done, total, progress)
        if len(shards) > 1:
            _write_index(part, names, shards, total)
        for file_name, contents in (extra_files or {}).items():
            with atomic_file(part / file_name) as file:
                file.write(contents)
        data = to_hf(config) | {"torch_dtype": _TORCH_NAMES[dtype]}
        with atomic_file(part / "config.json") as file:
            file.write((json.dumps(data, indent=2) + "\n").encode())
    return Path(out_dir)


def _type_of(tensor: TensorSpec, dtype: str) -> BlockType:
    return block_type(STORED["f32" if tensor.key == "router_bias" else dtype])


def _stored_bytes(tensor: TensorSpec, dtype: str) -> int:
    return tensor.elements * _type_of(tensor, dtype).block_bytes


def _plan_shards(
    tensors: Iterable[TensorSpec], dtype: str, max_shard_bytes: int
) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        n = _stored_bytes(tensor, dtype)
        if shards[-1] and size + n > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n
    return shards


def _shard_names(n: int) -> list[str]:
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def _write_shard(
    path: Path,
    shard: list[TensorSpec],
    chunks: Chunks,
    dtype: str,
    done: int,
    total: int,
    progress: Progress | None,
) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + _stored_bytes(tensor, dtype)
        header[tensor.hf_name] = {
            "dtype": _type_of(tensor, dtype).name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            kind = _type_of(tensor, dtype)
            written = 0
            for chunk in chunks(tensor):
                written += file.write(encode(kind, chunk, tensor.hf_name).data)
                if progress:
                    progress(done + written, total)
            if written != _stored_bytes(tensor, dtype):
                raise AssertionError(f"{tensor.hf_name}: chunks gave {written} bytes")
            done += written
    return done


def _write_index(
    folder: Path, names: list[str], shards: list[list[TensorSpec]], total: int
) -> None:
    where = {t.hf_name: n for n, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with atomic_file(folder / "model.safetensors.index.json") as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())

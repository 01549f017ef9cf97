"""Writing Hugging Face checkpoints: `config.json` and sharded safetensors.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, tensor bytes).
Tensors are written chunk by chunk, so memory stays at one chunk (one expert, a few rows).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.atomic import atomic_file, atomic_folder
from refimpl.checkpoint.block_fp8 import (
    DEFAULT_BLOCK,
    SCALE_SUFFIX,
    STORED_NAME,
    quantise_fp8,
    scale_shape,
)
from refimpl.checkpoint.block_types import BlockType, block_type, encode
from refimpl.checkpoint.partial import require_space
from refimpl.config import ModelConfig
from refimpl.config_io import to_hf
from refimpl.errors import CheckpointError, InputError
from refimpl.inventory import TensorSpec, inventory

Array = NDArray[Any]
Chunks = Callable[[TensorSpec], Iterable[Array]]
"""Gives a tensor's values in order, as arrays that follow each other along the first axis;
norms in the Hugging Face convention (w, multiply by 1 + w)."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "fp8": "BF16"}
"""Types of a folder by the name that users give: the stored type of every tensor but the routed
experts of 'fp8', which are FP8 with block scales, as published."""

DEFAULT_SHARD_BYTES = 5_000_000_000
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}


def write_hf(
    config: ModelConfig,
    chunks: Chunks,
    out_dir: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    fp8_block: tuple[int, int] = DEFAULT_BLOCK,
) -> Path:
    """Write a checkpoint folder; it appears whole or not at all.

    Args:
        chunks: gives the values of each tensor of `inventory(config)`.
        dtype: 'bf16', 'f16', 'f32' or 'fp8' (see `STORED`); the router's selection bias is always
            F32, because the published code keeps that parameter in float32.
        max_shard_bytes: a new shard starts before this size is passed; one tensor is never split.
        extra_files: name to contents of files to put beside it, such as tokenizer.json.
        fp8_block: rows and columns of an FP8 weight that share a scale.

    Raises:
        InputError: unknown dtype, or `out_dir` exists already or cannot be written.
        CheckpointError: a value is beyond the type.
    """
    if dtype not in STORED:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(STORED)}")
    form = _Form(dtype, fp8_block)
    shards = _plan_shards(inventory(config), form, max_shard_bytes)
    total = sum(form.stored_bytes(t) for shard in shards for t in shard)
    names = _shard_names(len(shards))
    done = 0
    with atomic_folder(out_dir) as part:
        require_space(part, total)
        for name, shard in zip(names, shards, strict=True):
            done = _write_shard(part / name, shard, chunks, form, done, total, progress)
        if len(shards) > 1:
            _write_index(part, names, shards, total, form)
        for file_name, contents in (extra_files or {}).items():
            with atomic_file(part / file_name) as file:
                file.write(contents)
        data = to_hf(config) | {"torch_dtype": _TORCH_NAMES[dtype]}
        if dtype == "fp8":
            data["quantization_config"] = _quantisation(config, form)
        with atomic_file(part / "config.json") as file:
            file.write((json.dumps(data, indent=2) + "\n").encode())
    return Path(out_dir)


@dataclass(frozen=True)
class _Form:
    """How each tensor of a folder is stored."""

    dtype: str
    block: tuple[int, int]

    def is_fp8(self, tensor: TensorSpec) -> bool:
        return self.dtype == "fp8" and tensor.role == "routed"

    def kind(self, tensor: TensorSpec) -> BlockType:
        """The type of a tensor that is not FP8."""
        return block_type(STORED["f32" if tensor.key == "router_bias" else self.dtype])

    def parts(self, tensor: TensorSpec) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Name, type, shape and bytes of what is written for a tensor: its values, its scales."""
        if not self.is_fp8(tensor):
            kind = self.kind(tensor)
            size = tensor.elements * kind.block_bytes
            return [(tensor.hf_name, kind.name, tensor.shape, size)]
        scales = scale_shape(tensor.shape, self.block)
        return [
            (tensor.hf_name, STORED_NAME, tensor.shape, tensor.elements),
            (tensor.hf_name + SCALE_SUFFIX, "F32", scales, 4 * math.prod(scales)),
        ]

    def stored_bytes(self, tensor: TensorSpec) -> int:
        return sum(size for *_, size in self.parts(tensor))

    def data(self, tensor: TensorSpec, chunks: Iterable[Array]) -> Iterator[Array]:
        """The bytes of all parts, in order."""
        if not self.is_fp8(tensor):
            for chunk in chunks:
                yield encode(self.kind(tensor), chunk, tensor.hf_name)
            return
        scales = []
        for matrix in _matrices(chunks, tensor.shape[-2:], tensor.hf_name):
            codes, of_matrix = quantise_fp8(matrix, self.block)
            scales.append(of_matrix)
            yield codes
        yield np.concatenate(scales).astype("<f4")


def _matrices(chunks: Iterable[Array], shape: tuple[int, ...], name: str) -> Iterator[Array]:
    """Whole matrices (out, in) in float32 from chunks of any number of rows, since a block spans
    rows; what is held is one matrix."""
    matrix, filled = np.empty(shape, np.float32), 0
    for chunk in chunks:
        rows = np.asarray(chunk, np.float32).reshape(-1, shape[1])
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{name} holds a value that is not finite; FP8 blocks have none")
        while len(rows):
            taken = min(len(rows), shape[0] - filled)
            matrix[filled : filled + taken] = rows[:taken]
            rows, filled = rows[taken:], filled + taken
            if filled == shape[0]:
                yield matrix
                filled = 0


def _quantisation(config: ModelConfig, form: _Form) -> dict[str, Any]:
    """`quantization_config` of config.json, fields as transformers and vLLM read them."""
    plain = [
        t.hf_name.removesuffix(".weight")
        for t in inventory(config)
        if len(t.shape) > 1 and not form.is_fp8(t)
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(form.block),
        "modules_to_not_convert": plain,
    }


def _plan_shards(
    tensors: Iterable[TensorSpec], form: _Form, max_shard_bytes: int
) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        n = form.stored_bytes(tensor)
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
    form: _Form,
    done: int,
    total: int,
    progress: Progress | None,
) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, kind, shape, size in (part for t in shard for part in form.parts(t)):
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            written = 0
            for data in form.data(tensor, chunks(tensor)):
                written += file.write(data.data)
                if progress:
                    progress(done + written, total)
            if written != form.stored_bytes(tensor):
                raise AssertionError(f"{tensor.hf_name}: chunks gave {written} bytes")
            done += written
    return done


def _write_index(
    folder: Path, names: list[str], shards: list[list[TensorSpec]], total: int, form: _Form
) -> None:
    where = {
        part[0]: name
        for name, shard in zip(names, shards, strict=True)
        for t in shard
        for part in form.parts(t)
    }
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with atomic_file(folder / "model.safetensors.index.json") as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())

"""GGUF files of architecture `step35` as weight sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refimpl.checkpoint.block_types import decode
from refimpl.checkpoint.gguf_parts import read_gguf_parts
from refimpl.checkpoint.gguf_read import GgufFile, GgufTensor
from refimpl.checkpoint.stored import (
    DEFAULT_CACHE_BYTES,
    StoredSource,
    StoredTensor,
    Wanted,
    extra_warning,
    missing_mtp,
    missing_tensor,
    no_mtp_warning,
)
from refimpl.config import ModelConfig
from refimpl.config_gguf import from_gguf
from refimpl.config_io import GGUF_ARCHITECTURE
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec, gguf_inventory

_ROUTER = re.compile(r"blk\.(\d{1,6})\.ffn_gate_inp\.weight")
_MAX_ROPE_DIVISORS = 1 << 16


def open_gguf(
    path: Path, cache_bytes: int = DEFAULT_CACHE_BYTES, wanted: Wanted | None = None
) -> StoredSource:
    """Open a GGUF file; every tensor that its keys demand is checked by name, shape and type.

    MTP layers that are declared but wholly absent become a warning and are switched off.

    Args:
        wanted: the tensors that are needed; others may be missing.

    Raises:
        ConfigError: the keys contradict each other.
        CheckpointError: names the file and tensor, what was found and what was expected.
    """
    file = read_gguf_parts(path, partial=wanted is not None)
    config = config_of(file)
    warnings = []
    specs = gguf_inventory(config)
    if wanted is not None:
        tensors = [_checked(file, s, _present(file, s)) for s in specs if wanted(s)]
        return StoredSource(config, tensors, (), cache_bytes, file.metadata)
    if missing_mtp(specs, lambda t: find_tensor(file, t) is not None):
        warnings.append(no_mtp_warning(path, config))
        config = config.without_mtp()
        specs = gguf_inventory(config)
    found = [(spec, _present(file, spec)) for spec in specs]
    tensors = [_checked(file, spec, tensor) for spec, tensor in found]
    extra = file.tensors.keys() - {tensor.name for _, tensor in found}
    if extra:
        warnings.append(extra_warning(path, extra))
    return StoredSource(config, tensors, warnings, cache_bytes, file.metadata)


def config_of(file: GgufFile) -> ModelConfig:
    """The configuration that a GGUF file's keys and tensors state.

    Raises:
        ConfigError, CheckpointError: another architecture, or keys that contradict each other.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != GGUF_ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: general.architecture is {str(architecture)[:50]!r}, expected "
            f"'{GGUF_ARCHITECTURE}' (Step 3.5 / 3.7 Flash)"
        )
    embedding = file.tensors.get("token_embd.weight")
    if file.missing_parts:
        return _config_of_parts(file, embedding)
    if embedding is None or len(embedding.dims) != 2:
        raise CheckpointError(f"{file.path}: no 2-D tensor token_embd.weight; incomplete file")
    matches = (_ROUTER.fullmatch(name) for name in file.tensors)
    moe_layers = sorted(int(m.group(1)) for m in matches if m)
    return from_gguf(file.metadata, embedding.dims[1], moe_layers, _rope_divisors(file))


def _config_of_parts(file: GgufFile, embedding: GgufTensor | None) -> ModelConfig:
    """The configuration where parts are missing: from keys, and never without the divisors of
    RoPE, whose absence would mean that there are none."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, Sequence) else 0
    if embedding is not None:
        size = embedding.dims[-1]
    for name, there in (("rope_freqs.weight", "rope_freqs.weight" in file.tensors),
                        ("token_embd.weight", size > 0)):  # fmt: skip
        if not there:
            raise CheckpointError(
                f"{file.path}: {len(file.missing_parts)} parts are missing and no other holds "
                f"{name}; download the part that does"
            )
    return from_gguf(file.metadata, size, None, _rope_divisors(file))


def _rope_divisors(file: GgufFile) -> Sequence[float] | None:
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if len(tensor.dims) != 1 or tensor.dims[0] > _MAX_ROPE_DIVISORS:
        raise CheckpointError(f"{file.path}: tensor rope_freqs.weight has shape {tensor.shape}")
    return [float(v) for v in decode(tensor.kind, tensor.rows).astype(np.float64)[0]]


def find_tensor(file: GgufFile, spec: TensorSpec) -> GgufTensor | None:
    """The file's tensor for a row of the tensor table, or None."""
    found = file.tensors.get(spec.gguf_name)
    if found is None and spec.key == "router_bias":  # also written without the suffix
        found = file.tensors.get(spec.gguf_name.removesuffix(".bias"))
    return found


def _present(file: GgufFile, spec: TensorSpec) -> GgufTensor:
    tensor = find_tensor(file, spec)
    if tensor is None:
        hint = "the file is incomplete or its keys belong to another model"
        if file.missing_parts:
            hint = f"it is in one of {', '.join(file.missing_parts[:3])}, which are not here"
            raise missing_tensor(file.path, spec.gguf_name, spec.gguf_shape, hint)
        if "blk.0.attn_norm.weight" not in file.tensors:
            hint = "a file of MTP layers alone cannot be run; open the main model's file and give "
            hint += "this one with --mtp-model"
        raise missing_tensor(file.path, spec.gguf_name, spec.gguf_shape, hint)
    return tensor


def _checked(file: GgufFile, spec: TensorSpec, tensor: GgufTensor) -> StoredTensor:
    where = f"{file.path}: tensor {tensor.name}"
    if tensor.dims != spec.gguf_shape:
        raise CheckpointError(f"{where} has shape {tensor.dims}, its keys say {spec.gguf_shape}")
    if tensor.kind.plain is None and tensor.kind.decode is None:
        raise CheckpointError(f"{where} has type {tensor.kind.name}, which cannot be decoded here")
    return StoredTensor(spec, tensor.kind, tensor.rows, spec.plus_one, where)

"""How a folder of safetensors writes down the tensors of the table: names, norms, block scales.

Three layouts are met: the published one (BF16, F16, F32), the same with FP8 weights and their
block scales (`refimpl.checkpoint.block_fp8`), and that of mlx-lm (`refimpl.checkpoint.mlx`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.checkpoint.block_fp8 import (
    DEFAULT_BLOCK,
    SCALE_SUFFIX,
    STORED_NAME,
    BlockScales,
    fp8_type,
    scale_shape,
)
from refimpl.checkpoint.block_types import PLAIN, block_type
from refimpl.checkpoint.mlx import GroupScales, Quantisation, is_mlx_name, mlx_name, quantisation
from refimpl.checkpoint.safetensors_read import Entry
from refimpl.checkpoint.stored import RowDecoder, StoredTensor, missing_tensor
from refimpl.errors import CheckpointError, ConfigError
from refimpl.inventory import TensorSpec

Found = Mapping[str, tuple[str, Entry]]
"""Tensor name to (file name, entry)."""

_MAX_BLOCK = 1 << 16
_SCALE = re.compile(r"(.+)(\.scales|\.biases)")


@dataclass(frozen=True)
class Layout:
    """The layout of one folder.

    Attributes:
        fp8_block: rows and columns that share a scale, where weights are FP8.
        is_mlx: names and norms are those of mlx-lm.
        mlx: its quantisation; None if the folder's matrices are plain.
    """

    fp8_block: tuple[int, int] = DEFAULT_BLOCK
    is_mlx: bool = False
    mlx: Quantisation | None = None

    def name(self, spec: TensorSpec) -> str:
        """The name of a tensor's values in the files."""
        return mlx_name(spec) if self.is_mlx else spec.hf_name

    def companions(self, spec: TensorSpec) -> tuple[str, ...]:
        """Names of the tensors that may hold its scales."""
        name = self.name(spec)
        if not self.is_mlx:
            return (name + SCALE_SUFFIX,)
        module = name.removesuffix(".weight")
        return (f"{module}.scales", f"{module}.biases") if self.mlx else ()

    def base(self, name: str) -> str:
        """The name of the values that a tensor of scales belongs to; other names as they are."""
        if self.is_mlx:
            match = _SCALE.fullmatch(name) if self.mlx else None
            return f"{match[1]}.weight" if match else name
        return name.removesuffix(SCALE_SUFFIX)

    def shown(self, name: str, entry: Entry) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a tensor of values as a reader thinks of it: packed codes counted."""
        form = self.mlx.of(name) if self.mlx else None
        if entry.dtype != "U32" or form is None or not entry.shape:
            return entry.dtype, entry.shape
        return form.name, (*entry.shape[:-1], entry.shape[-1] * 32 // form.bits)

    def stored(self, folder: object, spec: TensorSpec, found: Found) -> StoredTensor:
        """A tensor of the table, checked: its shape, type, and the scales that belong to it.

        Raises:
            CheckpointError: says what was found and what was expected.
        """
        name = self.name(spec)
        if name not in found:
            hint = "the checkpoint is incomplete or config.json belongs to another model"
            raise missing_tensor(folder, name, spec.shape, hint)
        file, entry = found[name]
        where = f"{folder}/{file}: tensor {name}"
        if entry.dtype == "U32" and self.mlx:
            return self._mlx(where, spec, entry, found)
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{where} has shape {entry.shape}, expected {spec.shape} by config.json"
            )
        if entry.dtype == STORED_NAME:
            return self._fp8(where, spec, entry, found)
        for scale in self.companions(spec):
            if scale in found:
                raise CheckpointError(
                    f"{where} has type {entry.dtype} and yet scales ({scale}); "
                    "one of the two belongs to another checkpoint"
                )
        if entry.dtype not in PLAIN:
            raise CheckpointError(
                f"{where} has type {entry.dtype}, expected {', '.join(PLAIN)} or {STORED_NAME}"
            )
        kind = block_type(entry.dtype)
        rows = entry.data.reshape(-1, kind.row_bytes(spec.shape[-1]))
        one_plus = self.is_mlx and spec.plus_one
        return StoredTensor(spec, kind, rows, holds_one_plus=one_plus, where=where)

    def _fp8(self, where: str, spec: TensorSpec, entry: Entry, found: Found) -> StoredTensor:
        if len(spec.shape) < 2 or self.is_mlx:
            raise CheckpointError(f"{where} has type {entry.dtype}, expected {', '.join(PLAIN)}")
        name = self.companions(spec)[0]
        expected = scale_shape(spec.shape, self.fp8_block)
        scales = _scales(where, name, expected, found)
        decoder = BlockScales(scales, spec.shape[-2], self.fp8_block)
        rows = entry.data.reshape(-1, spec.shape[-1])
        return StoredTensor(spec, fp8_type(), rows, False, where, decoder)

    def _mlx(self, where: str, spec: TensorSpec, entry: Entry, found: Found) -> StoredTensor:
        form = self.mlx.of(self.name(spec)) if self.mlx else None
        *stack, values = spec.shape
        if form is None or not stack or not form.fits(values):
            raise CheckpointError(
                f"{where} holds packed codes (U32), which quantization in config.json does not "
                "explain; it belongs to another checkpoint"
            )
        packed = (*stack, form.words(values))
        if entry.shape != packed:
            raise CheckpointError(
                f"{where} has shape {entry.shape}, expected {packed}: {form.bits} bits for each "
                f"of {spec.shape} values by config.json"
            )
        expected = (*stack, values // form.group_size)
        scales, biases = (_scales(where, n, expected, found) for n in self.companions(spec))
        decoder: RowDecoder = GroupScales(form, scales, biases)
        rows = entry.data.reshape(-1, 4 * packed[-1])
        return StoredTensor(spec, form.block_type(), rows, False, where, decoder)


def _scales(where: str, name: str, shape: tuple[int, ...], found: Found) -> Any:
    """A tensor of scales as (rows, scales of a row)."""
    if name not in found:
        raise CheckpointError(f"{where} needs its scales; tensor {name} {shape} is missing")
    entry = found[name][1]
    if entry.shape != shape:
        raise CheckpointError(f"{where}: {name} has shape {entry.shape}, expected {shape}")
    if entry.dtype not in PLAIN:
        raise CheckpointError(
            f"{where}: {name} has type {entry.dtype}, expected {', '.join(PLAIN)}"
        )
    values: np.ndarray[Any, Any] = entry.data.view(PLAIN[entry.dtype])
    return values.reshape(-1, shape[-1])


def layout_of(config: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The layout that config.json and the tensors' names speak of.

    Args:
        config: the parsed config.json.
        names: names of all tensors, as the index or the headers state them.

    Raises:
        ConfigError: a quantisation that cannot be read.
    """
    nested = config.get("text_config")
    fields = {**config, **nested} if isinstance(nested, Mapping) else config
    mlx, field = fields.get("quantization"), fields.get("quantization_config")
    for key, value in (("quantization", mlx), ("quantization_config", field)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(key, f"is {str(value)[:50]!r}, expected an object")
    if mlx is None and field and "quant_method" not in field and "group_size" in field:
        mlx = field  # mlx-lm writes its object under both names
    if mlx is not None:
        return Layout(is_mlx=True, mlx=quantisation(mlx))
    if any(is_mlx_name(name) for name in names):
        return Layout(is_mlx=True)
    return Layout(fp8_block=DEFAULT_BLOCK if field is None else _fp8_block(field))


def _fp8_block(field: Mapping[str, Any]) -> tuple[int, int]:
    method = field.get("quant_method")
    if method != "fp8":
        raise ConfigError(
            "quantization_config.quant_method",
            f"is {str(method)[:50]!r}; safetensors are read as BF16, F16, F32, block-scaled 'fp8' "
            "or as written by mlx-lm",
        )
    block = field.get("weight_block_size")
    good = isinstance(block, list) and len(block) == 2
    if not good or not all(type(b) is int and 0 < b <= _MAX_BLOCK for b in block or ()):
        raise ConfigError(
            "quantization_config.weight_block_size",
            f"is {str(block)[:50]}, expected two sizes such as [128, 128]",
        )
    return int(block[0]), int(block[1])  # type: ignore[index]

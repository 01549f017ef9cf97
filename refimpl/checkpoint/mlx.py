"""Folders written by mlx-lm: other tensor names, norms as 1 + w, affine quantisation in groups.

Names and norms are those of mlx-lm's `models/step3p5.py` (`sanitize`): routed experts under
`mlp.switch_mlp`, the router under `mlp.gate`, the shared expert inside `mlp`, every norm stored
as 1 + w, MTP layers dropped.

A quantised matrix is three tensors, `NAME.weight`, `NAME.scales` and `NAME.biases`. A row of `in`
values is a little-endian stream of `bits`-bit codes in 32-bit words, value 0 in the lowest bits;
each group of `group_size` values along the row shares a scale and a bias:

    w = scale * code + bias

Source: mlx.core.quantize (mode 'affine') in the MLX documentation. Which matrices are quantised,
and how, is in `quantization` of config.json: defaults, and entries by module name for the rest
(mlx-lm keeps the router at 8 bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.block_types import BlockType
from refimpl.errors import ConfigError
from refimpl.inventory import TensorSpec

Array = NDArray[Any]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_RENAMED = {
    ".moe.gate_proj.": ".mlp.switch_mlp.gate_proj.",
    ".moe.up_proj.": ".mlp.switch_mlp.up_proj.",
    ".moe.down_proj.": ".mlp.switch_mlp.down_proj.",
    ".moe.gate.": ".mlp.gate.gate.",
    ".moe.router_bias": ".mlp.gate.router_bias",
    ".share_expert.": ".mlp.share_expert.",
}


def mlx_name(spec: TensorSpec) -> str:
    """The name of a tensor of the table in mlx-lm's files."""
    name = spec.hf_name
    for old, new in _RENAMED.items():
        if old in name:
            return name.replace(old, new)
    return name


def is_mlx_name(name: str) -> bool:
    """Whether only mlx-lm calls a tensor so."""
    return any(new in name for new in _RENAMED.values())


@dataclass(frozen=True)
class Affine:
    """How one matrix is quantised: `bits` a code, `group_size` codes a scale."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """Such as 'MLX4_G64'."""
        return f"MLX{self.bits}_G{self.group_size}"

    def words(self, values: int) -> int:
        """32-bit words of a row."""
        return values * self.bits // 32

    def fits(self, values: int) -> bool:
        """Whether rows of so many values fill whole groups and words."""
        return values % self.group_size == 0 and values * self.bits % 32 == 0

    def block_type(self) -> BlockType:
        """The stored type of the codes: a block is 32 values in `bits` words."""
        return BlockType(self.name, -1, 32, 4 * self.bits, None)


@dataclass(frozen=True)
class Quantisation:
    """`quantization` of config.json: defaults and the modules that depart from them (None: a
    module that is not quantised)."""

    default: Affine
    modules: Mapping[str, Affine | None]

    def of(self, weight: str) -> Affine | None:
        """How the tensor `NAME.weight` would be quantised."""
        module = weight.removesuffix(".weight")
        return self.modules.get(module, self.default)


def quantisation(field: Mapping[str, Any]) -> Quantisation:
    """Read the object `quantization` of config.json.

    Raises:
        ConfigError: another mode than affine, or impossible numbers.
    """
    default = _affine("quantization", field)
    modules: dict[str, Affine | None] = {}
    for name, value in field.items():
        if isinstance(value, Mapping):
            merged = {"mode": field.get("mode"), **value}
            modules[name] = _affine(f"quantization.{name:.80}", merged)
        elif value is False:
            modules[name] = None
    return Quantisation(default, modules)


def _affine(where: str, value: Mapping[str, Any]) -> Affine:
    mode = value.get("mode") or "affine"
    if mode != "affine":
        raise ConfigError(
            where, f"has mode {str(mode)[:40]!r}; only 'affine' is read: convert without --q-mode"
        )
    bits, group = value.get("bits"), value.get("group_size")
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(where, f"has bits {str(bits)[:40]}, expected one of {BITS}")
    if type(group) is not int or group not in GROUP_SIZES:
        raise ConfigError(where, f"has group_size {str(group)[:40]}, expected one of {GROUP_SIZES}")
    return Affine(bits, group)


@dataclass(frozen=True)
class GroupScales:
    """Scales and biases of one quantised tensor; a `refimpl.checkpoint.stored.RowDecoder`.

    Attributes:
        scales, biases: (rows, groups), as stored.
    """

    form: Affine
    scales: Array
    biases: Array

    @property
    def stored_bytes(self) -> int:
        """Bytes of scales and biases in the file."""
        return int(self.scales.nbytes + self.biases.nbytes)

    def decode(self, rows: Array, index: Array) -> Array:
        """Stored bytes (n, row_bytes) of the rows numbered `index` -> float32 (n, in)."""
        codes = unpack(rows, self.form.bits)
        groups = codes.reshape(len(codes), -1, self.form.group_size).astype(np.float32)
        scales = self.scales[index].astype(np.float32)
        biases = self.biases[index].astype(np.float32)
        with np.errstate(all="ignore"):
            groups *= scales[:, :, None]
            groups += biases[:, :, None]
        return groups.reshape(codes.shape)

    def scale_faults(self, start: int, stop: int) -> dict[str, Array]:
        """What is impossible about scales and biases of rows start..stop, masks (n, groups)."""
        parts = (self.scales[start:stop], self.biases[start:stop])
        broken = [~np.isfinite(part.astype(np.float32)) for part in parts]
        return {"not finite": broken[0] | broken[1]}


def unpack(rows: Array, bits: int) -> Array:
    """Codes (n, 8 x row_bytes / bits) uint8 of packed rows (n, row_bytes)."""
    if bits == 8:
        return rows
    if bits == 4:
        return np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
    stream = np.unpackbits(np.ascontiguousarray(rows), axis=1, bitorder="little")
    split = stream.reshape(len(rows), -1, bits)
    return np.packbits(split, axis=-1, bitorder="little")[..., 0]

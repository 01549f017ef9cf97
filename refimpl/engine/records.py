"""From a checkpoint's tensors to the records that compiled code reads.

Everything is checked here, because kernels index unchecked: that every tensor is of a type with
kernels, that its bytes are there and lie as the kernels expect, and that rows fill whole
sub-blocks. No tensor is decoded; only norms and biases, a few kilobytes each, are copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.stored import StoredSource, StoredTensor
from refimpl.config import LayerSpec
from refimpl.engine.activations import FLOAT, form_bytes, form_of
from refimpl.engine.amx_choice import choose_amx
from refimpl.engine.faults import unwatch, watch
from refimpl.engine.fields import Layer, Matrix, float_bits
from refimpl.engine.files import MappedFile, map_under, path_of
from refimpl.engine.formats import FORMATS, SUB_BLOCK
from refimpl.engine.kernels import PLAIN, kernel
from refimpl.engine.memory import address
from refimpl.engine.simd import Simd
from refimpl.engine.tiles import Tiling, tiling
from refimpl.engine.work import MAX_CHUNK
from refimpl.errors import CheckpointError, InputError

Record = NDArray[np.int64]
_UNIT_BYTES = 1 << 16  # weight bytes of one unit of work, about
_UNITS = 16  # at least so many units in a matrix, if its rows allow


@dataclass(frozen=True)
class Site:
    """A place where rows of activations are made for one or more matrices.

    Attributes:
        plan: what `activations.prepare` is given.
        blob_bytes: bytes of a row with all its forms.
    """

    plan: Record
    blob_bytes: int


class Records:
    """Builds records and keeps everything alive that they point to.

    Args:
        exact: float32 activations everywhere.

    Attributes:
        amx: the choice of tile instructions.
        tile_bytes: memory for unpacked weights that a thread needs.
        unit_rows: most rows of a unit of work with many rows of activations.
    """

    def __init__(self, source: StoredSource, simd: Simd, exact: bool) -> None:
        self.source, self._simd, self._exact = source, simd, exact
        self.amx = choose_amx(simd, exact)
        self.tile_bytes = self.unit_rows = 0
        self._kept: list[Any] = []
        self.files: dict[int, MappedFile] = {}

    def check_files(self) -> None:
        """Refuse to go on if a mapped file has become shorter.

        Raises:
            CheckpointError: it has.
        """
        for file in self.files.values():
            file.check()

    def keep(self, array: NDArray[Any]) -> int:
        """The address of an array, which stays alive with these records."""
        self._kept.append(array)
        return address(array)

    def record(self, size: IntEnum) -> Record:
        """An empty record."""
        made = np.zeros(int(size), dtype=np.int64)
        self._kept.append(made)
        return made

    def vector(self, values: NDArray[Any]) -> int:
        """The address of a float32 copy."""
        return self.keep(np.array(values, dtype=np.float32))

    def norm(self, key: str, layer: int | None) -> int:
        """The address of a norm's factors 1 + w."""
        return self.vector(self.source.norm_scale(key, layer, np.float32))

    def site(self, columns: int, keys: Iterable[str], layer: int | None) -> Site:
        """The forms that the named matrices need of their common input rows."""
        tensors = [self._tensor(key, layer) for key in keys]
        forms = sorted({self._form(tensor) for tensor in tensors} - {FLOAT})
        tiled = sorted({self._tiling(tensor).form for tensor in tensors} - {FLOAT, *forms})
        plan, at = [len(forms), len(forms + tiled)], form_bytes(FLOAT, columns)
        for form in forms + tiled:
            plan += [form, at]
            at += form_bytes(form, columns)
        made = np.array(plan, dtype=np.int64)
        self._kept.append(made)
        return Site(made, at)

    def matrix(self, key: str, layer: int | None, site: Site) -> int:
        """The address of a matrix's record; its activations come from `site`."""
        tensor = self._tensor(key, layer)
        *stack, rows, columns = tensor.spec.shape
        row_bytes = int(tensor.rows.shape[1])
        record = self.record(Matrix.SIZE)
        record[Matrix.ADDRESS] = address(tensor.rows)
        record[Matrix.ROWS], record[Matrix.COLUMNS] = rows, columns
        record[Matrix.ROW_BYTES] = row_bytes
        record[Matrix.EXPERT_BYTES] = rows * row_bytes if stack else 0
        form = self._form(tensor)
        plan = site.plan[2:].tolist()
        offsets = dict(zip(plan[::2], plan[1::2], strict=True))
        record[Matrix.FORM_OFFSET] = offsets.get(form, 0)
        chunk = min(_UNIT_BYTES // row_bytes, -(-rows // _UNITS), MAX_CHUNK)
        record[Matrix.CHUNK] = max(16, chunk // 16 * 16)
        exact, name = self._is_exact(tensor), tensor.kind.name
        record[Matrix.KERNEL_1] = kernel(self._simd, name, 1, exact).address
        record[Matrix.KERNEL_2] = kernel(self._simd, name, 2, exact).address
        record[Matrix.KERNEL_4] = kernel(self._simd, name, 4, exact).address
        made = self._tiling(tensor)
        record[Matrix.UNPACK], record[Matrix.MULTIPLY] = made.unpack.address, made.multiply.address
        record[Matrix.TILE_BYTES] = made.tile_bytes(columns)
        record[Matrix.TILE_COLUMNS], record[Matrix.TILE_UNIT] = made.columns, made.unit_rows
        record[Matrix.TILE_TOKENS] = made.tokens
        record[Matrix.TILE_FORM_OFFSET] = offsets.get(made.form, 0)
        self.tile_bytes = max(self.tile_bytes, made.scratch_bytes(columns))
        self.unit_rows = max(self.unit_rows, made.unit_rows)
        return address(record)

    def _is_exact(self, tensor: StoredTensor) -> bool:
        return self._exact or tensor.spec.key == "router"

    def _form(self, tensor: StoredTensor) -> int:
        exact = self._is_exact(tensor) or tensor.kind.name in PLAIN
        return form_of(self._simd, FORMATS[tensor.kind.name], exact)

    def _tiling(self, tensor: StoredTensor) -> Tiling:
        return tiling(self._simd, tensor.kind.name, self._is_exact(tensor), self.amx.unit)

    def _tensor(self, key: str, layer: int | None) -> StoredTensor:
        tensor = self.source.stored(key, layer)
        fmt = FORMATS.get(tensor.kind.name)
        if fmt is None:
            raise InputError(
                f"{tensor.where} has type {tensor.kind.name}, which the engine has no kernels for "
                f"(it has: {', '.join(FORMATS)}); convert the file or use --backend reference"
            )
        columns = tensor.spec.shape[-1]
        if columns % SUB_BLOCK:
            raise InputError(
                f"{tensor.where} has rows of {columns} values; the engine needs multiples of "
                f"{SUB_BLOCK}; use --backend reference"
            )
        rows = tensor.spec.elements // columns
        expected = (rows, columns // fmt.block_values * fmt.block_bytes)
        if tensor.rows.shape != expected or not tensor.rows.flags.c_contiguous:
            raise CheckpointError(
                f"{tensor.where} has bytes {tensor.rows.shape}, expected {expected} in one piece"
            )
        self._watch(tensor)
        return tensor

    def _watch(self, tensor: StoredTensor) -> None:
        """Remember the mapped file that a tensor lies in."""
        self._kept.append(tensor.rows)
        base = map_under(tensor.rows)
        if base is not None and id(base) not in self.files:
            file = MappedFile.of(base, path_of(tensor))
            self.files[id(base)] = file
            watch(file)
            weakref.finalize(self, unwatch, file)


@dataclass(frozen=True)
class LayerRecord:
    """A layer's record and the sizes of its blobs."""

    address: int
    input: Site
    heads: Site
    hidden: Site
    shared: Site | None


def layer_record(records: Records, spec: LayerSpec, rope: int, hidden_size: int,
                 widths: tuple[int, int]) -> LayerRecord:  # fmt: skip
    """The record of a decoder layer.

    Args:
        rope: number of its rotation tables.
        widths: of the dense or routed, and of the shared hidden vector.
    """
    i = spec.index
    attention = records.site(hidden_size, ("q_proj", "k_proj", "v_proj", "g_proj"), i)
    columns = spec.num_attention_heads * spec.head_dim
    heads = records.site(columns, ("o_proj",), i)
    made = records.record(Layer.SIZE)
    made[Layer.HEADS], made[Layer.GROUPS] = spec.num_attention_heads, spec.num_attention_groups
    made[Layer.LANES], made[Layer.WINDOW] = spec.head_dim, spec.window or 0
    made[Layer.ROTARY_HALF], made[Layer.ROPE] = spec.rotary_dim // 2, rope
    made[Layer.LIMIT] = float_bits(spec.swiglu_limit)
    made[Layer.LIMIT_SHARED] = float_bits(spec.swiglu_limit_shared)
    for number, key in ((Layer.INPUT_NORM, "input_layernorm"),
                        (Layer.POST_NORM, "post_attention_layernorm"),
                        (Layer.Q_NORM, "q_norm"), (Layer.K_NORM, "k_norm")):  # fmt: skip
        made[number] = records.norm(key, i)
    for number, key in ((Layer.Q, "q_proj"), (Layer.K, "k_proj"), (Layer.V, "v_proj"),
                        (Layer.G, "g_proj")):  # fmt: skip
        made[number] = records.matrix(key, i, attention)
    made[Layer.O] = records.matrix("o_proj", i, heads)
    made[Layer.INPUT_PLAN], made[Layer.OUTPUT_PLAN] = address(attention.plan), address(heads.plan)
    made[Layer.WIDTH], made[Layer.SHARED_WIDTH] = widths
    ffn, hidden, shared = _ffn(records, made, spec, hidden_size, widths)
    widest = max(attention, ffn, key=lambda site: site.blob_bytes)
    return LayerRecord(address(made), widest, heads, hidden, shared)


def _ffn(records: Records, made: Record, spec: LayerSpec, hidden_size: int,
         widths: tuple[int, int]) -> tuple[Site, Site, Site | None]:  # fmt: skip
    i = spec.index
    if not spec.is_moe:
        ffn = records.site(hidden_size, ("gate_proj", "up_proj"), i)
        hidden = records.site(widths[0], ("down_proj",), i)
        made[Layer.GATE] = records.matrix("gate_proj", i, ffn)
        made[Layer.UP] = records.matrix("up_proj", i, ffn)
        made[Layer.DOWN] = records.matrix("down_proj", i, hidden)
        made[Layer.FFN_PLAN], made[Layer.HIDDEN_PLAN] = address(ffn.plan), address(hidden.plan)
        return ffn, hidden, None
    keys = ("experts.gate", "experts.up", "shared.gate", "shared.up", "router")
    ffn = records.site(hidden_size, keys, i)
    hidden = records.site(widths[0], ("experts.down",), i)
    shared = records.site(widths[1], ("shared.down",), i)
    made[Layer.IS_MOE] = 1
    made[Layer.ROUTER] = records.matrix("router", i, ffn)
    made[Layer.ROUTER_BIAS] = records.vector(records.source.vector("router_bias", i, np.float32))
    for number, key in ((Layer.GATE, "experts.gate"), (Layer.UP, "experts.up"),
                        (Layer.SHARED_GATE, "shared.gate"),
                        (Layer.SHARED_UP, "shared.up")):  # fmt: skip
        made[number] = records.matrix(key, i, ffn)
    made[Layer.DOWN] = records.matrix("experts.down", i, hidden)
    made[Layer.SHARED_DOWN] = records.matrix("shared.down", i, shared)
    made[Layer.FFN_PLAN], made[Layer.HIDDEN_PLAN] = address(ffn.plan), address(hidden.plan)
    made[Layer.SHARED_PLAN] = address(shared.plan)
    return ffn, hidden, shared

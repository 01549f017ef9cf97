"""The true-width slice: five layers of the published model's shapes, for kernels and timing.

Layer 0 is dense with full attention, layers 1 to 3 are MoE with sliding attention, layer 4 is MoE
with full attention: one of each kind that the model has, in about its proportions. Fewer experts
and a smaller vocabulary keep it to a few GB; the vocabulary is such that the head has about the
share of bytes that it has in the real model. Written straight as valid blocks, without ever
holding or quantising a float tensor.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.block_types import BlockType, block_type
from refimpl.checkpoint.gguf_write import rope_divisors, write_blocks
from refimpl.checkpoint.hf_write import STORED, Progress, write_hf
from refimpl.checkpoint.mixtures import MIXTURES, TypeOf, file_type_id, mixture
from refimpl.checkpoint.random_blocks import can_be_random, random_rows
from refimpl.checkpoint.synth import byte_vocabulary, random_chunks, weight_std
from refimpl.config import PER_LAYER_FIELDS, SLIDING, ModelConfig, published
from refimpl.errors import InputError
from refimpl.inventory import TensorSpec
from refimpl.text.byte_tokenizer import SIZE, byte_tokenizer_files

Array = NDArray[Any]
LAYERS = 5
EXPERTS, VOCAB = 64, 16384

_MIXED = ("q4_k_s", "q4_k_m", "q5_k_m")
# general.file_type as llama.cpp numbers it (llama.h, llama_ftype), of further types.
_FILE_TYPE_IDS = {
    "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "iq2_xxs": 19,
    "iq2_xs": 20, "iq3_xxs": 23, "iq3_s": 26, "iq2_s": 28,
}  # fmt: skip
_ONE_TYPE = ("f32", "f16", "bf16", "q8_0", "q4_0", "q6_k", "iq4_nl", "iq4_xs")
TYPES = (*_ONE_TYPE, *_MIXED, *_FILE_TYPE_IDS)


def slice_config(experts: int = EXPERTS, vocab: int = VOCAB, mtp: int = 0) -> ModelConfig:
    """The slice's configuration: the published widths, clamps on the last two layers.

    Raises:
        InputError, ConfigError: sizes that make no model.
    """
    full = published()
    if not 0 <= mtp <= full.num_nextn_predict_layers:
        raise InputError(f"{mtp} MTP layers asked for, the model has 0 to 3")
    if experts < full.moe_top_k:
        raise InputError(f"{experts} experts asked for, {full.moe_top_k} of them are selected")
    n = LAYERS + mtp
    cut: dict[str, Any] = {name: getattr(full, name)[:LAYERS] for name in PER_LAYER_FIELDS}
    cut = {name: values + getattr(full, name)[45 : 45 + mtp] for name, values in cut.items()}
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        cut[name] = (0.0,) * (LAYERS - 2) + getattr(full, name)[43:45] + (0.0,) * mtp
    assert len(cut["layer_types"]) == n and cut["layer_types"][1] == SLIDING
    return dataclasses.replace(
        full,
        num_hidden_layers=LAYERS,
        num_nextn_predict_layers=mtp,
        vocab_size=vocab,
        moe_layers=(1, 2, 3, 4),
        moe_num_experts=experts,
        bos_token_id=0,
        eos_token_id=(1, 2),
        **cut,
    )


def published_config(mtp: int = 0) -> ModelConfig:
    """The whole published model, for files of its full layout.

    Raises:
        InputError: a number of MTP layers that the model does not have.
    """
    full = published()
    if mtp not in (0, full.num_nextn_predict_layers):
        raise InputError(f"{mtp} MTP layers asked for; the published model has 3, or 0 without")
    return full if mtp else full.without_mtp()


def type_rule(name: str, config: ModelConfig) -> TypeOf:
    """The type of each tensor in a slice of that type.

    'q4_k_s' (that of the official file), 'q4_k_m' and 'q5_k_m' are llama.cpp's mixtures. Any other
    name is one type for all matrices. Norms, router, biases and divisors are F32.
    """
    if name in _MIXED:
        return mixture(name, config)
    base = block_type(name.upper())
    if not can_be_random(base.name):
        raise InputError(f"blocks of type {base.name} cannot be made at random")

    def type_of(spec: TensorSpec) -> str:
        if spec.stays_f32 or len(spec.shape) == 1:
            return "F32"
        return "F16" if spec.shape[-1] % base.block_values else base.name

    return type_of


def write_random(
    config: ModelConfig,
    out: Path,
    file_type: str,
    seed: int,
    progress: Progress | None = None,
    sparse: bool = False,
) -> None:
    """Write a random checkpoint of any size: a .gguf file, or a Hugging Face folder.

    Args:
        file_type: one of `TYPES` for GGUF; 'bf16', 'f16' or 'f32' for a folder.
        sparse: GGUF only: the embedding table and what stays F32 (norms, routers) are written, so
            that tokens choose experts as ever; all other tensors are holes that read as zeros.

    Raises:
        InputError: unknown type, or the output cannot be written.
    """
    if sparse and out.suffix != ".gguf":
        raise InputError(f"{out}: only .gguf files can be sparse")
    if out.suffix == ".gguf":
        if file_type not in TYPES:
            raise InputError(f"type is {file_type!r}, expected one of {', '.join(TYPES)}")
        known = file_type in MIXTURES
        number = file_type_id(file_type) if known else _FILE_TYPE_IDS[file_type]
        write_blocks(
            config, out, number, type_rule(file_type, config),
            lambda spec, kind: _gguf_rows(config, spec, kind, seed),
            byte_vocabulary() if config.vocab_size >= SIZE else None, progress=progress,
            hole=_is_hole if sparse else lambda spec: False,
        )  # fmt: skip
        return
    if file_type not in STORED:
        raise InputError(f"type is {file_type!r}; a folder can hold {', '.join(STORED)}")
    kind = block_type(STORED[file_type])
    files = byte_tokenizer_files() if config.vocab_size >= SIZE else None
    write_hf(
        config, lambda spec: _hf_chunks(spec, kind, seed), out, file_type,
        extra_files=files, progress=progress,
    )  # fmt: skip


def _is_hole(spec: TensorSpec) -> bool:
    return not (spec.stays_f32 or len(spec.shape) == 1 or spec.key == "embed_tokens")


def _generator(spec: TensorSpec, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.gguf_name.encode())]))


def _gguf_rows(
    config: ModelConfig, spec: TensorSpec, kind: BlockType, seed: int
) -> Iterator[Array]:
    if spec.key == "rope_freqs":
        yield rope_divisors(config)
    elif spec.stays_f32:
        for chunk in random_chunks(spec, seed):
            yield np.ascontiguousarray(chunk + np.float32(spec.plus_one))
    else:
        rows, values = spec.elements // spec.shape[-1], spec.shape[-1]
        yield from random_rows(kind, rows, values, weight_std(spec), _generator(spec, seed))


def _hf_chunks(spec: TensorSpec, kind: BlockType, seed: int) -> Iterator[Array]:
    if len(spec.shape) == 1:
        yield from random_chunks(spec, seed)
        return
    rows, values = spec.elements // spec.shape[-1], spec.shape[-1]
    assert kind.plain is not None
    for part in random_rows(kind, rows, values, weight_std(spec), _generator(spec, seed)):
        yield part.view(kind.plain)

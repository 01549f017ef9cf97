"""Seeded random checkpoints: small ones in which every feature of the architecture bites.

Weights are scaled so that each block's output has about unit variance; the values of a tensor
depend only on the seed and the tensor's name.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.hf_write import DEFAULT_SHARD_BYTES, Progress, write_hf
from refimpl.config import FULL, SLIDING, LayerKind, ModelConfig, RopeScaling
from refimpl.inventory import TensorSpec, inventory
from refimpl.text.byte_tokenizer import SIZE, byte_tokenizer_files
from refimpl.text.tokenizer import from_hf
from refimpl.text.vocabulary import Vocabulary

Array = NDArray[Any]


def tiny_a() -> ModelConfig:
    """Nine layers as in the published pattern, 16 experts of which 4, window 16, three MTP layers.

    llama3 scaling keeps, blends and halves frequencies at 64 positions; the clamps are low enough
    to be hit by unit-variance activations; query heads 4 (full) and 6 (sliding).
    """
    kinds = _pattern(9, 3)
    return ModelConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=9,
        num_nextn_predict_layers=3,
        vocab_size=320,
        num_attention_heads=4,
        num_attention_groups=2,
        head_dim=32,
        sliding_attention_heads=6,
        sliding_window=16,
        layer_types=kinds,
        rope_theta=tuple(1e4 if k == FULL else 1e3 for k in kinds),
        partial_rotary_factors=tuple(0.5 if k == FULL else 1.0 for k in kinds),
        rope_scaling=RopeScaling(2.0, 64, 1.0, 8.0),
        moe_layers=tuple(range(2, 9)),
        moe_num_experts=16,
        moe_top_k=4,
        moe_intermediate_size=32,
        share_expert_dim=32,
        moe_router_scaling_factor=3.0,
        swiglu_limits=(0.0,) * 7 + (0.75, 0.75) + (0.0,) * 3,
        swiglu_limits_shared=(0.0,) * 8 + (0.5,) + (0.0,) * 3,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def tiny_b() -> ModelConfig:
    """Unlike `tiny_a` in every size: all experts selected, fewer sliding than full query heads."""
    kinds = _pattern(6, 2)
    return ModelConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=6,
        num_nextn_predict_layers=2,
        vocab_size=384,
        num_attention_heads=6,
        num_attention_groups=1,
        head_dim=64,
        sliding_attention_heads=4,
        sliding_window=8,
        layer_types=kinds,
        rope_theta=tuple(5e5 if k == FULL else 1e2 for k in kinds),
        partial_rotary_factors=tuple(0.5 if k == FULL else 1.0 for k in kinds),
        rope_scaling=RopeScaling(4.0, 128, 1.0, 16.0),
        moe_layers=tuple(range(1, 6)),
        moe_num_experts=8,
        moe_top_k=8,
        moe_intermediate_size=64,
        share_expert_dim=96,
        moe_router_scaling_factor=2.5,
        swiglu_limits=(0.0,) * 4 + (0.5, 1.0) + (0.0,) * 2,
        swiglu_limits_shared=(0.0,) * 5 + (0.75,) + (0.0,) * 2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=(1, 2),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny_a": tiny_a, "tiny_b": tiny_b}

_GAIN = {
    "o_proj": 2.0,
    "down_proj": 1.7,
    "experts.down": 1.7,
    "shared.down": 1.7,
    "lm_head": 3.0,
    "shared_head.output": 3.0,
}
_NORM_STD = 0.2
_ROUTER_BIAS_STD = 0.2  # about the spread of sigmoid(z): large enough to change the selection
_ROWS_PER_CHUNK = 4096


def synthesize(
    config: ModelConfig,
    seed: int,
    out_dir: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a seeded random checkpoint folder (config.json, safetensors, a byte tokenizer).

    The tokenizer (see `refimpl.text.byte_tokenizer`) is left out if the vocabulary is too small.

    Args:
        dtype: 'bf16', 'f16', 'f32' or 'fp8'; the values are drawn in float32 and rounded to it.

    Raises:
        InputError: `out_dir` exists already or cannot be written, or unknown dtype.
    """
    return write_hf(
        config,
        lambda tensor: random_chunks(tensor, seed),
        Path(out_dir),
        dtype,
        max_shard_bytes,
        byte_tokenizer_files() if config.vocab_size >= SIZE else None,
        progress,
    )


def byte_vocabulary() -> Vocabulary:
    """The vocabulary of the byte tokenizer, for files that hold it in their metadata."""
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in byte_tokenizer_files().items():
            (Path(folder) / name).write_bytes(contents)
        return from_hf(Path(folder)).vocabulary


def random_weights(config: ModelConfig, seed: int) -> dict[str, Array]:
    """All tensors of a small model in float32 by Hugging Face name, norms zero-centred."""
    return {
        t.hf_name: np.concatenate(list(random_chunks(t, seed))).reshape(t.shape)
        for t in inventory(config)
    }


def random_chunks(tensor: TensorSpec, seed: int) -> Iterator[Array]:
    """Values of one tensor in float32, along its first axis (one expert at a time if stacked)."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.hf_name.encode())])
    std = weight_std(tensor)
    step = 1 if tensor.is_stacked else _ROWS_PER_CHUNK
    for start in range(0, tensor.shape[0], step):
        n = min(step, tensor.shape[0] - start)
        yield rng.standard_normal((n, *tensor.shape[1:]), dtype=np.float32) * np.float32(std)


def weight_std(tensor: TensorSpec) -> float:
    """Standard deviation of a tensor's weights, such that blocks give about unit variance."""
    if tensor.plus_one:
        return _NORM_STD
    if tensor.key == "router_bias":
        return _ROUTER_BIAS_STD
    if tensor.key == "embed_tokens":
        return 1.0
    return _GAIN.get(tensor.key, 1.0) / math.sqrt(tensor.shape[-1])


def _pattern(trunk: int, mtp: int) -> tuple[LayerKind, ...]:
    """Full at every fourth layer, sliding elsewhere and in the MTP layers."""
    return tuple(FULL if i % 4 == 0 and i < trunk else SLIDING for i in range(trunk + mtp))

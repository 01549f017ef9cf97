"""Small checkpoints that tests of several rooms and the fuzzer use, and how their bytes change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from refimpl.config import FULL, SLIDING, ModelConfig, RopeScaling


def micro(**changes: Any) -> ModelConfig:
    """The smallest model with every kind of tensor: dense full, MoE sliding, one MTP layer."""
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        vocab_size=288,
        num_attention_heads=2,
        num_attention_groups=1,
        head_dim=32,
        sliding_attention_heads=3,
        sliding_window=4,
        layer_types=(FULL, SLIDING, SLIDING),
        rope_theta=(1e4, 1e3, 1e3),
        partial_rotary_factors=(0.5, 1.0, 1.0),
        rope_scaling=RopeScaling(2.0, 64, 1.0, 8.0),
        moe_layers=(1,),
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        moe_router_scaling_factor=3.0,
        swiglu_limits=(0.0, 0.75, 0.0),
        swiglu_limits_shared=(0.0, 0.5, 0.0),
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    return dataclasses.replace(config, **changes)


def safetensors_parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it of a folder's one safetensors file."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite_safetensors(folder: Path, fields: dict[str, Any], body: bytes) -> None:
    """Write the file anew from a header and bytes, whether or not they fit together."""
    text = json.dumps(fields).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)

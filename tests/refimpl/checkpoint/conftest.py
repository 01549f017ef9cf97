"""Tiny checkpoints that the tests of this room share, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.config import FULL, SLIDING, ModelConfig, RopeScaling

SEED = 5


@pytest.fixture(scope="session")
def micro() -> ModelConfig:
    """The smallest model with every kind of tensor: dense full, MoE sliding, one MTP layer."""
    return ModelConfig(
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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, micro: ModelConfig):
    """made(name, form) gives the path of a checkpoint, made on first use.

    `name` is a preset or 'micro'; `form` 'hf-bf16', 'hf-f32', ... or a GGUF type such as 'q4_0',
    which is converted from 'hf-f32'.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    def path(name: str, form: str) -> Path:
        if form.startswith("hf-"):
            out = root / name / form
            if not out.exists():
                config = micro if name == "micro" else PRESETS[name]()
                synthesize(config, SEED, out, form.removeprefix("hf-"))
            return out
        out = root / name / f"{form}.gguf"
        if not out.exists():
            convert(path(name, "hf-f32"), out, form)
        return out

    return path

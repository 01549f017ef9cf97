"""Records parameter counts of other decoders as transformers builds them.

Each family of `hwmodel.hf_config` is built on torch's meta device (no memory) from its default
configuration, and rivals of Step 3.5 Flash from their published sizes; the parameters are counted
by part and written, with the configuration, to model_shapes.json:

    python tests/golden/make_model_shapes.py

Needs torch and transformers (5.23), which neither the packages nor the tests do.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe",
    "glm_moe_dsa",
    "glm4_moe_lite",
    "minimax_m2",
    "mimo_v2_flash",
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "llama4_text",
    "ernie4_5_moe",
    "cohere2",
    "seed_oss",
    "phi3",
)
_SPARSE = [0] * 3 + [1] * 57  # fmt: skip
# Published sizes that differ from the family's defaults (config.json of each repository).
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "kimi-k2": ("deepseek_v3", {
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
        "first_k_dense_replace": 1, "vocab_size": 163840, "n_group": 1, "topk_group": 1,
        "max_position_embeddings": 131072,
    }),
    "deepseek-v2-lite": ("deepseek_v2", {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "q_lora_rank": None, "max_position_embeddings": 163840,
    }),
    "glm-4.7": ("glm4_moe", {
        "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92,
        "num_attention_heads": 96, "n_routed_experts": 160, "moe_intermediate_size": 1536,
        "first_k_dense_replace": 3, "vocab_size": 151552, "head_dim": 128, "attention_bias": True,
        "max_position_embeddings": 202752,
    }),
    "deepseek-v4-flash": ("deepseek_v4", {
        "compress_ratios": [0, 0, *(4 if i % 2 == 0 else 128 for i in range(2, 43))],
    }),
    "minimax-m3": ("minimax_m3_vl_text", {
        "moe_layer_freq": _SPARSE, "sparse_attention_config": {"sparse_attention_freq": _SPARSE},
    }),
    "qwen3.8-flash-next": ("qwen4_exp_text", {
        "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24,
        "linear_num_value_heads": 48, "moe_intermediate_size": 640,
        "shared_expert_intermediate_size": 640, "indexer_n_heads": 4, "indexer_kv_heads": 1,
        "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4,
        "ple_layer_ids": [2], "ple_embed_dim": 2560, "split_ngram_parts": 128,
        "eos_token_id": 248044, "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        },
    }),
}  # fmt: skip
DROPPED = (
    "output_",
    "return_",
    "id2label",
    "label2id",
    "_",
    "problem",
    "transformers",
    "architect",
)
PARTS = ("embedding", "attention", "routed", "other")
HERE = Path(__file__).parent


def part_of(name: str) -> str:
    """The part of the model that a parameter of transformers belongs to."""
    if "embed_tokens" in name or name.startswith("lm_head") or "ngram_embedding" in name:
        return "embedding"
    if "_hc." in name or "hyper_connection" in name:
        return "other"
    if ".experts." in name and "shared" not in name and "bias" not in name:
        return "routed"
    if "attn" in name and "norm" not in name:
        return "attention"
    return "other"


def count(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Configuration and parameters of one model."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**changes)
    with torch.device("meta"):
        if family == "minimax_m3_vl_text":  # its class for text alone has no mapping
            from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as code

            model = code.MiniMaxM3VLForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    parts = dict.fromkeys(PARTS, 0)
    for name, p in model.named_parameters():
        parts[part_of(name)] += p.numel()
    stated = {
        k: v
        for k, v in config.to_dict().items()
        if v is not None and not k.startswith(DROPPED) and not isinstance(v, dict)
    }
    return {"config": stated, "parameters": sum(parts.values()), "parts": parts}


def main() -> None:
    warnings.filterwarnings("ignore")
    import transformers

    found = {name: count(name, {}) for name in FAMILIES}
    found |= {name: count(family, changes) for name, (family, changes) in PUBLISHED.items()}
    record = {
        "source": f"transformers {transformers.__version__}, meta device",
        "command": "python tests/golden/make_model_shapes.py",
        "models": found,
    }
    text = json.dumps(record, indent=None, separators=(",", ":"))
    text = text.replace('},"parameters"', '},\n"parameters"').replace('}},"', '}},\n"')
    (HERE / "model_shapes.json").write_text(text + "\n", encoding="utf-8")
    for name, row in found.items():
        print(f"{name:20} {row['parameters'] / 1e9:9.3f} B  {row['parts']}")


if __name__ == "__main__":
    main()

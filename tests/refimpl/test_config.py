"""The published model's exact counts, and every way a config.json is written."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from refimpl.config import FULL, SLIDING, ModelConfig, published
from refimpl.config_gguf import from_gguf, to_gguf
from refimpl.config_io import from_hf, load_hf_config, to_hf
from refimpl.errors import CheckpointError, ConfigError, RefimplError
from refimpl.inventory import active_parameters, gguf_inventory, inventory, parameters


def test_published_counts_are_exact() -> None:
    c = published()
    assert parameters(c.without_mtp()) == 196_956_130_368
    assert parameters(c) == 199_384_301_376
    assert active_parameters(c) == 10_931_395_840
    assert active_parameters(c, head=True) == 11_459_353_856
    assert len(inventory(c)) == 804
    assert len(gguf_inventory(c.without_mtp())) == 754


def test_inventory_names_are_unique_and_roles_add_up() -> None:
    tensors = gguf_inventory(published())
    assert len({t.gguf_name for t in tensors}) == len(tensors)
    assert len({(t.key, t.layer) for t in tensors}) == len(tensors)
    mtp = sum(t.elements for t in tensors if t.role == "mtp")
    assert mtp == 2_428_171_008
    head = [t for t in tensors if t.key == "shared_head.output"]
    assert head[0].hf_name == "model.layers.45.transformer.shared_head.output.weight"
    assert head[0].gguf_name == "blk.45.nextn.shared_head_head.weight"


def test_published_layers() -> None:
    c = published()
    assert [s.index for s in c.layers if s.kind == FULL] == list(range(0, 45, 4))
    assert {s.num_attention_heads for s in c.layers if s.kind == SLIDING} == {96}
    full, sliding = c.layers[0], c.layers[47]
    assert (full.rotary_dim, full.window, full.rope_scaling is not None) == (64, None, True)
    assert (sliding.rotary_dim, sliding.window, sliding.rope_scaling) == (128, 512, None)
    assert [s.index for s in c.layers if s.swiglu_limit == 7.0] == [43, 44]
    assert [s.index for s in c.layers if s.swiglu_limit_shared == 16.0] == [44]


def test_hf_round_trip() -> None:
    assert from_hf(json.loads(json.dumps(to_hf(published())))) == published()


def hf() -> dict[str, Any]:
    return copy.deepcopy(to_hf(published()))


def test_lists_without_mtp_entries_mean_the_same() -> None:
    data = hf()
    for key in ("layer_types", "rope_theta", "partial_rotary_factors"):
        data[key] = data[key][:45]
    for key in ("swiglu_limits", "swiglu_limits_shared"):
        data[key] = data[key][:45]
    assert from_hf(data) == published()


def test_step_3_7_nesting() -> None:
    data = {"model_type": "step3p7", "text_config": hf(), "vision_config": {}}
    assert from_hf(data) == published()


def test_absent_and_null_fields_take_defaults() -> None:
    data = hf()
    for key in ("rms_norm_eps", "eos_token_id", "bos_token_id", "sink", "yarn_only_types"):
        del data[key]
    data["rope_scaling"] = None
    data["swiglu_limits"] = None
    c = from_hf(data)
    assert (c.rms_norm_eps, c.rope_scaling, c.eos_token_id) == (1e-5, None, ())
    assert set(c.swiglu_limits) == {0.0}


def test_scalar_theta_is_used_on_every_layer() -> None:
    assert set(from_hf({**hf(), "rope_theta": 10000}).rope_theta) == {10000.0}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 63}, "num_attention_heads"),
        ({"moe_top_k": 289}, "moe_top_k"),
        ({"layer_types": ["full_attention"] * 44}, "layer_types"),
        ({"layer_types": ["linear"] * 48}, "layer_types"),
        ({"rope_theta": [1e4] * 12}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"moe_layers_enum": "3,4,99"}, "moe_layers_enum"),
        ({"moe_layers_enum": "a,b"}, "moe_layers_enum"),
        ({"moe_layers_enum": "3,3"}, "moe_layers_enum"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"eos_token_id": [1, 200000]}, "eos_token_id"),
        ({"partial_rotary_factors": 0.3}, "partial_rotary_factors"),
        ({"swiglu_limits": [-7.0] * 48}, "swiglu_limits"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 0.5}}, "rope_scaling"),
        ({"moe_router_activation": "softmax"}, "moe_router_activation"),
        ({"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "llama"}, "model_type"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_other_setting": {"head_dim": 64}}, "attention_other_setting.head_dim"),
        ({"rope_parameters": 5}, "rope_parameters"),
    ],
)
def test_contradictions_name_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf({**hf(), **change})
    assert error.value.field == field
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lacking", ["rope_theta", "rope_scaling"])
def test_rope_settings_in_another_spelling_are_not_passed_over(lacking: str) -> None:
    data = {**hf(), "rope_parameters": {"full_attention": {"rope_theta": 5e6}}}
    assert from_hf(data) == published()
    del data[lacking]
    with pytest.raises(ConfigError, match=f"replaces {lacking}") as error:
        from_hf(data)
    assert error.value.field == "rope_parameters"


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hf_config(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_hf_config(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_hf_config(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_hf_config(path)


def gguf_keys(c: ModelConfig) -> dict[str, Any]:
    tokens = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    return {"general.architecture": "step35", **to_gguf(c), **tokens}


def test_gguf_round_trip() -> None:
    c = dataclasses.replace(published(), rope_scaling=None, eos_token_id=(1,))
    assert from_gguf(gguf_keys(c), c.vocab_size) == c


def test_gguf_refusals() -> None:
    c = published()
    keys = gguf_keys(c)
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        from_gguf({**keys, "general.architecture": "llama"}, c.vocab_size)
    broken: list[tuple[str, Any]] = [
        ("step35.block_count", None),
        ("step35.block_count", 47),
        ("step35.attention.head_count", [64] * 47),
        ("step35.attention.head_count_kv", [8] * 47 + [4]),
        ("step35.attention.sliding_window_pattern", "yes"),
        ("step35.expert_gating_func", 1),
        ("step35.rope.freq_base", "x"),
    ]
    for key, value in broken:
        with pytest.raises(RefimplError):
            from_gguf({**keys, key: value}, c.vocab_size)


def test_gguf_cannot_express_every_rotary_factor() -> None:
    c = dataclasses.replace(published(), partial_rotary_factors=(1.0,) * 48)
    with pytest.raises(ConfigError, match="partial_rotary_factors"):
        to_gguf(c)

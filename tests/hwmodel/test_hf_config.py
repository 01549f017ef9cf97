"""Other models from their config.json: counts equal those of transformers' own modules."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hwmodel.catalogue import find_model, load_model, shape_of_facts
from hwmodel.cli import main
from hwmodel.errors import RequestError, UnknownNameError
from hwmodel.hf_config import facts_of
from hwmodel.memory import kv_bytes
from hwmodel.model import ModelShape
from hwmodel.operations import draft_bytes, mtp_bytes, step_counts
from hwmodel.quant import load_quant

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())
MODELS: dict[str, dict[str, Any]] = RECORD["models"]
# The same model in hwmodel/models and in the record.
SHIPPED = {
    "deepseek-v3": "deepseek_v3", "deepseek-v3.2": "deepseek_v32", "glm-5": "glm_moe_dsa",
    "kimi-k2": "kimi-k2", "glm-4.7-flash": "glm4_moe_lite", "deepseek-v2-lite": "deepseek-v2-lite",
    "mimo-v2-flash": "mimo_v2_flash", "minimax-m2": "minimax_m2", "gpt-oss-120b": "gpt_oss",
    "glm-4.5": "glm-4.7", "qwen3-next-80b-a3b": "qwen3_next",
    "deepseek-v4-flash": "deepseek-v4-flash", "minimax-m3": "minimax-m3",
    "qwen3.8-flash-next": "qwen3.8-flash-next",
}  # fmt: skip


def _shape(name: str) -> ModelShape:
    return shape_of_facts(facts_of(MODELS[name]["config"], name))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    """Biases and norms of heads are not counted: at most 0.04 % of the whole."""
    shape, parts, config = _shape(name), MODELS[name]["parts"], MODELS[name]["config"]
    assert shape.parameters == pytest.approx(MODELS[name]["parameters"], rel=4e-4)
    by = shape.parameters_by_role
    assert by.get("routed", 0) == parts["routed"]
    tables = by["embedding"] + by.get("head", 0)  # hash tables of n-grams have prime sizes
    assert tables == pytest.approx(parts["embedding"], rel=1e-4 if "ngram_size" in config else 0)
    assert by["attention"] == pytest.approx(parts["attention"], rel=4e-4)


@pytest.mark.parametrize(("name", "recorded"), SHIPPED.items())
def test_a_shipped_neighbour_is_the_same_model(name: str, recorded: str) -> None:
    assert load_model(name).parameters == pytest.approx(MODELS[recorded]["parameters"], rel=1e-3)


def test_mla_caches_one_latent_for_all_heads() -> None:
    shape = _shape("deepseek_v3")
    assert kv_bytes(shape, 1000, "f16") == 2 * 1000 * 61 * (512 + 64)
    (group,) = shape.attention
    assert (group.qk_values, group.pv_values) == (128 * 576, 128 * 512)


def test_selected_keys_are_all_kept_but_few_are_read() -> None:
    """DeepSeek-V3.2: the indexer scores every key, attention reads 2,048 of them."""
    shape = _shape("deepseek_v32")
    assert kv_bytes(shape, 100_000, "f16") == 2 * 100_000 * 61 * (576 + 128)
    read = step_counts(shape, load_quant("FP8"), 100_000, 1).kv_values_read
    assert read == 61 * (576 * 2048 + 128 * 100_001)


def test_pooled_tokens_share_an_entry_of_the_cache() -> None:
    """DeepSeek-V4-Flash: 3,440 values a token beside its windows; the logs of the ds4 engine
    (speed-bench/m4_max.csv) count 13,764 bytes a token, of float32."""
    shape = load_model("deepseek-v4-flash")
    grown = kv_bytes(shape, 65536, "f32") - kv_bytes(shape, 32768, "f32")
    assert grown / 32768 == 4 * (21 * (512 + 128) / 4 + 20 * 512 / 128)
    assert grown == pytest.approx(926_033_292 - 475_014_540, rel=1e-3)
    read = step_counts(shape, load_quant("Q4_K_M"), 65535, 1).kv_values_read
    pooled = 21 * (512 * 512 + 65536 / 4 * 128) + 20 * 65536 / 128 * 512
    assert read == 43 * 128 * 512 + pooled


def test_an_indexer_beside_grouped_heads_selects_blocks() -> None:
    """MiniMax-M3: three layers read every key, the others 2,048 and one index key of each."""
    shape = load_model("minimax-m3")
    read = step_counts(shape, load_quant("FP8"), 99_999, 1).kv_values_read
    assert read == 3 * 1024 * 100_000 + 57 * (1024 * 2048 + 128 * 100_000)
    assert kv_bytes(shape, 100_000, "f16") == 2 * 100_000 * (60 * 1024 + 57 * 128)


def test_a_table_of_n_grams_is_stored_and_not_multiplied() -> None:
    shape, bf16 = load_model("qwen3.8-flash-next"), load_quant("BF16")
    assert shape.parameters == pytest.approx(177e9, rel=0.01)
    assert shape.active_parameters == pytest.approx(6.6e9, rel=0.02)
    read = step_counts(shape, bf16, 0, 1).weight_bytes["embedding"]
    assert read == pytest.approx(2 * 2560, rel=0.01)


def test_sliding_layers_have_their_own_heads_and_window() -> None:
    shape = _shape("mimo_v2_flash")
    found = {(g.layers, g.kv_values, g.window) for g in shape.attention}
    assert found == {(9, 4 * (192 + 128), None), (39, 8 * (192 + 128), 129)}


def test_linear_layers_carry_a_state_of_constant_size() -> None:
    shape = _shape("qwen3_next")
    linear = next(g for g in shape.attention if g.window == 0)
    assert (linear.layers, linear.state_values) == (36, 32 * 128 * 128)
    counts = step_counts(shape, load_quant("BF16"), 0, 1, sequences=5)
    assert counts.state_bytes == 5 * 36 * linear.state_values * 4 * 2  # float32, read and written


def test_drafts_read_a_share_of_the_experts_and_the_heads_of_the_trunk() -> None:
    shape, bf16 = load_model("deepseek-v3"), load_quant("BF16")
    assert 2 * 11.2e9 < mtp_bytes(shape, bf16, 1) < 2 * 11.7e9
    head = 2 * 129280 * 7168
    assert head < draft_bytes(shape, bf16, 1) < head + 2 * 0.75e9
    assert draft_bytes(shape, bf16, 3) == pytest.approx(3 * draft_bytes(shape, bf16, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 4096"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"layer_types": ["mamba"] * 32}, "layer_types has 'mamba'"),
        ({"layer_types": ["full_attention"]}, "layer_types is no list of 32 entries"),
        ({"sliding_window": 512}, "no layer_types says for which layers"),
        ({"layer_types": [{}] * 32}, "layer_types has '{}'"),
        ({"attn_type_list": [[]]}, "attn_type_list mixes in layers"),
        ({"ple_layer_ids": 2}, "ple_layer_ids is 2, expected a list of layers"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern mixes in layers"),
        ({"model_type": "bert"}, "model_type 'bert' is an encoder, expected a decoder"),
        ({"is_encoder_decoder": True}, "is an encoder, expected a decoder"),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        facts_of({**MODELS["llama"]["config"], **change}, "x")


def test_names_files_and_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "config.json"
    file.write_text(json.dumps(MODELS["qwen3_moe"]["config"]))
    by_file, by_folder = find_model(str(file)), find_model(str(tmp_path / "own"))
    assert by_file.name == by_folder.name == "own"
    assert by_file.parameters == by_folder.parameters == _shape("qwen3_moe").parameters
    assert find_model("DeepSeek-R1").name == "deepseek-v3"
    with pytest.raises(UnknownNameError, match="kimi-k2"):
        find_model("kimi-k22")
    with pytest.raises(RequestError, match="no such model or file"):
        find_model(str(tmp_path / "none.json"))


def test_sizes_that_no_model_has_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    huge = {"intermediate_size": 1 << 32, "vocab_size": 1 << 32, "num_hidden_layers": 4096}
    file.write_text(json.dumps({**MODELS["llama"]["config"], **huge}))
    with pytest.raises(RequestError, match=r"make 2\.2e\+17 parameters, expected 1e\+14 at most"):
        find_model(str(file))


def test_a_dense_model_that_is_too_large_is_said_not_to_fit() -> None:
    words = ["plan", "--device", "m4max", "--count", "1", "--model", "llama-3.1-405b"]
    run = CliRunner().invoke(main, [*words, "--quant", "Q8_0"])
    assert run.exit_code == 1, run.output
    assert "no" in run.output


def test_plan_for_another_model_names_it_and_leaves_out_what_is_steps_own() -> None:
    run = CliRunner().invoke(
        main, ["plan", "--device", "h200", "--count", "8", "--model", "deepseek-v3.2"]
    )
    assert run.exit_code == 0, run.output
    assert run.output.startswith("deepseek-v3.2 on 8x NVIDIA H200")
    assert "FP8, 674.0 GB" in run.output
    assert "step3p5" not in run.output and "Step-3.5" not in run.output

"""Parts of a step that only some models and engines have: counts with a source."""

import dataclasses

import pytest

from hwmodel.catalogue import load_model
from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.launches import extra_launches
from hwmodel.model import step_shape
from hwmodel.operations import step_counts
from hwmodel.parts import Part
from hwmodel.predict import step_parts
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, RunConfig, Workload

POOLED = "deepseek-v4-flash"


def run_of(model: str, engine: str, device: str, workload: Workload) -> RunConfig:
    return RunConfig(
        model=load_model(model),
        quant=load_quant("IQ2-experts"),
        devices=(DeviceCount(load_device(device), 1),),
        engine=EngineChoice(load_engine(engine)),
        workload=workload,
    )


def parts_of(run: RunConfig, quantity: str) -> dict[str, Part]:
    parts, _ = step_parts(run, quantity)  # type: ignore[arg-type]
    return {p.name: p for p in parts}


def test_prompts_meet_latents_or_keys_of_their_own_heads() -> None:
    """Kimi K2: 64 heads, latents of 512 + 64, heads of 128 + 64 and values of 128."""
    shape, quant = load_model("kimi-k2"), load_quant("BF16")
    pairs = 1000 * 1001 / 2
    folded = step_counts(shape, quant, 0, 1000, logit_rows=1)
    heads = step_counts(shape, quant, 0, 1000, logit_rows=1, unfold=True)
    assert folded.multiply_adds["scores"] == 61 * 64 * (576 + 512) * pairs
    assert heads.multiply_adds["scores"] == 61 * 64 * (192 + 128) * pairs
    assert (folded.shared_scores > 0, heads.shared_scores) == (True, 0)
    assert heads.kv_values_read == folded.kv_values_read


def test_servers_multiply_latents_out_in_prompts_and_others_do_not() -> None:
    ways = {name: load_engine(name).latent_prompts for name in ("vllm", "sglang", "llama.cpp")}
    assert ways == {"vllm": "heads", "sglang": "heads", "llama.cpp": "latent"}
    work = Workload(prompt_tokens=8192)
    plain = parts_of(run_of("kimi-k2", "llama.cpp", "h100", work), "prefill_tok_s")
    served = parts_of(run_of("kimi-k2", "vllm", "h100", work), "prefill_tok_s")
    assert served["attention"].flop == pytest.approx(plain["attention"].flop * 320 / 1088)


def test_selected_latents_stay_as_they_are() -> None:
    """DeepSeek-V3.2 gathers the chosen latents: nothing is multiplied out."""
    shape, quant = load_model("deepseek-v3.2"), load_quant("BF16")
    found = [step_counts(shape, quant, 0, 4096, unfold=u).multiply_adds for u in (False, True)]
    assert found[0]["scores"] == found[1]["scores"]


def test_an_indexer_reads_its_queries_again_for_every_tile_of_keys() -> None:
    """ds4: 64 heads of 128 float32 values for every 32 keys, 1 KB for a token and a key."""
    work = Workload(prompt_tokens=2048, depth=30720)
    parts = parts_of(run_of(POOLED, "ds4", "m4max", work), "prefill_tok_s")
    pairs = (2048 * 30720 + 2048 * 2049 / 2) / 4
    assert parts["indexer queries"].bytes == pytest.approx(21 * 1024 * pairs)
    other = parts_of(run_of(POOLED, "llama.cpp", "m4max", work), "prefill_tok_s")
    assert "indexer queries" not in other


def test_hyper_connections_pools_and_indexers_are_launches_of_their_own() -> None:
    """43 layers with hyper-connections, 41 with pools, 21 of them with an indexer."""
    shape = load_model(POOLED)
    assert extra_launches(shape) == 43 * 10 + 41 * 5 + 21 * 6
    assert extra_launches(step_shape()) == 45 * 3  # a gate on the heads of every layer
    assert extra_launches(load_model("kimi-k2")) == 0
    plain = dataclasses.replace(
        shape, tensors=tuple(t for t in shape.tensors if t.role != "residual")
    )
    run = run_of(POOLED, "ds4", "m4max", Workload(depth=2048))
    found = [
        parts_of(r, "decode_tok_s")["overhead"].base_s
        for r in (run, dataclasses.replace(run, model=plain))
    ]
    assert found[0] - found[1] == pytest.approx(43 * 10 * 10e-6)

"""The rate of matrix products: what the kernel computes in, not what the weights are stored in."""

import dataclasses

import pytest

from hwmodel import placement as place
from hwmodel.arithmetic import products
from hwmodel.catalogue import load_model
from hwmodel.devices import load_device
from hwmodel.effects import context_of
from hwmodel.engines import load_engine
from hwmodel.parts import Part
from hwmodel.predict import predict, step_parts
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig, Workload


def run_of(
    engine: str, device: str, quant: str, date: str = "2026-08", count: int = 1,
    model: str = "llama-3-8b", **placed: float,
) -> RunConfig:  # fmt: skip
    return RunConfig(
        model=load_model(model),
        quant=load_quant(quant),
        devices=(DeviceCount(load_device(device), count),),
        engine=EngineChoice(load_engine(engine), date=date),
        placement=Placement(split="layer" if count > 1 else "single", **placed),  # type: ignore[arg-type]
        workload=Workload(prompt_tokens=4096, micro_batch=512),
    )


def rate_of(run: RunConfig) -> float:
    """FLOP/s before any run is seen."""
    how = products(run, place.machine(run))
    return how.peak * how.share


def parts_of(run: RunConfig, quantity: str = "prefill_tok_s") -> dict[str, Part]:
    return {p.name: p for p in step_parts(run, quantity)[0]}  # type: ignore[arg-type]


def test_llama_cpp_multiplies_blocks_as_8_bit_integers_on_nvidia() -> None:
    card = load_device("rtx4090").flop_per_s
    for quant in ("Q4_K_S", "Q8_0", "IQ4_XS", "MXFP4"):  # the card has no FP4
        run = run_of("llama.cpp", "rtx4090", quant)
        assert products(run, place.machine(run)).peak == card["int8"]
    run = run_of("llama.cpp", "rtx4090", "F16")
    assert products(run, place.machine(run)).peak == card["int8"] / 2 > card["fp16"]
    metal = run_of("llama.cpp", "m4max", "Q4_K_S")
    assert products(metal, place.machine(metal)).peak == load_device("m4max").flop_per_s["fp16"]


def test_builds_before_july_2024_write_the_weights_out_in_16_bits() -> None:
    old, new = (run_of("llama.cpp", "l40s", "Q4_K_M", d) for d in ("2024-05-01", "2024-07-01"))
    assert rate_of(old) == rate_of(new)  # half the rate at twice the share
    extra = parts_of(old)["unpacked weights"]
    chunks = 4096 / 512
    assert extra.bytes == pytest.approx(chunks * 4 * old.model.parameters)
    assert "unpacked weights" not in parts_of(new)
    assert "unpacked weights" not in parts_of(run_of("llama.cpp", "l40s", "F16", "2024-05-01"))


def test_blackwell_multiplies_mxfp4_as_stored_since_2026() -> None:
    """1.27 times as fast as 8-bit integers (github.com/ggml-org/llama.cpp/pull/17906)."""
    before, since = (run_of("llama.cpp", "dgx-spark", "MXFP4", d) for d in ("2025-12", "2026-01"))
    assert rate_of(since) / rate_of(before) == pytest.approx(1.3, rel=0.03)
    blocks = run_of("llama.cpp", "dgx-spark", "Q8_0")
    assert rate_of(blocks) == rate_of(before)


def test_servers_compute_nvfp4_as_stored_where_the_card_can() -> None:
    for device, kind in (("b200", "fp4"), ("h100", "fp16")):
        run = run_of("vllm", device, "NVFP4")
        assert products(run, place.machine(run)).peak == load_device(device).flop_per_s[kind]


def test_experts_in_host_memory_reach_llama_cpp_over_the_link_alone() -> None:
    """ktransformers packs them first; the sum of both is what its published tables show."""
    direct, packed = (
        parts_of(
            dataclasses.replace(
                run_of(e, "rtx3090", "MXFP4", model="gpt-oss-120b", host_expert_share=0.7),
                workload=Workload(prompt_tokens=16384, micro_batch=16384),
            )
        )
        for e in ("llama.cpp", "ktransformers")
    )
    assert direct["host link"].base_s == packed["host link"].base_s > 0
    assert packed["host memory"].bytes == direct["host link"].bytes
    assert "host memory" not in direct


def test_chunks_follow_each_other_through_cards_only_where_all_weights_lie_on_them() -> None:
    """llama.cpp has no pipeline with tensors placed elsewhere (llama-context.cpp)."""
    whole, host = (
        run_of("llama.cpp", "rtx3090", "MXFP4", count=3, model="gpt-oss-120b", host_expert_share=s)
        for s in (0.0, 0.5)
    )
    gain = place.machine(whole).pipeline(8)
    assert gain > 1
    assert parts_of(host)["matrices"].base_s == pytest.approx(
        gain * parts_of(whole)["matrices"].base_s
    )


def test_two_dies_share_one_launch() -> None:
    ultra, single = (run_of("llama.cpp", d, "Q8_0") for d in ("m3-ultra", "m4max"))
    assert [place.machine(r).dies for r in (ultra, single)] == [2, 1]
    names = [
        {n for n, _ in parts_of(r, "decode_tok_s")["overhead"].features} for r in (ultra, single)
    ]
    assert "overhead/dies=apple" in names[0] - names[1]


def test_a_processor_launches_nothing() -> None:
    """Gates cost a GPU three launches a layer; a processor calls functions."""
    step = dataclasses.replace(
        run_of("llama.cpp", "m4max", "Q8_0"), model=load_model("step-3.5-flash")
    )
    bare = dataclasses.replace(
        step.model, tensors=tuple(t for t in step.model.tensors if t.kind != "attn_other")
    )
    on_cpu = dataclasses.replace(step, devices=(DeviceCount(load_device("desktop-ddr5"), 1),))
    for run, more in ((step, 45 * 3 * 10e-6), (on_cpu, 0.0)):
        other = dataclasses.replace(run, model=bare)
        assert context_of(run, place.machine(run)).group == "llama.cpp"
        found = [parts_of(r, "decode_tok_s")["overhead"].base_s for r in (run, other)]
        assert found[0] - found[1] == pytest.approx(more, abs=1e-12)


def short_prompt_over_two_processors() -> RunConfig:
    """They have much memory bandwidth, so three quarters of the experts are computed there."""
    run = run_of(
        "sglang-kt", "rtx4090-48g", "FP8", model="minimax-m2",
        host_expert_share=0.75, host_bandwidth_bytes_per_s=614e9,
    )  # fmt: skip
    return dataclasses.replace(run, workload=Workload(prompt_tokens=256, micro_batch=256))


def test_experts_that_the_host_computes_are_not_computed_again() -> None:
    short = short_prompt_over_two_processors()
    alone = dataclasses.replace(short, placement=Placement())
    found, whole = parts_of(short), parts_of(alone)
    assert found["host experts"].flop == pytest.approx(0.75 * whole["routed experts"].flop)
    assert found["routed experts"].flop == pytest.approx(0.25 * whole["routed experts"].flop)


def test_the_limit_of_experts_that_the_host_computes_knows_its_arithmetic() -> None:
    """What is read once for many tokens: the host is limited by computing, far below its memory."""
    short = short_prompt_over_two_processors()
    experts = parts_of(short)["host experts"]
    host = place.machine(short).host_flop_per_s
    assert experts.arithmetic_s == experts.flop / host > experts.peak_s
    found = predict(short, "prefill_tok_s")
    assert found.roofline == pytest.approx(256 / experts.arithmetic_s)
    assert (found.value or 0) < (found.roofline or 0)

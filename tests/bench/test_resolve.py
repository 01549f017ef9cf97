"""Rows of measured runs become configurations: stated facts used, unknown names reported."""

import dataclasses

import pytest

from bench.resolve import resolve
from bench.runs import RunRecord
from refimpl.benchmark.host import cpu_name
from refimpl.errors import RefimplError

ROW = RunRecord(
    id="X1", model="Step-3.5-Flash", total_params_b=196.81, active_params_b=11.0, quant="Q4_K_S",
    weights_gb=111.5, device="m4max-40core", n_devices=1, engine="llama.cpp",
    engine_version="Metal", mtp="none", batch_concurrency=1, prompt_tokens=2048,
    context_depth=2048, gen_tokens=128, decode_tok_s=48.5, prefill_tok_s=420.0,
    source_date="2026-02-13", fit_ok="yes", sweep="x",
)  # fmt: skip


def row(**changes: object) -> RunRecord:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]


def test_a_plain_row() -> None:
    run = resolve(ROW)
    assert run.model.name == "step-3.5-flash"
    assert run.devices[0].device.name == "m4max"
    assert run.engine.backend == "metal" and run.engine.date == "2026-02-13"
    assert run.workload.depth == 2048
    assert run.unknown == ()


def test_a_prompt_as_long_as_the_depth_started_from_an_empty_cache() -> None:
    assert resolve(ROW, "prefill_tok_s").workload.depth == 0
    at_depth = row(prompt_tokens=512, context_depth=8192)
    assert resolve(at_depth, "prefill_tok_s").workload.depth == 8192


def test_a_small_model_of_an_architecture_is_not_its_large_one() -> None:
    small = resolve(row(model="step35", total_params_b=0.02285, weights_gb=0.0142))
    assert small.model.parameters == pytest.approx(0.02285e9)
    assert any("of this size is not in the registry" in u for u in small.unknown)
    assert resolve(row(model="step35")).model.name == "step-3.5-flash"


def test_local_is_the_host_that_the_row_was_measured_on() -> None:
    own = row(device="local", extra={"host": f"{cpu_name()}, 2 threads"})
    assert resolve(own).devices[0].device.device_class == "cpu"
    theirs = row(device="local", extra={"host": "Some Other CPU, 2 threads"})
    with pytest.raises(RefimplError, match=r"'local' was 'Some Other CPU' where .* --device NAME"):
        resolve(theirs)


def test_measured_columns_are_never_read() -> None:
    other = row(decode_tok_s=1.0, prefill_tok_s=9e6, ttft_ms=5.0)
    assert repr(resolve(other)) == repr(resolve(ROW))


def test_fp8_of_this_model_is_its_experts_alone() -> None:
    assert resolve(row(quant="FP8", weights_gb=212.5)).quant.name == "FP8-experts"
    assert resolve(row(quant="FP8", model="Qwen3-32B", weights_gb=None)).quant.name == "FP8"


@pytest.mark.parametrize(
    ("interconnect", "engine", "split", "link"),
    [
        ("NVLink TP8", "vLLM", "tensor", "nvlink"),
        ("", "vLLM", "tensor", "nvlink"),
        ("PCIe layer split", "llama.cpp", "layer", "pcie"),
        ("", "llama.cpp", "layer", "nvlink"),
        ("200GbE RoCE TP2", "vLLM", "tensor", "network"),
    ],
)
def test_how_devices_share_the_model(interconnect: str, engine: str, split: str, link: str) -> None:
    from hwmodel.placement import machine

    run = resolve(row(device="h100-sxm", n_devices=8, interconnect=interconnect, engine=engine))
    assert run.placement.split == split
    assert machine(run).link_kind == link


@pytest.mark.parametrize(
    ("offload", "experts", "layers"),
    [
        ("none", 0.0, 0.0),
        ("cpu-moe dual-ch DDR5", 1.0, 0.0),
        ("n-cpu-moe 21", 0.5, 0.0),
        ("cpu-moe EPYC 9355, 28/128 experts per layer on GPU", 0.78125, 0.0),
        ("layer split 42% GPU", 0.0, 0.58),
        ("cpu only, one socket", 0.0, 0.0),
    ],
)
def test_offload_in_words(offload: str, experts: float, layers: float) -> None:
    place = resolve(row(device="rtx4090", offload=offload)).placement
    assert place.host_expert_share == pytest.approx(experts)
    assert place.host_layer_share == pytest.approx(layers)


def test_notes_state_micro_batch_and_cache_type() -> None:
    work = resolve(row(notes="llama-bench -b 2048 -ub 1024, q8_0 KV")).workload
    assert (work.micro_batch, work.kv_type) == (1024, "q8_0")
    assert resolve(row(notes="numbers")).workload.micro_batch is None


def test_unlike_cards_in_one_machine() -> None:
    run = resolve(row(device="4x MI50-32GB + 2x MI50-16GB", n_devices=6, quant="Q4_1"))
    assert run.device_count == 6


def test_an_unknown_quant_follows_from_its_size() -> None:
    run = resolve(row(quant="XQ5", weights_gb=120.0))
    assert "XQ5" in run.unknown[0]
    assert run.weights_bytes == 120e9


def test_an_unknown_model_follows_from_its_parameters() -> None:
    run = resolve(row(model="Nova-90B-A9B", total_params_b=90.0, active_params_b=9.0))
    assert run.model.parameters == pytest.approx(90e9, rel=1e-6)
    assert "Nova-90B-A9B" in run.unknown[0]


def test_an_unknown_engine_is_named_and_prediction_goes_on() -> None:
    assert "turbo9000" in resolve(row(engine="turbo9000")).unknown[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"device": "a box"},
        {"quant": "XQ5", "weights_gb": None},
        {"model": "Nova", "total_params_b": None, "active_params_b": None},
    ],
)
def test_what_cannot_be_had_is_refused_with_one_sentence(bad: dict[str, object]) -> None:
    with pytest.raises(RefimplError) as caught:
        resolve(row(**bad))
    assert "\n" not in str(caught.value)

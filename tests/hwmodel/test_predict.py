"""The one estimator: pure, monotone, honest about what it does not know."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodel.catalogue import load_model, model_names
from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.fit import Fit, load_fit
from hwmodel.model import shape_from_totals, step_shape
from hwmodel.predict import physical_limit, predict, step_parts
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig, Workload

NO_FIT = Fit()


def a_run(device: str = "m4max", quant: str = "Q4_K_S", **work: int) -> RunConfig:
    engine = "llama.cpp" if device in ("m4max", "dgx-spark", "rtx4090") else "vllm"
    backend = {"m4max": "metal"}.get(device, "cuda")
    return RunConfig(
        model=step_shape(),
        quant=load_quant(quant),
        devices=(DeviceCount(load_device(device)),),
        engine=EngineChoice(load_engine(engine), backend, date="2026-08"),
        workload=Workload(**work),  # type: ignore[arg-type]
    )


def decode(run: RunConfig, fit: Fit | None = None) -> float:
    found = predict(run, "decode_tok_s", fit).value
    assert found is not None
    return found


@pytest.mark.parametrize("fit", [NO_FIT, None], ids=["priors", "published fit"])
def test_decode_on_the_reference_machines_is_in_the_published_range(fit: Fit | None) -> None:
    """StepFun's tables: M4 Max 48 to 51 tok/s at depth 0, 38 to 40 at 32K; Spark 20 to 25."""
    assert 35 < decode(a_run("m4max", depth=0), fit) < 65
    assert 28 < decode(a_run("m4max", depth=32768), fit) < 50
    assert 17 < decode(a_run("dgx-spark", depth=0), fit) < 33


@given(st.integers(0, 250_000), st.integers(1, 12_000))
@settings(max_examples=30, deadline=None)
def test_deeper_is_never_faster(depth: int, more: int) -> None:
    assert decode(a_run(depth=depth + more)) < decode(a_run(depth=depth))


@given(st.sampled_from(["m4max", "dgx-spark", "h100", "rtx4090"]), st.integers(0, 200_000))
@settings(max_examples=25, deadline=None)
def test_a_band_contains_its_value_and_the_roofline_is_above(device: str, depth: int) -> None:
    found = predict(a_run(device, depth=depth))
    assert found.low is not None and found.value is not None and found.high is not None
    assert found.roofline is not None
    assert 0 < found.low < found.value < found.high
    assert found.value < found.roofline
    assert found.roofline == pytest.approx(
        physical_limit(a_run(device, depth=depth), "decode_tok_s")
    )


def test_terms_add_up_to_the_step() -> None:
    found = predict(a_run(depth=8192))
    assert found.value is not None
    assert sum(t.seconds for t in found.terms) == pytest.approx(1 / found.value)
    names = {t.name for t in found.terms}
    assert {"weights", "routed experts", "KV cache", "overhead"} <= names
    weights = sum(t.bytes for t in found.terms if t.name in ("weights", "routed experts"))
    assert weights == pytest.approx(6.785e9, rel=1e-3)
    assert found.limiting == "memory bandwidth"


def test_long_prompts_take_longer_than_in_proportion() -> None:
    short = predict(a_run(prompt_tokens=2048), "prefill_tok_s").value
    long = predict(a_run(prompt_tokens=131072), "prefill_tok_s").value
    assert short is not None and long is not None and long < short


def test_time_to_first_token_is_the_prompt_and_one_step() -> None:
    run = a_run(prompt_tokens=8192)
    first = predict(run, "ttft_s")
    prompt = predict(run, "prefill_tok_s").value
    step = predict(a_run(depth=8192)).value
    assert first.unit == "s" and first.value is not None and prompt and step
    assert first.value == pytest.approx(8192 / prompt + 1 / step, rel=1e-6)


def test_larger_micro_batches_stream_offloaded_experts_less_often() -> None:
    place = Placement(host_expert_share=1.0, host_bandwidth_bytes_per_s=96e9)
    speeds = []
    for size in (512, 2048, 8192):
        run = dataclasses.replace(
            a_run("rtx4090", prompt_tokens=16384, micro_batch=size), placement=place
        )
        speeds.append(predict(run, "prefill_tok_s").value or 0.0)
    assert speeds[0] < speeds[1] < speeds[2]


def test_offload_to_host_memory_is_bound_by_it() -> None:
    place = Placement(host_expert_share=1.0, host_bandwidth_bytes_per_s=96e9)
    run = dataclasses.replace(a_run("rtx4090", depth=0), placement=place)
    found = predict(run)
    assert found.limiting == "host memory"
    assert found.value is not None and 8 < found.value < 25  # published: 15 tok/s


def test_experts_on_disk_are_slower_than_in_memory() -> None:
    place = Placement(
        host_expert_share=0.2, host_bandwidth_bytes_per_s=96e9, ssd_share=0.8, ssd_bytes_per_s=5e9
    )
    found = predict(dataclasses.replace(a_run("rtx4090"), placement=place))
    assert found.value is not None and found.value < 4
    assert found.limiting == "disk"


def test_a_batch_gains_less_than_its_size() -> None:
    one, many = decode(a_run("h100", "BF16")), decode(a_run("h100", "BF16", concurrency=8))
    assert many < one < 8 * many


def test_drafts_pay_at_first_and_less_with_each() -> None:
    speeds = [decode(a_run(drafts=n, depth=4096)) for n in range(4)]
    assert speeds[1] > speeds[0]
    assert speeds[3] < speeds[1] + speeds[1] - speeds[0]


def test_drafts_that_are_never_accepted_lose() -> None:
    work = Workload(drafts=3, acceptance=(0.0, 0.0, 0.0))
    assert decode(dataclasses.replace(a_run(), workload=work)) < decode(a_run())


def test_early_builds_are_slower() -> None:
    run = a_run("dgx-spark")
    early = dataclasses.replace(run, engine=dataclasses.replace(run.engine, date="2026-02"))
    assert decode(early) < 0.95 * decode(run)


def test_unknown_names_widen_the_band_and_say_so() -> None:
    known, unknown = a_run(), dataclasses.replace(a_run(), unknown=("unknown engine 'x'",))
    one, other = predict(known), predict(unknown)
    assert other.status == "extrapolated" and "unknown engine 'x'" in other.reason
    assert other.value == one.value
    assert other.high is not None and one.high is not None and other.high > one.high


def test_a_blank_depth_is_short_with_a_wider_band() -> None:
    short = predict(a_run(depth=0))
    blank = predict(dataclasses.replace(a_run(), workload=Workload(depth=None)))
    assert blank.value == short.value
    assert blank.low is not None and short.low is not None and blank.low < short.low


def test_without_a_device_the_estimate_is_declined() -> None:
    found = predict(dataclasses.replace(a_run(), devices=()))
    assert found.status == "declined" and found.value is None and found.reason


def test_a_configuration_of_the_fit_is_calibrated_and_names_its_nearest_run() -> None:
    found = predict(a_run(depth=8192))
    assert found.status == "calibrated"
    assert found.nearest is not None and "m4max" in found.nearest.description
    assert abs(found.nearest.error) < 1


def test_priors_alone_say_that_nothing_was_measured() -> None:
    found = predict(a_run(), fit=NO_FIT)
    assert found.status == "extrapolated"
    assert "priors alone" in " ".join(found.provenance)


@pytest.mark.parametrize("name", model_names())
def test_every_known_model_adds_up(name: str) -> None:
    shape = load_model(name)
    assert shape.source
    assert 0 < shape.active_parameters <= shape.parameters * 1.001
    assert predict(dataclasses.replace(a_run(), model=shape)).value


def test_a_model_known_by_its_totals_alone() -> None:
    shape = shape_from_totals("x", 120e9, 10e9)
    assert shape.parameters == pytest.approx(120e9, rel=1e-6)
    assert shape.active_parameters == pytest.approx(10e9, rel=0.1)
    found = predict(dataclasses.replace(a_run(), model=shape))
    assert found.status == "extrapolated" and found.value


def test_effects_never_name_a_run_a_sweep_or_a_model() -> None:
    levels = {n.partition("/")[2].partition("=")[0] for n in load_fit().effects}
    assert levels <= {
        "all", "class", "group", "family", "class+group", "engine", "device", "quant",
        "class+quant", "age", "early", "depth", "type", "width", "parallel", "kind", "tokens",
        "speed", "dies",
    }  # fmt: skip
    kinds = {n for n in load_fit().effects if "/kind=" in n}
    assert {k.rpartition("=")[2] for k in kinds} <= {
        "mla", "linear", "compressed", "shared", "nvlink", "xgmi", "pcie", "network",
    }  # fmt: skip


def test_parts_are_finite_and_positive() -> None:
    for quantity in ("decode_tok_s", "prefill_tok_s", "ttft_s"):
        parts, amount = step_parts(a_run(prompt_tokens=4096, drafts=2), quantity)  # type: ignore[arg-type]
        assert amount > 0
        assert all(math.isfinite(p.base_s) and p.base_s >= 0 for p in parts)


def test_far_beyond_every_measured_run_is_an_extrapolation() -> None:
    engine = EngineChoice(load_engine("sglang"), "cuda")
    base = RunConfig(
        step_shape(), load_quant("FP8-experts"), (DeviceCount(load_device("h100"), 8),), engine,
        Placement(split="expert"), Workload(depth=2048),
    )  # fmt: skip
    assert predict(base).status == "calibrated"
    rack = dataclasses.replace(base, devices=(DeviceCount(load_device("h100"), 64),))
    found = predict(rack)
    assert found.status == "extrapolated" and "devices" in found.reason


def test_drafts_are_calibrated_only_where_drafting_was_measured() -> None:
    """Speed-ups were published for Apple machines, none for servers of data-centre cards."""

    def status(device: str, count: int, engine: str, drafts: int) -> str:
        known = load_engine(engine)
        run = RunConfig(
            model=step_shape(),
            quant=load_quant("Q4_K_S" if engine == "llama.cpp" else "FP8-experts"),
            devices=(DeviceCount(load_device(device), count),),
            engine=EngineChoice(known, known.backends[0], known.version, known.date),
            placement=Placement(split="single" if count == 1 else "expert"),
            workload=Workload(depth=1024, drafts=drafts),
        )
        return predict(run).status

    assert status("m4max", 1, "llama.cpp", 3) == "calibrated"
    assert status("h100", 8, "vllm", 0) == "calibrated"
    assert status("h100", 8, "vllm", 3) == "extrapolated"

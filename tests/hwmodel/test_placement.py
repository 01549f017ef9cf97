"""Which splits are legal, and the machine that a placement amounts to."""

import dataclasses

import pytest

from hwmodel.catalogue import load_model
from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.memory import kv_bytes, ledger
from hwmodel.model import step_shape
from hwmodel.placement import kv_heads, legal_counts, machine, refusal
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig, Workload
from refimpl.errors import InputError


def a_run(placement: Placement, count: int, device: str = "h100") -> RunConfig:
    return RunConfig(
        model=step_shape(),
        quant=load_quant("BF16"),
        devices=(DeviceCount(load_device(device), count),),
        engine=EngineChoice(load_engine("vllm")),
        placement=placement,
    )


def test_fp8_experts_cannot_be_cut_inside_their_scale_blocks() -> None:
    """1280 / TP must be a multiple of 128: TP 4 and 8 are invalid."""
    shape, fp8 = step_shape(), load_quant("FP8-experts")
    for count in (4, 8):
        assert "128" in (refusal(shape, fp8, "tensor", count) or "")
    assert legal_counts(shape, fp8, "tensor") == (1, 2)
    assert legal_counts(shape, load_quant("BF16"), "tensor") == (1, 2, 4, 8)


def test_query_heads_must_divide() -> None:
    assert "heads" in (refusal(step_shape(), load_quant("BF16"), "tensor", 3) or "")


def test_experts_divide_where_tensors_do_not() -> None:
    assert refusal(step_shape(), load_quant("FP8-experts"), "expert", 8) is None
    assert refusal(step_shape(), load_quant("FP8-experts"), "expert", 7) is not None


def test_tensor_parallel_adds_bandwidth_and_layer_split_does_not() -> None:
    one = machine(a_run(Placement(), 1)).bandwidth_bytes_per_s
    assert machine(a_run(Placement(split="tensor"), 4)).bandwidth_bytes_per_s == 4 * one
    assert machine(a_run(Placement(split="layer"), 4)).bandwidth_bytes_per_s == pytest.approx(one)


def test_unlike_devices_in_turn_have_the_harmonic_mean() -> None:
    devices = (DeviceCount(load_device("rtx4090"), 1), DeviceCount(load_device("rtx5090"), 1))
    run = RunConfig(
        step_shape(), load_quant("Q4_K_S"), devices, EngineChoice(load_engine("llama.cpp")),
        Placement(split="layer"),
    )  # fmt: skip
    slow, fast = (d.device.bandwidth_bytes_per_s for d in devices)
    assert slow < machine(run).bandwidth_bytes_per_s < fast


def latent(count: int, groups: int = 1) -> RunConfig:
    place = Placement(split="expert", attention_groups=groups)
    run = dataclasses.replace(a_run(place, count, "h200"), model=load_model("deepseek-v3"))
    return dataclasses.replace(run, quant=load_quant("FP8"), workload=Workload(concurrency=64))


def test_a_latent_is_kept_and_read_whole_on_every_device_that_shares_a_sequence() -> None:
    """MLA has one latent for all heads: tensor parallel copies it, data parallel does not."""
    assert kv_heads(load_model("deepseek-v3")) == 1
    shared, own = latent(8), latent(8, groups=8)
    assert ledger(shared, 8192).kv_bytes == 8 * ledger(own, 8192).kv_bytes
    assert ledger(own, 8192).kv_bytes == 64 * kv_bytes(load_model("deepseek-v3"), 8192)
    each = machine(own).bandwidth_bytes_per_s / 8
    assert machine(shared).kv_bandwidth_bytes_per_s == each
    assert machine(own).kv_bandwidth_bytes_per_s == 8 * each
    assert refusal(load_model("deepseek-v3"), load_quant("BF16"), "tensor", 8) is None


def test_grouped_heads_are_copied_beyond_their_number() -> None:
    """Step has 8 KV heads: 8 devices keep one each, 16 keep every head twice."""
    runs = {n: a_run(Placement(split="tensor"), n) for n in (1, 8, 16)}
    size = {n: ledger(run, 8192).kv_bytes for n, run in runs.items()}
    assert kv_heads(step_shape()) == 8
    assert size[8] == size[1]
    assert size[16] == 2 * size[1]
    eight, sixteen = (machine(runs[n]).kv_bandwidth_bytes_per_s for n in (8, 16))
    assert sixteen == pytest.approx(eight)


def test_a_pipeline_of_one_chunk_gains_nothing() -> None:
    split = machine(a_run(Placement(split="layer"), 4))
    assert split.pipeline(1) == 1
    assert 1 < split.pipeline(8) < 4


def test_no_device_is_refused_with_a_sentence() -> None:
    run = RunConfig(step_shape(), load_quant("Q4_0"), (), EngineChoice(load_engine("llama.cpp")))
    with pytest.raises(InputError, match="bandwidth"):
        machine(run)

"""Which splits are legal, and the machine that a placement amounts to."""

import pytest

from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.model import step_shape
from hwmodel.placement import legal_counts, machine, refusal
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig
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


def test_a_pipeline_of_one_chunk_gains_nothing() -> None:
    split = machine(a_run(Placement(split="layer"), 4))
    assert split.pipeline(1) == 1
    assert 1 < split.pipeline(8) < 4


def test_no_device_is_refused_with_a_sentence() -> None:
    run = RunConfig(step_shape(), load_quant("Q4_0"), (), EngineChoice(load_engine("llama.cpp")))
    with pytest.raises(InputError, match="bandwidth"):
        machine(run)

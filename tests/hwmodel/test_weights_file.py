"""Sizes of a checkpoint that is given as a file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.predict import predict
from hwmodel.quant import role_bytes, weight_bytes
from hwmodel.run import DeviceCount, EngineChoice, RunConfig
from hwmodel.weights_file import read_weights
from refimpl.checkpoint.source import WeightSource
from refimpl.errors import CheckpointError
from refimpl.inventory import inventory


def test_bytes_are_those_on_disk(
    tiny: Callable[[str], WeightSource], tiny_dir: Callable[[str], Path]
) -> None:
    source = tiny("tiny_a")
    stored = sum(source.stored_bytes(t.key, t.layer) for t in inventory(source.config))
    shape, quant = read_weights(tiny_dir("tiny_a"))
    assert weight_bytes(shape, quant, mtp=True) == stored
    assert quant.default == "BF16"
    assert set(role_bytes(shape, quant)) >= {"attention", "routed", "shared", "mtp"}


def test_a_file_can_be_predicted(tiny_dir: Callable[[str], Path]) -> None:
    shape, quant = read_weights(tiny_dir("tiny_a"))
    run = RunConfig(
        shape, quant, (DeviceCount(load_device("m4max")),), EngineChoice(load_engine("llama.cpp"))
    )
    assert predict(run).value
    assert predict(dataclasses.replace(run)).value == predict(run).value


def test_no_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError) as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)

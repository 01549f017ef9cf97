"""Sizes of a checkpoint that is given as a file."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hwmodel.cli import main
from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.errors import RequestError
from hwmodel.model import step_shape
from hwmodel.plan import make_plan
from hwmodel.plan_view import plan_text
from hwmodel.predict import predict
from hwmodel.quant import Quant, load_quant, role_bytes, storage_types, weight_bytes
from hwmodel.request import make_request
from hwmodel.run import DeviceCount, EngineChoice, RunConfig
from hwmodel.weights_file import read_weights
from refimpl.checkpoint.block_types import block_type
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.gguf_write import _ggml_type, _header, _header_bytes, rope_divisors
from refimpl.checkpoint.source import WeightSource
from refimpl.config import published
from refimpl.errors import CheckpointError
from refimpl.inventory import gguf_inventory, inventory


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model as one Q4_K_S GGUF without MTP layers: true header, a hole for data."""
    path = tmp_path_factory.mktemp("gguf") / "step-q4ks.gguf"
    config = published().without_mtp()
    keys = [(t.key, t.layer) for t in inventory(published())]
    types = dict(zip(keys, storage_types(step_shape(), load_quant("Q4_K_S")), strict=True))
    writer = _header(config, 14, None, "step")
    total = divisors_at = 0
    for t in gguf_inventory(config):
        kind = block_type(types.get((t.key, t.layer), "F32").replace("BF16", "F32"))
        size = kind.row_bytes(t.shape[-1]) * (t.elements // t.shape[-1])
        writer.add_tensor_info(t.gguf_name, t.shape, np.dtype(np.float32), size, _ggml_type(kind))
        if t.gguf_name == "rope_freqs.weight":
            divisors_at = total
        total += -(-size // 32) * 32
    path.write_bytes(_header_bytes(writer))
    start = -(-path.stat().st_size // 32) * 32
    with open(path, "r+b") as file:
        file.seek(start + divisors_at)
        file.write(np.asarray(rope_divisors(config), np.float32).tobytes())
    os.truncate(path, start + total)
    return path


def test_bytes_are_those_on_disk(
    tiny: Callable[[str], WeightSource], tiny_dir: Callable[[str], Path]
) -> None:
    source = tiny("tiny_a")
    stored = sum(source.stored_bytes(t.key, t.layer) for t in inventory(source.config))
    shape, quant = read_weights(tiny_dir("tiny_a"))
    assert weight_bytes(shape, quant, mtp=True) == stored
    assert quant.default == "BF16"
    assert set(role_bytes(shape, quant)) >= {"attention", "routed", "shared", "mtp"}
    assert quant.holds_mtp


def test_a_file_can_be_predicted(tiny_dir: Callable[[str], Path]) -> None:
    shape, quant = read_weights(tiny_dir("tiny_a"))
    device, engine = load_device("m4max"), load_engine("llama.cpp")
    found = predict(RunConfig(shape, quant, (DeviceCount(device),), EngineChoice(engine)))
    assert found.value
    twice = Quant(quant.name, quant.default, "file", sizes=tuple(2 * s for s in quant.sizes))
    slower = predict(RunConfig(shape, twice, (DeviceCount(device),), EngineChoice(engine)))
    assert slower.value
    assert slower.value < found.value


def test_no_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError) as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)


def test_a_trunk_file_has_its_own_bytes_and_those_of_the_published_mtp_file(
    full_size: Path,
) -> None:
    shape, quant = read_weights(full_size, step_shape())
    assert shape is step_shape()
    assert (quant.default, quant.holds_mtp) == ("Q4_K", False)
    # norms and biases are float32 in a GGUF; all else is the mixture's own size
    assert weight_bytes(shape, quant) == pytest.approx(111.494e9, rel=1e-4)
    assert role_bytes(shape, quant)["routed"] == role_bytes(shape, load_quant("Q4_K_S"))["routed"]
    q8 = role_bytes(shape, load_quant("Q8_0"))["mtp"]
    assert role_bytes(shape, quant)["mtp"] == pytest.approx(q8, rel=1e-3)


def test_a_plan_for_a_file_is_that_of_its_type(full_size: Path) -> None:
    given = make_plan(make_request("m4max", step_shape(), quant=str(full_size)))
    named = make_plan(make_request("m4max", step_shape(), quant="Q4_K_S"))
    assert given.holds
    assert given.memory.weights_bytes == pytest.approx(named.memory.weights_bytes, rel=1e-4)
    assert given.decode[0][1].value == pytest.approx(named.decode[0][1].value or 0, rel=0.01)
    assert str(full_size) in given.command
    assert "as given" in plan_text(given).replace("\n          ", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--device", "dgx-spark", "--json"],
        ["explain", "decode", "--device", "dgx-spark", "--json"],
        ["sweep", "--device", "dgx-spark", "--depths", "0,1024", "--json"],
        ["compare", "dgx-spark", "--json"],
    ],
)
def test_every_command_takes_a_file(full_size: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [*arguments, "--quant", str(full_size)])
    assert result.exit_code == 0, result.stderr
    found: Any = json.loads(result.stdout)
    entry = found[0] if isinstance(found, list) else found
    assert entry["quant"] == str(full_size)


def test_another_model_is_refused(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    convert(tiny_dir("tiny_a"), gguf, "bf16")
    for path in (gguf, tiny_dir("tiny_a")):
        with pytest.raises(RequestError, match=r"holds another model .* expected step-3\.5-flash"):
            make_request("h100", step_shape(), quant=str(path))


@pytest.mark.parametrize("device", ["rtx5090", "h100", "m4max"])
def test_a_file_that_does_not_fit_is_said_to(device: str, full_size: Path) -> None:
    """Where engines that read no such file run as well, too."""
    asked = make_request(
        device, step_shape(), quant=str(full_size), count=1, concurrency=64, context="256k"
    )
    found = make_plan(asked)
    assert not found.holds
    assert f"{full_size} does not fit {device}: " in found.problem
    assert "GB too little" in found.problem


def test_a_folder_in_fp8_needs_what_the_type_needs(tiny_dir: Callable[[str], Path]) -> None:
    shape, weights = read_weights(tiny_dir("tiny_a"))
    fp8 = replace(weights, default="FP8_BLOCK")
    for device, able in (("mi250x", False), ("mi300x", True)):
        asked = replace(make_request(device, shape), weights=fp8)
        assert asked.can_load(load_engine("vllm"), fp8.name) is able
        assert replace(asked, weights=weights).can_load(load_engine("vllm"), fp8.name)


def test_speeds_of_small_models_are_written_in_full(tiny_dir: Callable[[str], Path]) -> None:
    shape, _ = read_weights(tiny_dir("tiny_a"))
    found = make_plan(make_request("rtx5090", shape, context=64, min_decode=1e6))
    words = r"nothing reaches 1,000,000 tokens/s at 64 tokens; the fastest makes [1-9],\d{3}"
    assert re.fullmatch(words, found.problem)


def test_what_no_engine_here_can_load_is_refused(full_size: Path) -> None:
    with pytest.raises(RequestError, match="vLLM cannot load a GGUF file"):
        make_request("h100", step_shape(), quant=str(full_size), engine="vllm")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["plan", "--device", "m4max", "--quant", str(tmp_path / "no.gguf")]
    )
    assert result.exit_code == 2
    assert "no.gguf" in result.stderr
    assert result.stderr.count("\n") == 1

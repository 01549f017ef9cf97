"""Folders of mlx-lm: the definition of their packing, and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_checkpoints import rewrite_safetensors, safetensors_parts

from refimpl.backends import open_backend
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.mlx import is_mlx_name, mlx_name, unpack
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import synthesize
from refimpl.cli import main
from refimpl.config import published
from refimpl.config_io import load_hf_config
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.errors import CheckpointError, ConfigError
from refimpl.inventory import inventory, parameters

FOLDER = Path(__file__).parents[2] / "golden" / "mlx4"  # written by mlx-lm
WEIGHT = "model.layers.1.mlp.switch_mlp.down_proj.weight"
SCALES = "model.layers.1.mlp.switch_mlp.down_proj.scales"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "m"))


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_a_little_endian_stream_of_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64))
    rows = np.empty((3, 8 * bits), np.uint8)
    for r in range(3):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[r]))
        rows[r] = np.frombuffer(stream.to_bytes(8 * bits, "little"), np.uint8)
    np.testing.assert_array_equal(unpack(rows, bits), codes)


def test_names_of_the_published_model() -> None:
    names = {mlx_name(t) for t in inventory(published())}
    assert len(names) == 804
    assert "model.layers.44.mlp.switch_mlp.up_proj.weight" in names
    assert "model.layers.3.mlp.gate.gate.weight" in names
    assert "model.layers.3.mlp.gate.router_bias" in names
    assert "model.layers.3.mlp.share_expert.down_proj.weight" in names
    assert "model.layers.2.mlp.gate_proj.weight" in names
    assert not any(is_mlx_name(t.hf_name) for t in inventory(published()))


def test_norms_are_taken_as_one_plus_w() -> None:
    source = open_checkpoint(FOLDER)
    stored = source.vector("input_layernorm", 0, "f4")
    np.testing.assert_array_equal(source.norm_scale("input_layernorm", 0, "f4"), stored)
    assert 0.5 < np.median(stored) < 1.5


def test_inspect_knows_bits_groups_and_scales() -> None:
    found = inspect(FOLDER, check=True)
    assert found.problems == ()
    assert found.listing.unexpected == ()
    assert found.mtp_state == "declared but absent"
    assert found.parameters == parameters(found.listing.config.without_mtp())
    assert found.types["MLX4_G64"][0] == 21
    assert found.types["MLX8_G64"][0] == 1
    roles = {r.role: r for r in found.roles}
    assert roles["routed"].bits_per_weight == 4 + 2 * 16 / 64
    assert roles["embedding"].bits_per_weight == 4.5


def test_rows_and_experts_are_those_of_the_whole() -> None:
    source = open_checkpoint(FOLDER)
    table = source.matrix("embed_tokens", None, "f4")
    np.testing.assert_array_equal(
        source.rows("embed_tokens", None, [9, 0, 9], "f4"), table[[9, 0, 9]]
    )
    whole = source.stored("experts.down", 1).values(0, 4 * 64)
    np.testing.assert_array_equal(source.expert("experts.down", 1, 2, "f4"), whole[128:192])


def test_conversion_to_gguf_holds_the_same_values(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "m.gguf", "f32")
    a, b = open_checkpoint(FOLDER), open_checkpoint(tmp_path / "m.gguf")
    for spec in inventory(a.config):
        x, y = (s.stored(spec.key, spec.layer).values(0, 10**6) for s in (a, b))
        np.testing.assert_array_equal(x.astype(np.float32), y)


def test_folders_that_are_not_quantised_are_known_by_their_names(copy: Path) -> None:
    """Values of every tensor in F32 under mlx-lm's names, without `quantization`."""
    source = open_checkpoint(FOLDER)
    fields: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    body = b""
    for spec in inventory(source.config):
        data = source.stored(spec.key, spec.layer).values(0, 10**6).astype("<f4").tobytes()
        offsets = [len(body), len(body) + len(data)]
        fields[mlx_name(spec)] = {"dtype": "F32", "shape": spec.shape, "data_offsets": offsets}
        body += data
    rewrite_safetensors(copy, fields, body)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    plain = open_checkpoint(copy)
    for spec in inventory(source.config):
        a, b = (s.stored(spec.key, spec.layer) for s in (source, plain))
        assert b.holds_one_plus == spec.plus_one
        np.testing.assert_array_equal(a.values(0, 10**6), b.values(0, 10**6))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "mxfp4"}, r"'quantization': has mode 'mxfp4'; only 'affine' is read"),
        ({"bits": 7}, r"has bits 7, expected one of"),
        ({"group_size": 0}, r"has group_size 0, expected one of"),
        ({"model.layers.1.mlp.gate.gate": {"bits": "8"}}, r"mlp.gate.gate': has bits 8, expected"),
    ],
)
def test_other_quantisations_are_refused(copy: Path, fields: Any, words: str) -> None:
    configure(copy, **fields)
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(copy)


def test_a_form_that_the_codes_contradict_is_refused(copy: Path) -> None:
    configure(copy, bits=8)
    message = r"embed_tokens.weight has shape \(128, 8\), expected \(128, 16\): 8 bits for each"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_a_module_that_config_calls_plain_is_refused(copy: Path) -> None:
    configure(copy, lm_head=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds packed codes \(U32\), which"):
        open_checkpoint(copy)


def test_missing_and_misshapen_scales_are_named(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    fields[SCALES]["shape"] = [64, 4, 1]
    rewrite_safetensors(copy, fields, body)
    with pytest.raises(CheckpointError, match=r"has shape \(64, 4, 1\), expected \(4, 64, 1\)"):
        open_checkpoint(copy)
    fields["model.other"] = fields.pop(SCALES)
    rewrite_safetensors(copy, fields, body)
    with pytest.raises(CheckpointError, match=rf"needs its scales; tensor {SCALES} \(4, 64, 1\)"):
        open_checkpoint(copy)
    done = CliRunner().invoke(main, ["inspect", str(copy)])
    assert done.exit_code == 1
    assert f"needs its scales; tensor {SCALES}" in done.stdout


def test_scales_that_are_not_finite_are_found(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    at = fields[SCALES]["data_offsets"][0] + 2 * 5
    rewrite_safetensors(copy, fields, body[:at] + b"\x80\x7f" + body[at + 2 :])  # BF16 infinity
    done = CliRunner().invoke(main, ["inspect", str(copy), "--check"])
    assert done.exit_code == 1
    expected = f"{WEIGHT}: 1 block scales of MLX4_G64 are not finite, the first in row 5"
    assert expected in done.stdout


def test_mtp_layers_come_from_the_original_folder(tmp_path: Path) -> None:
    """mlx-lm drops them; of the original, config.json and the shards of these layers suffice."""
    config = load_hf_config(FOLDER / "config.json")
    original = synthesize(config, 12, tmp_path / "hf", max_shard_bytes=30_000)  # its seed
    index = json.loads((original / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()) - {f for n, f in index.items() if ".layers.2." in n}:
        (original / file).unlink()
    both = open_checkpoint(FOLDER, mtp_path=original)
    assert both.warnings == ()
    assert len(both.config.mtp) == 1
    assert both.stored("q_proj", 0).kind.name == "MLX4_G64"
    assert both.stored("q_proj", 2).kind.name == "BF16"
    assert not both.stored("enorm", 2).holds_one_plus
    model = open_backend(both)
    made = generate(model, [5, 17, 100, 4], GenerateOptions(max_new_tokens=4, mtp=1))
    assert made.mtp.drafted > 0

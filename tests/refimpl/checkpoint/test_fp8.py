"""FP8 folders: values, damage, and what the model computes from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from small_checkpoints import rewrite_safetensors, safetensors_parts

from refimpl.backends import open_backend
from refimpl.checkpoint.block_fp8 import BlockScales, quantise_fp8, scale_shape
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.hf_write import write_hf
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, random_chunks
from refimpl.cli import main
from refimpl.config import published
from refimpl.errors import CheckpointError, ConfigError, InputError
from refimpl.inventory import inventory, parameters

Made = Callable[[str, str], Path]
BLOCK = (24, 40)  # smaller than the tiny matrices, and dividing none of their sides
WEIGHT = "model.layers.4.moe.up_proj.weight"
SCALES = f"{WEIGHT}_scale_inv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_a with FP8 experts in ragged blocks."""
    config = PRESETS["tiny_a"]()
    out = tmp_path_factory.mktemp("fp8") / "m"
    return write_hf(config, lambda t: random_chunks(t, 3), out, "fp8", fp8_block=BLOCK)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "m"))


def by_hand(folder: Path, name: str) -> np.ndarray:
    """The definition, one value at a time: fp8[r, c] times the scale of its block."""
    return by_hand_of(*safetensors_parts(folder), name)


def by_hand_of(fields: dict[str, Any], body: bytes, name: str) -> np.ndarray:
    """The same from a header and the bytes after it."""

    def raw(tensor: str, dtype: Any) -> np.ndarray:
        start, stop = fields[tensor]["data_offsets"]
        return np.frombuffer(body[start:stop], dtype).reshape(fields[tensor]["shape"])

    codes = raw(name, ml_dtypes.float8_e4m3fn)
    scales = raw(f"{name}_scale_inv", np.float32)
    out = np.empty(codes.shape, np.float32)
    for place in np.ndindex(codes.shape):
        *stack, r, c = place
        out[place] = np.float32(codes[place]) * scales[(*stack, r // BLOCK[0], c // BLOCK[1])]
    return out


def test_values_are_those_of_the_definition(folder: Path) -> None:
    source = open_checkpoint(folder)
    expected = by_hand(folder, WEIGHT)
    assert source.stored("experts.up", 4).kind.name == "F8_E4M3"
    for e in range(16):
        np.testing.assert_array_equal(source.expert("experts.up", 4, e, "f4"), expected[e])
    stored = source.stored("experts.up", 4)
    flat = expected.reshape(-1, expected.shape[-1])
    np.testing.assert_array_equal(stored.values(13, 71), flat[13:71])  # across experts and blocks
    np.testing.assert_array_equal(stored.picked(np.array([500, 3, 3])), flat[[500, 3, 3]])


def test_only_the_routed_experts_are_fp8(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert source.warnings == ()
    for spec in inventory(source.config):
        name = source.stored(spec.key, spec.layer).kind.name
        expected = "F8_E4M3" if spec.role == "routed" else "BF16"
        assert name == ("F32" if spec.key == "router_bias" else expected), spec.hf_name


def test_every_code_is_decoded() -> None:
    """All 256 codes against the bits of the format: 1 sign, 4 exponent (bias 7), 3 mantissa;
    S.1111.111 is the only NaN and there is no infinity (OCP 8-bit floating point, E4M3)."""
    codes = np.arange(256, dtype=np.uint8)[None]
    found = BlockScales(np.ones((1, 2), np.float32), 1, (128, 128)).decode(codes, np.array([0]))[0]
    for code in range(256):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        if code & 0x7F == 0x7F:
            assert np.isnan(found[code])
            continue
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        assert found[code] == (-value if sign else value)
    assert found[0x7E] == 448


def test_quantisation_error_stays_within_half_a_step() -> None:
    """3 mantissa bits: 2^-4 of the value, and half the smallest step near zero."""
    w = np.random.default_rng(1).standard_normal((50, 90)).astype(np.float32)
    w[:24, :40] = 0
    codes, scales = quantise_fp8(w, BLOCK)
    assert scales.shape == scale_shape(w.shape, BLOCK) == (3, 3)
    back = BlockScales(scales, 50, BLOCK).decode(codes, np.arange(50))
    step = np.repeat(np.repeat(scales, 24, 0)[:50], 40, 1)[:, :90] * 2.0**-10
    assert np.all(np.abs(back - w) <= np.maximum(np.abs(w) * 2.0**-4, step) * (1 + 1e-6))
    assert not back[:24, :40].any()


def test_values_too_small_for_a_scale_are_zeros() -> None:
    w = np.zeros(BLOCK, np.float32)
    w[0, 0] = np.float32(1e-45)
    codes, scales = quantise_fp8(w, BLOCK)
    assert not BlockScales(scales, 24, BLOCK).decode(codes, np.arange(24)).any()


def test_published_scales_have_the_published_shapes() -> None:
    routed = [t for t in inventory(published()) if t.role == "routed"]
    shapes = {t.key: scale_shape(t.shape, (128, 128)) for t in routed}
    assert shapes["experts.gate"] == shapes["experts.up"] == (288, 10, 32)
    assert shapes["experts.down"] == (288, 32, 10)


def test_a_run_equals_one_over_the_dequantised_weights(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    convert(folder, plain, "f32")
    ids = [5, 17, 300, 4, 4, 90, 211, 8, 33, 2, 7, 319, 100, 12, 64, 65, 66, 67, 1, 9]
    logits = []
    for path in (folder, plain):
        model = open_backend(open_checkpoint(path), dtype="float64")
        logits.append(model.prefill(ids, model.new_cache(20), all_logits=True).logits)
    np.testing.assert_array_equal(logits[0], logits[1])


def test_conversion_to_gguf_encodes_the_dequantised_values(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", "f32")
    found = open_checkpoint(tmp_path / "m.gguf")
    np.testing.assert_array_equal(
        found.expert("experts.up", 4, 7, "f4"), by_hand(folder, WEIGHT)[7]
    )
    assert found.norm_scale("norm", None, "f4").dtype == np.float32


def test_conversion_from_gguf_gives_the_same_codes(folder: Path, tmp_path: Path) -> None:
    """Values that FP8 holds exactly come back to the same codes and scales, in chunks of rows
    that are no whole experts."""
    write_hf(PRESETS["tiny_a"](), lambda t: random_chunks(t, 3), tmp_path / "a", "fp8")
    convert(tmp_path / "a", tmp_path / "m.gguf", "f32")
    again = open_checkpoint(tmp_path / "m.gguf")
    assert again.config.rope_divisors is not None
    w = again.stored("experts.down", 5).values(0, 10**6).reshape(16, 64, 32)
    codes = open_checkpoint(tmp_path / "a").stored("experts.down", 5).rows.reshape(16, 64, 32)
    for e in range(16):
        np.testing.assert_array_equal(quantise_fp8(w[e])[0], codes[e])


def test_the_engine_says_that_it_has_no_kernels(folder: Path) -> None:
    with pytest.raises(InputError, match=r"type F8_E4M3, which the engine has no kernels for"):
        open_backend(open_checkpoint(folder), "engine")


def test_inspect_counts_scales_in_bytes_and_not_in_parameters(folder: Path) -> None:
    found = inspect(folder, check=True)
    assert found.problems == ()
    assert found.parameters == parameters(PRESETS["tiny_a"]())
    (routed,) = [r for r in found.roles if r.role == "routed"]
    scales = [t for t in inventory(PRESETS["tiny_a"]()) if t.role == "routed"]
    extra = sum(4 * int(np.prod(scale_shape(t.shape, BLOCK))) for t in scales)
    assert routed.stored_bytes == routed.parameters + extra
    assert routed.bits_per_weight == 8 * (1 + extra / routed.parameters)
    assert routed.types == {"F8_E4M3": routed.parameters, "F32": extra}
    source = open_checkpoint(folder)
    sizes = sum(source.stored_bytes(t.key, t.layer) for t in inventory(source.config))
    assert found.stored_bytes == sizes


def problems(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["inspect", str(folder), *options])
    assert done.exit_code == 1, done.output
    return done.stdout


def damaged(folder: Path, value: float) -> Path:
    fields, body = safetensors_parts(folder)
    at = fields[SCALES]["data_offsets"][0] + 4
    rewrite_safetensors(folder, fields, body[:at] + np.float32(value).tobytes() + body[at + 4 :])
    return folder


@pytest.mark.parametrize(
    ("value", "words"), [(np.inf, "not finite"), (np.nan, "not finite"), (-0.01, "negative")]
)
def test_impossible_scales_are_found(copy: Path, value: float, words: str) -> None:
    shown = problems(damaged(copy, value), "--check")
    assert f"{WEIGHT}: 1 block scales of F8_E4M3 are {words}, the first in row 0" in shown


def test_a_nan_code_is_found(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    at = fields[WEIGHT]["data_offsets"][0] + 64 * 3
    rewrite_safetensors(copy, fields, body[:at] + b"\x7f" + body[at + 1 :])
    assert f"{WEIGHT}: 1 values are not finite, the first in row 3" in problems(copy, "--check")


def test_missing_scales_are_refused_and_reported(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    fields["model.other"] = fields.pop(SCALES)
    rewrite_safetensors(copy, fields, body)
    with pytest.raises(CheckpointError, match=r"needs its scales; tensor .*up_proj.weight_scale_i"):
        open_checkpoint(copy)
    assert "needs its scales" in problems(copy, "--check")


def test_scales_of_another_shape_are_refused(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    fields[SCALES]["shape"] = fields[SCALES]["shape"][::-1]
    rewrite_safetensors(copy, fields, body)
    message = r"has shape \(2, 2, 16\), expected \(16, 2, 2\)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)
    assert "expected (16, 2, 2)" in problems(copy)


def test_scales_of_a_tensor_that_is_not_fp8_are_refused(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    fields["model.layers.0.self_attn.q_proj.weight_scale_inv"] = fields.pop(SCALES)
    rewrite_safetensors(copy, fields, body)
    with pytest.raises(CheckpointError, match="has type BF16 and yet scales"):
        open_checkpoint(copy)
    assert "and yet scales" in problems(copy)


def test_scales_without_a_weight_are_a_missing_weight(copy: Path) -> None:
    fields, body = safetensors_parts(copy)
    fields["model.other"] = fields.pop(WEIGHT)
    rewrite_safetensors(copy, fields, body)
    with pytest.raises(CheckpointError, match=rf"tensor {WEIGHT} is missing"):
        open_checkpoint(copy)
    assert f"1 tensors are missing: {WEIGHT}" in problems(copy)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"quant_method": "gptq"}, r"quant_method': is 'gptq'"),
        ({"quant_method": "fp8"}, r"weight_block_size': is None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"is \[0, 128\], expected two"),
        ({"quant_method": "fp8", "weight_block_size": [128.0, 128]}, "expected two sizes"),
        ("fp8", "quantization_config': is 'fp8', expected an object"),
    ],
)
def test_other_quantisations_are_refused(copy: Path, field: Any, words: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": field}))
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(copy)


def test_scales_may_lie_in_another_shard(copy: Path) -> None:
    """Where only some tensors are wanted, the shard of their scales is opened too."""
    fields, body = safetensors_parts(copy)
    parts: dict[str, dict[str, Any]] = {"model-a.safetensors": {}, "model-b.safetensors": {}}
    data = dict.fromkeys(parts, b"")
    for name, entry in fields.items():
        if name != "__metadata__":
            file = sorted(parts)[name.endswith("_scale_inv")]
            start, stop = entry["data_offsets"]
            at = len(data[file])
            parts[file][name] = entry | {"data_offsets": [at, at + stop - start]}
            data[file] += body[start:stop]
    for file, entries in parts.items():
        text = json.dumps(entries).encode()
        (copy / file).write_bytes(len(text).to_bytes(8, "little") + text + data[file])
    (copy / "model.safetensors").unlink()
    where = {name: file for file, entries in parts.items() for name in entries}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    source = open_checkpoint(copy, wanted=lambda spec: spec.key == "experts.up" and spec.layer == 4)
    expected = by_hand_of(fields, body, WEIGHT)[3]
    np.testing.assert_array_equal(source.expert("experts.up", 4, 3, "f4"), expected)
    (copy / "model-b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-b.safetensors is missing"):
        open_checkpoint(copy, wanted=lambda spec: spec.layer == 4)
    assert (
        open_checkpoint(copy, wanted=lambda spec: spec.layer == 0).matrix("q_proj", 0, "f4").any()
    )


def test_synth_and_convert_write_fp8_folders(tmp_path: Path, made: Made) -> None:
    run = CliRunner().invoke(main, ["synth", str(tmp_path / "s"), "--type", "fp8"])
    assert run.exit_code == 0, run.stderr
    convert(made("micro", "hf-f32"), tmp_path / "c", "fp8")
    for name in ("s", "c"):
        assert inspect(tmp_path / name, check=True).problems == ()
    refused = CliRunner().invoke(main, ["synth", str(tmp_path / "x.gguf"), "--type", "fp8"])
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1


def test_a_folder_is_converted_to_fp8(made, tmp_path):
    """The routed experts become FP8 with scales, the rest BF16, as `synth` writes them."""
    done = CliRunner().invoke(
        main, ["convert", str(made("micro", "hf-f32")), str(tmp_path / "m"), "--type", "fp8"]
    )
    assert done.exit_code == 0, done.stderr
    kinds = {t.spec.role: t.kind.name for t in open_checkpoint(tmp_path / "m").tensors}
    assert kinds["routed"] == "F8_E4M3" and kinds["attention"] == kinds["head"] == "BF16"

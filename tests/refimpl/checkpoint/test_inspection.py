"""`refimpl inspect`: counts that equal the inventory's, what is missing, and damage by --check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

from refimpl.checkpoint.block_scales import SCALE_FIELDS, field_values
from refimpl.checkpoint.block_types import block_type, encode
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.cli import main
from refimpl.inventory import active_parameters, gguf_inventory, inventory, parameters

Made = Callable[[str, str], Path]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *[str(a) for a in args]])


@pytest.mark.parametrize("form", ["hf-bf16", "hf-f32", "f32", "q8_0", "q4_0"])
def test_counts_are_those_of_the_inventory(made: Made, form: str) -> None:
    path, config = made("tiny_a", form), PRESETS["tiny_a"]()
    found = inspect(path, check=True)
    specs = inventory(config) if form.startswith("hf-") else gguf_inventory(config)
    assert sum(r.tensors for r in found.roles) == len(specs)
    assert found.parameters == parameters(config)
    assert found.to_json()["active_parameters"] == active_parameters(config)
    for r in found.roles:
        here = [t for t in specs if t.role == r.role and t.is_parameter]
        assert r.parameters == sum(t.elements for t in here)
    assert found.stored_bytes == sum(n for _, n in found.types.values())
    assert found.stored_bytes < sum(p.stat().st_size for p in _files(path))
    assert found.mtp_state == "present"
    assert found.findings == ()
    assert found.problems == ()
    assert found.tokenizer is not None


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.glob("*.safetensors"))


def test_text_and_json_agree(made: Made) -> None:
    path = made("tiny_a", "q4_0")
    text, data = run(path), json.loads(run(path, "--json").stdout)
    assert text.exit_code == 0
    assert f"{data['parameters']:,}" in text.stdout
    assert f"{data['bits_per_weight']:.3f}" in text.stdout
    assert "124 Q4_0, 73 F32, 1 Q8_0" in text.stdout
    assert {k: v["tensors"] for k, v in data["types"].items()} == {
        "Q4_0": 124,
        "Q8_0": 1,
        "F32": 73,
    }
    assert "MTP layers: 3 of 3\n" in text.stdout
    assert data["problems"] == []
    assert data["config"]["hidden_size"] == 64


def test_a_missing_shard_is_named_with_its_tensors(tmp_path: Path) -> None:
    folder = synthesize(PRESETS["tiny_a"](), 1, tmp_path / "m", "f32", max_shard_bytes=1_000_000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    done = run(folder, "--check")
    assert done.exit_code == 1
    assert f"problem: the file {shards[1].name} is missing\n" in done.stdout
    assert "tensors are missing: model.layers." in done.stdout
    found = inspect(folder)
    assert 0 < found.parameters < parameters(PRESETS["tiny_a"]())
    assert found.mtp_state == "present"


def test_mtp_layers_that_are_declared_and_absent(tmp_path: Path, made: Made) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made("micro", "hf-f32"), folder)
    config = json.loads((folder / "config.json").read_text())
    stripped = synthesize(_micro(folder).without_mtp(), 5, tmp_path / "trunk", "f32")
    (stripped / "config.json").write_text(json.dumps(config))
    found = inspect(stripped)
    assert found.mtp_state == "declared but absent"
    assert found.problems == ()  # it runs, without drafts
    assert "MTP layers: 0 of 1 (declared but absent: drafts are off)" in run(stripped).stdout


def _micro(folder: Path):  # type: ignore[no-untyped-def]
    from refimpl.config_io import load_hf_config

    return load_hf_config(folder / "config.json")


def test_a_wrong_shape_and_an_unknown_tensor(tmp_path: Path, made: Made) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made("micro", "hf-f32"), folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.extra.weight"] = header.pop("model.norm.weight")
    router = header["model.layers.1.moe.gate.weight"]
    router["shape"] = router["shape"][::-1]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    found = inspect(folder).to_json()
    assert found["missing"] == ["model.norm.weight"]
    assert found["unexpected"] == ["model.extra.weight"]
    assert [t["name"] for t in found["misshapen"]] == ["model.layers.1.moe.gate.weight"]
    assert run(folder, "--check").exit_code == 1


def _damaged(path: Path, out: Path, tensor: str, at: int, data: bytes) -> Path:
    """A copy of a GGUF file with bytes of one tensor overwritten, from byte `at` of it."""
    shutil.copy(path, out)
    found = read_gguf(path).tensors[tensor].data
    start = found.ctypes.data - _map_start(found)
    with open(out, "r+b") as file:
        file.seek(start + at)
        file.write(data)
    return out


def _map_start(view: np.ndarray) -> int:
    base = view
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(base.ctypes.data)


@pytest.mark.parametrize(
    ("form", "tensor", "at", "data", "words"),
    [
        ("f32", "blk.0.ffn_up.weight", 4000, b"\x00\x00\xc0\x7f", "1 values are not finite"),
        ("f32", "blk.0.ffn_up.weight", 4000, b"\x00\x00\x80\xff", "the first in row 31"),
        ("f32", "blk.0.ffn_up.weight", 4000, b"\x00\x00\x00\x7e", "values far beyond the rest"),
        ("q8_0", "blk.0.ffn_up.weight", 34, b"\x00\x7c", "1 block scales of Q8_0 are not finite"),
        ("q8_0", "blk.0.ffn_up.weight", 68, b"\x00\xb0", "1 block scales of Q8_0 are negative"),
        ("q4_0", "blk.0.ffn_up.weight", 18, b"\xff\x7b", "far beyond the rest, the first row 1"),
        ("q4_0", "blk.1.ffn_up_exps.weight", 36, b"\x01\x7e", "scales of Q4_0 are not finite"),
        ("f32", "blk.1.attn_k_norm.weight", 0, bytes(128), "all values are zero"),
    ],
)
def test_damage_is_found(
    made: Made, tmp_path: Path, form: str, tensor: str, at: int, data: bytes, words: str
) -> None:
    path = _damaged(made("micro", form), tmp_path / "m.gguf", tensor, at, data)
    assert run(path).exit_code == 0  # the header is whole
    done = run(path, "--check")
    assert done.exit_code == 1
    assert f"problem: {tensor}: " in done.stdout
    assert words in done.stdout


@pytest.mark.parametrize(("added", "words"), [(1.0, "applied twice"), (-1.0, "never applied")])
def test_norms_with_the_wrong_offset_are_noticed(
    made: Made, tmp_path: Path, added: float, words: str
) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(made("micro", "f32"), path)
    for name, tensor in read_gguf(made("micro", "f32")).tensors.items():
        if name.endswith("norm.weight"):
            wrong = tensor.data.view(np.float32) + np.float32(added)
            _damaged(path, tmp_path / "next.gguf", name, 0, wrong.tobytes())
            shutil.move(tmp_path / "next.gguf", path)
    done = run(path, "--check")
    assert done.exit_code == 1
    assert words in done.stdout


@pytest.mark.parametrize(("added", "words"), [(1.0, "applied twice"), (-1.0, "never applied")])
@pytest.mark.parametrize("form", ["hf-f32", "hf-bf16", "hf-fp8"])
def test_norms_of_a_folder_that_holds_what_a_gguf_file_would(
    made: Made, tmp_path: Path, form: str, added: float, words: str
) -> None:
    """A converter that writes 1 + w into a folder gets + 1 twice; one that takes 1 off, never."""
    path = Path(shutil.copytree(made("micro", form), tmp_path / "m"))
    assert run(path, "--check").exit_code == 0
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    kind = np.dtype(np.float32) if form == "hf-f32" else np.dtype(ml_dtypes.bfloat16)
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name.endswith("norm.weight"):
            start, stop = (8 + size + o for o in entry["data_offsets"])
            wrong = np.frombuffer(data[start:stop], kind).astype(np.float32) + added
            data[start:stop] = wrong.astype(kind).tobytes()
    file.write_bytes(data)
    done = run(path, "--check")
    assert done.exit_code == 1
    assert words in done.stdout
    assert words in json.loads(run(path, "--check", "--json").stdout)["findings"][0]["problem"]


@pytest.mark.parametrize("form", ["hf-bf16", "hf-fp8", "q8_0", "q4_0"])
def test_tokenizer_and_template_are_found(made: Made, tmp_path: Path, form: str) -> None:
    found = json.loads(run(made("tiny_a", form), "--json").stdout)["tokenizer"]
    assert found["entries"] in (271, 320)  # a GGUF file pads to the vocabulary
    assert found["merges"] == 12
    assert found["pre_tokenizer"] == "deepseek-v3"
    assert found["chat_template_characters"] is None
    assert "no chat template" in run(made("tiny_a", form)).stdout


def test_a_template_beside_the_tokenizer_is_counted(made: Made, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("tiny_a", "hf-bf16"), tmp_path / "m"))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat template of 14 characters" in run(path).stdout
    (path / "tokenizer.json").unlink()
    done = run(path)
    assert done.exit_code == 0
    assert "tokenizer: none" in done.stdout


def test_a_damaged_tokenizer_is_a_problem(made: Made, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("tiny_a", "hf-bf16"), tmp_path / "m"))
    (path / "tokenizer.json").write_text("{")
    done = run(path)
    assert done.exit_code == 1
    assert "tokenizer: unusable" in done.stdout
    assert "problem: " in done.stdout


def test_a_sparse_file_is_inspected_from_its_header(tmp_path: Path) -> None:
    """Headers of the published FP8 checkpoint, whole, over shards that are holes on the disk: the
    sizes are those published (208.6 GB), and nothing but headers is read."""
    from refimpl.checkpoint.block_fp8 import scale_shape
    from refimpl.config import published
    from refimpl.config_io import to_hf

    folder = tmp_path / "m"
    folder.mkdir()
    field = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = to_hf(published()) | {"quantization_config": field}
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[int, dict[str, tuple[str, tuple[int, ...], int]]] = {}
    for t in inventory(published()):
        shard = shards.setdefault(t.layer if t.layer is not None else 0, {})
        if t.role == "routed":
            scales = scale_shape(t.shape, (128, 128))
            shard[t.hf_name] = ("F8_E4M3", t.shape, t.elements)
            shard[t.hf_name + "_scale_inv"] = ("F32", scales, 4 * int(np.prod(scales)))
        else:
            shard[t.hf_name] = ("BF16", t.shape, 2 * t.elements)
    weight_map = {}
    for number, tensors in shards.items():
        name, at, fields = f"model-{number + 1:05d}.safetensors", 0, {}
        for tensor, (kind, shape, size) in tensors.items():
            fields[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        text = json.dumps(fields).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sum(p.stat().st_blocks * 512 for p in folder.iterdir()) < 5_000_000
    found = inspect(folder)
    assert found.problems == ()
    assert found.parameters == parameters(published()) == 199_384_301_376
    assert found.types["F8_E4M3"] == (126, 42 * 3 * 288 * 1280 * 4096)
    assert found.stored_bytes == pytest.approx(208.56e9, rel=1e-4)
    shown = run(folder).stdout
    assert "MTP layers: 3 of 3" in shown
    assert "routed         252 190,253,629,440" in shown


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_scale_fields_are_where_the_encoder_writes_them(name: str) -> None:
    """Doubling the values doubles every scale field, and codes stay as they are."""
    kind = block_type(name)
    values = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    once, twice = encode(kind, values, ""), encode(kind, 2 * values, "")
    for place in SCALE_FIELDS[name]:
        a = field_values(once, kind.block_bytes, place).astype(np.float64)
        b = field_values(twice, kind.block_bytes, place).astype(np.float64)
        np.testing.assert_allclose(b, 2 * a, rtol=2e-3)
        assert not place.never_negative or (a >= 0).all()


@pytest.mark.parametrize("name", sorted(SCALE_FIELDS))
def test_scale_fields_scale_the_decoded_values(name: str) -> None:
    """With all fields doubled every decoded value is twice what it was."""
    kind = block_type(name)
    rng = np.random.default_rng(9)
    rows = rng.integers(0, 256, (4, 2 * kind.block_bytes), dtype=np.uint8)
    blocks = rows.reshape(-1, kind.block_bytes)

    def with_scales(value: float) -> np.ndarray:
        for place in SCALE_FIELDS[name]:
            stored = np.frombuffer(np.float16(value).tobytes(), np.uint8)
            blocks[:, place.offset : place.offset + 2] = stored
        assert kind.decode is not None
        return kind.decode(rows).astype(np.float64)

    np.testing.assert_array_equal(with_scales(0.5), 2 * with_scales(0.25))


@pytest.mark.parametrize("what", ["nowhere", "."])
def test_what_is_no_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    done = run(tmp_path if what == "." else what)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1

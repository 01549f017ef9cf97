"""Every mistake with a checkpoint gets one sentence: what, where, what was expected."""

import json
import os
import shutil

import numpy as np
import pytest
from gguf import GGUFReader

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.errors import CheckpointError, ConfigError


def refused(path, message, error=CheckpointError):
    with pytest.raises(error, match=message) as refusal:
        open_checkpoint(path)
    assert str(refusal.value).isprintable(), "one line, no control characters"


@pytest.fixture
def sharded(tmp_path):
    return synthesize(PRESETS["tiny_a"](), 0, tmp_path / "m", max_shard_bytes=400_000)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made("micro", "hf-f32"), tmp_path / "m")


def edit_header(path, change):
    """Rewrite the JSON header of a safetensors file."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    data = change(header, content[8 + n :]) or content[8 + n :]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_shards_are_joined(sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert open_checkpoint(sharded).config == PRESETS["tiny_a"]()


def test_experts_of_one_layer_may_lie_in_another_shard(tmp_path):
    folder = synthesize(PRESETS["tiny_a"](), 0, tmp_path / "m", max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({v for k, v in index.items() if k.startswith("model.layers.4.moe.")}) > 1
    assert open_checkpoint(folder).expert("experts.down", 4, 15, "f4").shape == (64, 32)


def test_shards_without_an_index_are_joined_too(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert open_checkpoint(sharded).warnings == ()


def test_paths_that_are_no_checkpoint(tmp_path, folder):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("hello, this is no model")
    (tmp_path / "emptydir").mkdir()
    refused(tmp_path / "none.gguf", "no such file")
    refused(tmp_path / "empty.gguf", "the file is empty")
    refused(tmp_path / "text.gguf", "begins with b'hell', a GGUF file begins with b'GGUF'")
    refused(tmp_path / "emptydir", r"no config\.json in this folder")
    refused(folder / "model.safetensors", r"give the folder that holds config\.json")
    (folder / "model.safetensors").unlink()
    refused(folder, r"no model\*\.safetensors beside config\.json")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a regular file")


def test_a_missing_shard(sharded):
    sorted(sharded.glob("*.safetensors"))[2].unlink()
    refused(sharded, r"shard model-00003-of-.* is missing, .* complete the download")


def test_a_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, r"model-00002.*outside the .* bytes of data \(truncated")


def test_an_index_that_leaves_the_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    for name in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(sharded, "is not the name of a safetensors file in this folder")
    for text in ("{", "[]", "{}", '{"weight_map": {}}', "[" * 100_000):
        index.write_text(text)
        refused(sharded, "not valid JSON|no 'weight_map'")


def test_an_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    names = sorted(set(data["weight_map"].values()))
    data["weight_map"]["lm_head.weight"] = names[0]
    index.write_text(json.dumps(data))
    refused(sharded, r"model-00001.*tensor lm_head\.weight is missing, .* says it is here")


def test_a_tensor_in_two_shards(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    first = sorted(sharded.glob("*.safetensors"))[0]
    shutil.copy(first, sharded / "model-00099.safetensors")
    refused(sharded, r"is in both model-00001-of-.* and model-00099\.safetensors")


def test_a_missing_tensor(folder):
    def drop(header, data):
        gone = header.pop("lm_head.weight")
        return data[: gone["data_offsets"][0]]

    edit_header(folder / "model.safetensors", drop)
    refused(folder, r"lm_head\.weight is missing, expected shape \(288, 32\)")


def test_a_tensor_of_another_shape(folder):
    def flatten(header, data):
        header["lm_head.weight"]["shape"] = [32, 288]

    edit_header(folder / "model.safetensors", flatten)
    refused(folder, r"lm_head\.weight has shape \(32, 288\), expected \(288, 32\)")


def test_a_tensor_of_another_type(folder):
    def integers(header, data):
        header["lm_head.weight"]["dtype"] = "I32"

    edit_header(folder / "model.safetensors", integers)
    refused(folder, r"lm_head\.weight has type I32, expected F32, F16, BF16")


def test_an_extra_tensor_is_noted(folder):
    def add(header, data):
        header["vision.weight"] = {
            "dtype": "U8",
            "shape": [4],
            "data_offsets": [len(data), len(data) + 4],
        }
        return data + bytes(4)

    edit_header(folder / "model.safetensors", add)
    (warning,) = open_checkpoint(folder).warnings
    assert "1 tensors are not part of this model and not used: 'vision.weight'" in warning


def test_an_odd_header_length_still_gives_aligned_values(folder):
    """Nothing in the format aligns the data; values must not depend on it."""
    whole = open_checkpoint(folder).matrix("q_proj", 0, "f4").copy()
    edit_header(folder / "model.safetensors", lambda header, data: header.update({"a b": None}))
    refused(folder, "lacks dtype")
    edit_header(folder / "model.safetensors", lambda header, data: header.pop("a b") and None)
    for pad in range(4):
        content = (folder / "model.safetensors").read_bytes()
        n = int.from_bytes(content[:8], "little") + 1
        (folder / "model.safetensors").write_bytes(
            n.to_bytes(8, "little") + content[8 : 7 + n] + b" " + content[7 + n :]
        )
        found = open_checkpoint(folder).matrix("q_proj", 0, "f4")
        assert found.flags.aligned, pad
        np.testing.assert_array_equal(found, whole)


def test_a_config_of_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(folder, r"has shape \(288, 32\), expected \(288, 64\) by config\.json")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused(folder, "model_type", ConfigError)
    (folder / "config.json").write_text("{")
    refused(folder, "not valid JSON")


def replaced(path, out, *changes):
    content = path.read_bytes()
    for old, new in changes:
        assert content.count(old) >= 1 and len(old) == len(new)
        content = content.replace(old, new)
    out.write_bytes(content)
    return out


def test_a_gguf_file_of_another_architecture(made, tmp_path):
    other = replaced(made("micro", "q8_0"), tmp_path / "m.gguf", (b"step35", b"llama9"))
    refused(other, "general.architecture is 'llama9', expected 'step35'")


def test_a_gguf_key_of_another_type(made, tmp_path):
    key = b"step35.block_count" + (4).to_bytes(4, "little")
    other = b"step35.block_count" + (6).to_bytes(4, "little")
    path = replaced(made("micro", "q8_0"), tmp_path / "m.gguf", (key, other))
    refused(path, "step35.block_count", ConfigError)


def test_a_gguf_tensor_that_is_missing_or_misnamed(made, tmp_path):
    path = replaced(
        made("micro", "q8_0"), tmp_path / "m.gguf", (b"blk.1.attn_q.weight", b"blk.7.attn_q.weight")
    )
    refused(path, r"blk\.1\.attn_q\.weight is missing, expected shape \(32, 96\)")


def test_a_gguf_tensor_of_another_shape(made, tmp_path):
    name = b"blk.1.attn_q.weight" + (2).to_bytes(4, "little")
    old = name + (32).to_bytes(8, "little") + (96).to_bytes(8, "little")
    new = name + (96).to_bytes(8, "little") + (32).to_bytes(8, "little")
    path = replaced(made("micro", "q8_0"), tmp_path / "m.gguf", (old, new))
    refused(path, r"blk\.1\.attn_q\.weight has shape \(96, 32\), its keys say \(32, 96\)")


def test_a_gguf_tensor_of_a_type_that_cannot_be_decoded(made, tmp_path):
    name = b"output_norm.weight" + (1).to_bytes(4, "little") + (32).to_bytes(8, "little")
    path = replaced(
        made("micro", "q8_0"),
        tmp_path / "m.gguf",
        (name + (0).to_bytes(4, "little"), name + (26).to_bytes(4, "little")),
    )
    refused(path, r"output_norm\.weight has type I32, which cannot be decoded here")


def split(source, folder, count):
    """A GGUF model as `count` parts, as llama-gguf-split leaves them; written by the library."""
    from gguf import GGUFWriter

    reader = GGUFReader(source)
    total = sum(t.n_bytes for t in reader.tensors)
    writer = GGUFWriter(None, "step35", split_max_size=-(-total // count) + 1)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            sub = kinds[1] if len(kinds) > 1 else None
            writer.add_key_value(key, field.contents(), kinds[0], sub)
    for t in reader.tensors:
        shape = [int(d) for d in t.shape][::-1]
        plain = t.data.dtype != np.uint8
        writer.add_tensor(t.name, t.data.reshape(shape) if plain else t.data, None, t.tensor_type)
    writer.write_header_to_file(folder / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_a_model_split_over_files(made, tmp_path):
    whole = open_checkpoint(made("micro", "q8_0"))
    parts = split(made("micro", "q8_0"), tmp_path, 3)
    assert len(parts) >= 3
    source = open_checkpoint(parts[0])
    assert source.config == whole.config and source.warnings == ()
    for key, layer in (("embed_tokens", None), ("lm_head", None), ("eh_proj", 2)):
        a, b = (s.matrix(key, layer, "f4") for s in (source, whole))
        np.testing.assert_array_equal(a, b)
    refused(parts[1], r"not the first of \d parts; open m-00001-of-")
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    refused(tmp_path / "alone.gguf", "expected a name ending in -00001-of-")
    shutil.copy(parts[0], parts[1])
    refused(parts[0], "is not part 2 of")
    parts[1].unlink()
    refused(parts[0], r"m-00002-of-.* part 2 of \d is missing; download it too")

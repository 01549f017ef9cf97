"""Conversion: both directions, with and without MTP, atomic, and as llama.cpp's converter does."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from quantize_shared import wide

from refimpl.checkpoint import partial
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.gguf_write import write_gguf
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.errors import CheckpointError, ConfigError, InputError
from refimpl.inventory import gguf_inventory

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "converter.json").read_text())
SEED = 5
OUR_OWN_KEYS = {"general.name", "tokenizer.ggml.eot_token_id"}


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.fixture(scope="module")
def like_the_record(tmp_path_factory):
    """The checkpoint that the record was made from, converted by this project."""
    root = tmp_path_factory.mktemp("converted")

    def path(preset, kind):
        folder = root / preset
        if not folder.exists():
            synthesize(PRESETS[preset](), GOLDEN["seed"], folder, GOLDEN["dtype"])
        convert(folder, root / "out.gguf", kind, overwrite=True)
        return root / "out.gguf"

    return path


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_equal_those_of_llama_cpps_converter(like_the_record, preset, kind):
    """Every tensor and key equal, but for general.name, a second stop token that only we keep, and
    rope_freqs, which the converter computes in float32: one unit in the last place."""
    reader = GGUFReader(like_the_record(preset, kind))
    theirs = GOLDEN["presets"][preset][kind]
    ours = {
        t.name: [t.name, t.tensor_type.name, [int(d) for d in t.shape], digest(t.data.tobytes())]
        for t in reader.tensors
    }
    assert ours.keys() == {t[0] for t in theirs["tensors"]}
    for tensor in theirs["tensors"]:
        if tensor[0] != "rope_freqs.weight":
            assert ours[tensor[0]] == tensor
    keys = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert keys.keys() - OUR_OWN_KEYS == theirs["keys"].keys() - OUR_OWN_KEYS
    for key in keys.keys() - OUR_OWN_KEYS:
        field, (types, expected) = keys[key], theirs["keys"][key]
        found = field.contents()
        if isinstance(expected, dict):
            text = json.dumps(found, ensure_ascii=False)
            found = {"length": len(found), "sha256": digest(text.encode())}
        assert ("/".join(t.name for t in field.types), found) == (types, expected), key


def test_rope_divisors_are_llama3s(made):
    """Short wavelengths 1, long ones the factor, ones for lanes that do not rotate."""
    source = open_checkpoint(made("tiny_a", "f32"))
    divisors = np.asarray(source.config.rope_divisors)
    assert divisors[0] == 1.0 and np.all(divisors[3:8] == 2.0) and np.all(divisors[8:] == 1.0)
    assert np.all((divisors[1:3] > 1) & (divisors[1:3] < 2))


@pytest.mark.parametrize("preset", PRESETS)
def test_there_and_back_is_the_same_folder(tmp_path, preset):
    """bf16 folder -> bf16 GGUF -> bf16 folder: the same bytes, config.json included."""
    config = dataclasses.replace(PRESETS[preset](), rope_scaling=None)
    folder = synthesize(config, SEED, tmp_path / "m", "bf16")
    convert(folder, tmp_path / "m.gguf", "bf16")
    convert(tmp_path / "m.gguf", tmp_path / "back", "bf16")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_scaling_that_a_folder_cannot_state_is_not_lost_silently(made, tmp_path):
    with pytest.raises(ConfigError, match="holds only its divisors"):
        convert(made("tiny_a", "q8_0"), tmp_path / "back", "bf16")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_already_of_the_type_are_copied(made, tmp_path, kind):
    """A second conversion loses nothing."""
    convert(made("tiny_b", kind), tmp_path / "again.gguf", kind)
    first, again = read_gguf(made("tiny_b", kind)), read_gguf(tmp_path / "again.gguf")
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.data, again.tensors[name].data, name)


def test_without_mtp(made, tmp_path):
    convert(made("tiny_a", "hf-bf16"), tmp_path / "m.gguf", "q8_0", mtp=False)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert source.config.num_nextn_predict_layers == 0 and source.warnings == ()
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["step35.block_count"] == 9
    assert "step35.nextn_predict_layers" not in file.metadata
    assert not any(name.startswith("blk.9.") for name in file.tensors)


def test_rows_that_do_not_fill_blocks_become_f16(tmp_path, micro):
    odd = dataclasses.replace(micro, moe_intermediate_size=24)
    synthesize(odd, 0, tmp_path / "m", "bf16")
    convert(tmp_path / "m", tmp_path / "m.gguf", "q4_0")
    kinds = {t.name: t.kind.name for t in read_gguf(tmp_path / "m.gguf").tensors.values()}
    assert kinds["blk.1.ffn_down_exps.weight"] == "F16"
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0" and kinds["token_embd.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"


def test_progress_ends_at_the_whole(made, tmp_path):
    seen = []
    convert(
        made("micro", "hf-f32"), tmp_path / "m.gguf", "q8_0", progress=lambda *p: seen.append(p)
    )
    done = [d for d, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] == {t for _, t in seen}.pop()


def stop_at(share):
    """A progress function that interrupts after a share of the bytes."""

    def progress(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_interrupted_conversion_is_continued(made, tmp_path):
    """Whole tensors are kept; the same call writes the rest, and the file is the same."""
    source, out = made("tiny_a", "hf-f32"), tmp_path / "m.gguf"
    for share in (0.4, 0.8):
        said = []
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, "q8_0", progress=stop_at(share), say=said.append)
        assert names(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
        assert "the same command goes on from there" in said[-1]
    first = []
    (note,) = convert(source, out, "q8_0", progress=lambda *done: first.append(done))
    assert "going on after" in note and "of 198 tensors" in note
    assert first[0][0] > 0.5 * first[0][1] and first[-1][0] == first[-1][1]
    assert names(tmp_path) == ["m.gguf"]
    assert out.read_bytes() == made("tiny_a", "q8_0").read_bytes()


def test_a_partial_file_of_another_conversion_is_started_anew(made, tmp_path):
    """Another type, another source, a damaged journal or a shorter file: nothing is taken over."""
    source, out = made("tiny_a", "hf-f32"), tmp_path / "m.gguf"
    partial, journal = tmp_path / "m.gguf.partial", tmp_path / "m.gguf.partial.json"

    def damage():
        journal.write_text("[" * 5000)

    cases = [
        (made("tiny_a", "hf-f32"), "q4_0", lambda: None),
        (made("tiny_a", "hf-bf16"), "q8_0", lambda: None),
        (source, "q8_0", damage),
        (source, "q8_0", lambda: journal.write_text('{"identity": 1, "tensors": -1}')),
        (source, "q8_0", journal.unlink),
        (source, "q8_0", lambda: partial.write_bytes(partial.read_bytes()[:5000])),
        (source, "q8_0", lambda: partial.write_bytes(b"x" + partial.read_bytes()[1:])),
    ]
    for other, kind, change in cases:
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, "q8_0", name="a", progress=stop_at(0.5))
        change()
        notes = convert(other, out, kind, name="a")
        assert [n for n in notes if "starting anew" in n], (kind, change)
        expected = tmp_path / "expected.gguf"
        convert(other, expected, kind, name="a")
        assert out.read_bytes() == expected.read_bytes()
        assert names(tmp_path) == ["expected.gguf", "m.gguf"]
        out.unlink()
        expected.unlink()


def test_interrupted_before_the_first_tensor_is_whole_nothing_stays(made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(made("micro", "hf-f32"), tmp_path / "m.gguf", "q8_0", progress=stop_at(0))
    with pytest.raises(KeyboardInterrupt):
        convert(made("micro", "hf-f32"), tmp_path / "folder", "f16", progress=stop_at(0))
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_is_complete(made, tmp_path):
    def full(done, total):
        if done > total / 2:
            raise OSError(28, "No space left on device")

    source, out = made("micro", "hf-f32"), tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"m.gguf: cannot be written \(No space left on device\)"):
        convert(source, out, "q8_0", progress=full)
    assert names(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
    assert "going on after" in convert(source, out, "q8_0")[0]


def test_a_disk_with_no_room_for_the_journal_keeps_what_is_complete(made, tmp_path, monkeypatch):
    def refused(path):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    source, out = made("micro", "hf-f32"), tmp_path / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(partial, "JOURNAL_BYTES", 1)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, "q8_0", progress=stop_at(0.5))
        patch.setattr(partial, "atomic_file", refused)
        with pytest.raises(InputError, match=r"m.gguf: cannot be written .*No space left"):
            convert(source, out, "q8_0")
    assert names(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
    assert "going on after" in convert(source, out, "q8_0")[0]


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(made, tmp_path, monkeypatch):
    source, usage = made("tiny_a", "hf-f32"), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"m.gguf: needs 1.45 MB, 0.10 MB are free in"):
        convert(source, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(InputError, match=r"/folder: needs 2.6\d MB, 0.10 MB are free in"):
        convert(source, tmp_path / "folder", "bf16")
    assert names(tmp_path) == []


def test_two_conversions_do_not_write_one_file(made, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "m.gguf"
    with open(tmp_path / "m.gguf.partial", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another conversion is writing it"):
            convert(made("micro", "hf-f32"), out, "q8_0")
    assert names(tmp_path) == ["m.gguf.partial"]


def test_a_file_that_is_there_is_kept_unless_forced(made, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    with pytest.raises(InputError, match=r"already exists; choose another name, or --force"):
        convert(made("micro", "hf-f32"), out, "q8_0")
    assert out.read_bytes() == b"old" and names(tmp_path) == ["m.gguf"]
    convert(made("micro", "hf-f32"), out, "q8_0", overwrite=True)
    assert read_gguf(out).tensors
    with pytest.raises(InputError, match="is a folder, expected the name of a file"):
        (tmp_path / "d.gguf").mkdir()
        convert(made("micro", "hf-f32"), tmp_path / "d.gguf", "q8_0", overwrite=True)


def test_a_place_that_cannot_be_written_is_told_before_the_source_is_read(made, tmp_path):
    source = made("micro", "hf-f32")
    for out, message in (
        (tmp_path / "none" / "m.gguf", "the folder .*none does not exist"),
        (tmp_path / f"{'x' * 300}.gguf", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source.with_name("no such source"), out, "q8_0")
    assert names(tmp_path) == []


def test_an_error_in_the_data_leaves_nothing(made, tmp_path, monkeypatch):
    from refimpl.checkpoint import gguf_write

    real = gguf_write.encode

    def encode(kind, values, where):
        if "layers.1.moe.down_proj" in where:
            raise CheckpointError("damaged")
        return real(kind, values, where)

    monkeypatch.setattr(gguf_write, "encode", encode)
    with pytest.raises(CheckpointError, match="damaged"):
        convert(made("micro", "hf-f32"), tmp_path / "m.gguf", "q8_0")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_s", "iq4_xs"])
def test_any_number_of_threads_gives_the_same_bytes(made, tmp_path, monkeypatch, kind):
    from refimpl.checkpoint import gguf_write

    monkeypatch.setattr(gguf_write, "PIECE_VALUES", 1000)
    for threads in (1, 2, 5):
        out = tmp_path / f"{threads}.gguf"
        convert(made("tiny_b", "hf-f32"), out, kind, name="m", threads=threads)
        assert out.read_bytes() == (tmp_path / "1.gguf").read_bytes()


def test_quantising_again_is_done_and_remarked(made, tmp_path):
    again = convert(made("tiny_a", "q4_0"), tmp_path / "m.gguf", "q8_0")
    assert len(again) == 1 and "quantised again (most from Q4_0 to Q8_0)" in again[0]
    assert convert(made("tiny_a", "q4_0"), tmp_path / "f32.gguf", "f32") == ()
    assert convert(made("tiny_a", "q4_0"), tmp_path / "same.gguf", "q4_0") == ()


def test_values_beyond_f16_are_refused(tmp_path, micro):
    """4e5 fits bf16 and f32; in F16 it would silently become infinity."""
    from refimpl.checkpoint.hf_write import write_hf
    from refimpl.checkpoint.synth import random_chunks

    def chunks(spec):
        for chunk in random_chunks(spec, 0):
            yield chunk * 4e5 if spec.key == "v_proj" else chunk

    write_hf(micro, chunks, tmp_path / "m", "bf16")
    with pytest.raises(CheckpointError, match=r"v_proj.* beyond F16; choose bf16"):
        convert(tmp_path / "m", tmp_path / "m.gguf", "f16")
    with pytest.raises(CheckpointError, match=r"v_proj.* beyond F16; choose bf16"):
        convert(tmp_path / "m", tmp_path / "f16", "f16")
    convert(tmp_path / "m", tmp_path / "m.gguf", "bf16")


def test_values_that_are_not_finite_cannot_be_quantised(tmp_path, micro):
    from refimpl.checkpoint.hf_write import write_hf
    from refimpl.checkpoint.synth import random_chunks

    def chunks(spec):
        for chunk in random_chunks(spec, 0):
            yield np.full_like(chunk, np.nan) if spec.key == "v_proj" else chunk

    write_hf(micro, chunks, tmp_path / "m", "f32")
    with pytest.raises(CheckpointError, match=r"v_proj.*not finite"):
        convert(tmp_path / "m", tmp_path / "m.gguf", "q8_0")


def test_outputs_that_cannot_be_written_are_refused(made, tmp_path):
    model = made("micro", "q8_0")
    cases = [
        (model, "f16", "is the checkpoint itself"),
        (tmp_path / "m.gguf", "q5_k", "can hold f32, f16, bf16, q8_0, q4_0, q4_k_s"),
        (tmp_path / "folder", "q8_0", "can hold f32, f16, bf16"),
        (tmp_path / "none" / "m.gguf", "f16", "cannot be written"),
    ]
    for out, kind, message in cases:
        with pytest.raises(InputError, match=message):
            convert(model, out, kind)
    with pytest.raises(InputError, match="already exists"):
        convert(made("micro", "hf-f32"), model.parent, "f16")


def test_a_file_without_a_tokenizer_says_so(made, tmp_path):
    folder = tmp_path / "m"
    synthesize(PRESETS["tiny_a"](), 0, folder)
    (folder / "tokenizer.json").unlink()
    notes = convert(folder, tmp_path / "m.gguf", "q8_0")
    assert len(notes) == 1 and "token ids only" in notes[0]
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.ggml.model"] == "no_vocab"
    assert file.metadata["step35.vocab_size"] == 320
    assert open_checkpoint(tmp_path / "m.gguf").config.eos_token_id == (1,)


def test_the_inventory_is_what_is_written(made):
    file = read_gguf(made("tiny_a", "f32"))
    specs = gguf_inventory(PRESETS["tiny_a"]())
    assert {t.gguf_name: t.gguf_shape for t in specs} == {
        t.name: t.dims for t in file.tensors.values()
    }


def test_the_type_of_each_tensor_can_be_chosen(made, tmp_path):
    source = open_checkpoint(made("micro", "hf-f32"))
    write_gguf(source, tmp_path / "m.gguf", "f16", type_of=lambda spec: "F32")
    assert {t.kind.name for t in read_gguf(tmp_path / "m.gguf").tensors.values()} == {"F32"}


@pytest.mark.parametrize("kind", ["q4_k_m", "iq4_xs"])
def test_a_continued_file_of_searched_types_is_the_same(tmp_path, kind):
    """Interrupted three times, the file has the bytes of an uninterrupted conversion."""
    folder = synthesize(wide().without_mtp(), SEED, tmp_path / "m", "bf16")
    convert(folder, tmp_path / "once.gguf", kind, name="m")
    out = tmp_path / "again.gguf"
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, kind, name="m", progress=stop_at(share))
    assert "going on after" in convert(folder, out, kind, name="m")[0]
    assert out.read_bytes() == (tmp_path / "once.gguf").read_bytes()

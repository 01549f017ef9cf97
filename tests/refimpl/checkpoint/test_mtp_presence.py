"""MTP layers inside, left out, declared but missing, or damaged."""

import dataclasses
import shutil

import pytest

from refimpl.checkpoint import gguf_write
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.hf_write import write_hf
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, random_chunks
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec


def test_inside(made):
    for form in ("hf-bf16", "q8_0"):
        source = open_checkpoint(made("tiny_a", form))
        assert len(source.config.mtp) == 3 and source.warnings == ()
        assert source.matrix("eh_proj", 11, "f4").shape == (64, 128)


def test_absent(tmp_path):
    config = PRESETS["tiny_a"]().without_mtp()
    write_hf(config, lambda t: random_chunks(t, 0), tmp_path / "m", "bf16")
    source = open_checkpoint(tmp_path / "m")
    assert source.config.mtp == () and source.warnings == ()


def test_declared_but_missing_in_a_folder(made, tmp_path):
    config = PRESETS["tiny_a"]().without_mtp()
    write_hf(config, lambda t: random_chunks(t, 0), tmp_path / "m", "bf16")
    shutil.copy(made("tiny_a", "hf-bf16") / "config.json", tmp_path / "m" / "config.json")
    source = open_checkpoint(tmp_path / "m")
    assert source.config.mtp == () and len(source.config.trunk) == 9
    (warning,) = source.warnings
    assert "declares 3 MTP layers but holds none" in warning


def write_changed(made, out, monkeypatch, change):
    """tiny_a as GGUF with all its keys, its list of tensors passed through `change`."""
    whole = gguf_write.gguf_inventory
    with monkeypatch.context() as patch:
        changed = lambda c: tuple(new for t in whole(c) for new in change(t))  # noqa: E731
        patch.setattr(gguf_write, "gguf_inventory", changed)
        gguf_write.write_gguf(open_checkpoint(made("tiny_a", "hf-f32")), out, "q8_0")
    return out


def write_partly(made, out, monkeypatch, keep):
    return write_changed(made, out, monkeypatch, lambda t: [t] if keep(t) else [])


def test_declared_but_missing_in_a_gguf_file(made, tmp_path, monkeypatch):
    """Files split into target and draft: the keys say 12 blocks, the tensors are of 9."""
    out = write_partly(made, tmp_path / "m.gguf", monkeypatch, lambda t: t.role != "mtp")
    source = open_checkpoint(out)
    assert source.config.mtp == () and len(source.config.trunk) == 9
    assert len(source.warnings) == 1 and "declares 3 MTP layers" in source.warnings[0]


def test_partly_missing_is_damage(made, tmp_path, monkeypatch):
    def keep(t: TensorSpec) -> bool:
        return not (t.layer == 10 and t.key == "eh_proj")

    out = write_partly(made, tmp_path / "m.gguf", monkeypatch, keep)
    message = r"blk\.10\.nextn\.eh_proj\.weight is missing, expected shape \(128, 64\)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(out)


def test_a_draft_file_alone_cannot_be_run(made, tmp_path, monkeypatch):
    def keep(t: TensorSpec) -> bool:
        return t.role in ("mtp", "embedding", "head", "rope") or t.key == "norm"

    out = write_partly(made, tmp_path / "mtp-m.gguf", monkeypatch, keep)
    with pytest.raises(CheckpointError, match="open the main model's file"):
        open_checkpoint(out)


def test_the_older_name_of_the_router_bias_is_read(made, tmp_path, monkeypatch):
    """`blk.N.exp_probs_b` without `.bias`, as some files have it."""

    def older(t: TensorSpec) -> TensorSpec:
        return dataclasses.replace(
            t, gguf_name=t.gguf_name.replace("exp_probs_b.bias", "exp_probs_b")
        )

    out = write_changed(made, tmp_path / "m.gguf", monkeypatch, lambda t: [older(t)])
    assert "blk.5.exp_probs_b" in read_gguf(out).tensors
    a, b = open_checkpoint(out), open_checkpoint(made("tiny_a", "q8_0"))
    assert a.warnings == ()
    assert (a.vector("router_bias", 5, "f4") == b.vector("router_bias", 5, "f4")).all()

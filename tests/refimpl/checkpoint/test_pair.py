"""A main file and its MTP layers in a file of their own, as llama.cpp's converter writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refimpl.backends import open_backend
from refimpl.checkpoint import gguf_write
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.cli import main
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.errors import CheckpointError, InputError
from refimpl.inventory import TensorSpec, gguf_inventory, inventory

Made = Callable[[str, str], Path]
THEIRS = json.loads((Path(__file__).parents[2] / "golden" / "mtp_file.json").read_text())
OUTSIDE = ("embed_tokens", "norm", "lm_head", "rope_freqs")


def write_mtp(source: Path, out: Path, kind: str, patch: pytest.MonkeyPatch) -> Path:
    """The MTP layers alone, with the tensors outside the layers once more."""

    def kept(spec: TensorSpec) -> bool:
        return spec.role == "mtp" or spec.key in OUTSIDE

    with patch.context() as during:
        during.setattr(
            gguf_write, "gguf_inventory", lambda c: tuple(filter(kept, gguf_inventory(c)))
        )
        convert(source, out, kind)
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """tiny_a whole, its main file and its MTP file, all BF16."""
    work = tmp_path_factory.mktemp("pair")
    folder = synthesize(PRESETS["tiny_a"](), THEIRS["seed"], work / "tiny_a")
    convert(folder, work / "whole.gguf", "bf16")
    convert(folder, work / "main.gguf", "bf16", mtp=False)
    with pytest.MonkeyPatch.context() as patch:
        write_mtp(folder, work / "mtp-main.gguf", "bf16", patch)
    return work / "whole.gguf", work / "main.gguf", work / "mtp-main.gguf"


def test_the_files_of_these_tests_are_those_of_the_converter(
    pair: tuple[Path, Path, Path],
) -> None:
    """Tensors by name, type, dimensions and bytes; and the keys that say what the file is."""
    for title, path in zip(("main", "mtp"), pair[1:], strict=True):
        file = read_gguf(path)
        ours = {
            t.name: [t.kind.name, list(t.dims), hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
            for t in file.tensors.values()
        }
        assert ours == {name: rest for name, *rest in THEIRS[title]["tensors"]}
        for key in ("step35.block_count", "step35.nextn_predict_layers"):
            theirs = THEIRS[title]["keys"].get(key)
            assert file.metadata.get(key) == (None if theirs is None else theirs[1])


def test_a_pair_is_the_whole_model(pair: tuple[Path, Path, Path]) -> None:
    whole, both = open_checkpoint(pair[0]), open_checkpoint(pair[1], mtp_path=pair[2])
    assert both.config == whole.config
    assert both.warnings == ()
    for spec in inventory(whole.config):
        a, b = (s.stored(spec.key, spec.layer) for s in (whole, both))
        np.testing.assert_array_equal(a.rows, b.rows)


def test_a_main_file_may_declare_the_layers_that_it_lacks(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = [t for t in gguf_inventory(PRESETS["tiny_a"]()) if t.role != "mtp"]
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "gguf_inventory", lambda c: tuple(trunk))
        convert(pair[0], tmp_path / "m.gguf", "bf16")
    assert open_checkpoint(tmp_path / "m.gguf").warnings
    both = open_checkpoint(tmp_path / "m.gguf", mtp_path=pair[2])
    assert both.warnings == ()
    assert len(both.config.mtp) == 3


@pytest.mark.parametrize("backend", ["reference", "engine"])
def test_drafts_of_a_pair_are_those_of_the_whole(
    pair: tuple[Path, Path, Path], backend: str
) -> None:
    made = []
    for source in (open_checkpoint(pair[0]), open_checkpoint(pair[1], mtp_path=pair[2])):
        model = open_backend(source, backend)
        options = GenerateOptions(max_new_tokens=8, mtp=3)
        text = generate(model, [5, 17, 300, 4, 90, 211], options)
        assert text.mtp.drafted > 0
        made.append((text.ids, text.mtp))
    assert made[0] == made[1]


def test_another_quantisation_of_the_same_model_fits(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published second files are Q8_0 whatever the first is; a folder may be either side."""
    convert(pair[1], tmp_path / "q4.gguf", "q4_0")
    write_mtp(pair[0], tmp_path / "mtp.gguf", "q8_0", monkeypatch)
    both = open_checkpoint(tmp_path / "q4.gguf", mtp_path=tmp_path / "mtp.gguf")
    assert both.stored("q_proj", 0).kind.name == "Q4_0"
    assert both.stored("q_proj", 9).kind.name == "Q8_0"
    folder = pair[0].parent / "tiny_a"
    assert len(open_checkpoint(pair[1], mtp_path=folder).config.mtp) == 3


def test_strangers_are_refused(
    pair: tuple[Path, Path, Path], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, trunk, mtp = pair
    cases = [
        (whole, mtp, "holds its MTP layers itself"),
        (trunk, trunk, "declares no MTP layers"),
        (trunk, made("tiny_b", "hf-f32"), "hidden_size is 96, expected 64"),
        (trunk, tmp_path / "none.gguf", "no such file"),
    ]
    synthesize(PRESETS["tiny_a"](), 99, tmp_path / "other")  # the same sizes, other weights
    other = write_mtp(tmp_path / "other", tmp_path / "other.gguf", "bf16", monkeypatch)
    cases.append((trunk, other, "token embeddings are not those"))
    wide = dataclasses.replace(PRESETS["tiny_a"](), sliding_window=17)
    synthesize(wide, THEIRS["seed"], tmp_path / "wide")
    cases.append((trunk, tmp_path / "wide", "sliding_window is 17, expected 16"))
    based = dataclasses.replace(PRESETS["tiny_a"](), rope_theta=(1e5,) * 12)
    synthesize(based, THEIRS["seed"], tmp_path / "based")
    cases.append((trunk, tmp_path / "based", "rope_theta differs"))
    for a, b, words in cases:
        with pytest.raises(CheckpointError, match=words) as raised:
            open_checkpoint(a, mtp_path=b)
        assert "\n" not in str(raised.value)


def run(*args: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(main, [str(a) for a in args])


def test_inspect_counts_a_pair_once(pair: tuple[Path, Path, Path]) -> None:
    whole, both = inspect(pair[0]), inspect(pair[1], check=True, mtp_path=pair[2])
    assert both.roles == whole.roles
    assert both.problems == ()
    assert both.mtp_state == "present"
    shown = run("inspect", pair[1], "--mtp-model", pair[2]).stdout
    assert "MTP layers: 3 of 3\n" in shown
    assert "GGUF in 2 files" in shown
    refused = run("inspect", pair[0], "--mtp-model", pair[2])
    assert refused.exit_code == 2
    assert "holds its MTP layers itself" in refused.stderr


def test_inspect_knows_a_file_of_mtp_layers_alone(pair: tuple[Path, Path, Path]) -> None:
    done = run("inspect", pair[2], "--check")
    assert done.exit_code == 0
    assert "MTP layers alone: give this file with --mtp-model" in done.stdout
    data = json.loads(run("inspect", pair[2], "--json").stdout)
    assert data["mtp_layers_only"] is True
    assert data["declared_parameters"] is None
    assert data["missing"] == []


def test_commands_take_the_pair(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text("[5, 17, 300, 4, 90, 211]")
    texts = []
    for model in ((pair[0],), (pair[1], "--mtp-model", pair[2])):
        options = ("--tokens", ids, "--max-new-tokens", 6, "--mtp", 3, "--json")
        done = run("generate", "--backend", "reference", "--model", *model, *options)
        assert done.exit_code == 0, done.stderr
        texts.append([json.loads(done.stdout)[k] for k in ("ids", "mtp")])
    assert texts[0] == texts[1]
    assert texts[1][1]["drafted"] > 0
    out = tmp_path / "g.npz"
    done = run(
        "golden", "dump", "--model", pair[1], "--mtp-model", pair[2], "--tokens", ids, "--out", out
    )
    assert done.exit_code == 0, done.stderr
    with np.load(out) as arrays:
        assert "mtp_forced_logits_2" in arrays
    done = run(
        "golden", "dump", "--model", pair[1], "--mtp-model", pair[2], "--tokens", ids, "--out", out,
        "--layers", "0:1",
    )  # fmt: skip
    assert done.exit_code == 2


def test_a_pair_is_converted_into_one_file(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The tensors of the whole model's own conversion; and options that contradict each other."""
    whole, trunk, mtp = pair
    convert(whole, tmp_path / "whole.gguf", "q8_0")
    args = ["convert", str(trunk), str(tmp_path / "joined.gguf"), "--type", "q8_0"]
    done = CliRunner().invoke(main, [*args, "--mtp-model", str(mtp)])
    assert done.exit_code == 0, done.stderr
    expected, found = (read_gguf(tmp_path / f"{n}.gguf").tensors for n in ("whole", "joined"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor.data, found[name].data, name)
    for extra, sentence in (
        (["--mtp-model", str(mtp), "--no-mtp"], "give one of them"),
        (["--mtp-model", str(tmp_path / "none.gguf"), "--force"], "none.gguf"),
        (["--mtp-model", str(trunk), "--force"], "declares no MTP layers"),
    ):
        wrong = CliRunner().invoke(main, [*args, *extra])
        assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1
        assert sentence in wrong.stderr
    with pytest.raises(InputError, match="is the checkpoint itself"):
        convert(trunk, mtp, "q8_0", overwrite=True, mtp_path=mtp)

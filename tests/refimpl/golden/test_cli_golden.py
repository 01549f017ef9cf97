"""The golden commands as a user runs them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from refimpl.cli import main

IDS = [5, 17, 300, 4, 9, 12, 44, 100, 7, 8, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]


def refimpl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def dumped(tmp_path: Path, tiny_dir: Callable[[str], Path]) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    for dtype in ("float64", "float32", "bf16"):
        done = refimpl(
            "golden", "dump", "--model", tiny_dir("tiny_a"), "--tokens", tmp_path / "ids.json",
            "--out", tmp_path / f"{dtype}.npz", "--dtype", dtype, "--new", 4,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert not done.stdout
    return tmp_path


def test_compare_prints_a_table_and_a_verdict(dumped: Path) -> None:
    same = refimpl("golden", "compare", dumped / "float64.npz", dumped / "float32.npz")
    assert same.exit_code == 0
    assert same.stdout.endswith("equal within 5e-05\n")
    other = refimpl("golden", "compare", dumped / "float64.npz", dumped / "bf16.npz")
    assert other.exit_code == 1
    assert "differs from layer " in other.stdout
    assert "the routing margin there is" in other.stdout
    strict = refimpl(
        "golden", "compare", dumped / "float64.npz", dumped / "float32.npz", "--tolerance", 0
    )
    assert strict.exit_code == 1


def test_compare_json(dumped: Path) -> None:
    done = refimpl("golden", "compare", dumped / "float64.npz", dumped / "bf16.npz", "--json")
    data = json.loads(done.stdout)
    assert data["equal"] is False
    assert data["first_departure"]["place"].startswith("layer ")
    assert {"max", "rms", "nmse", "kl_mean", "top1"} <= set(data["differences"][0])


def test_a_mistake_made_on_purpose_is_found(dumped: Path, tiny_dir: Callable[[str], Path]) -> None:
    done = refimpl(
        "golden", "dump", "--model", tiny_dir("tiny_a"), "--tokens", dumped / "ids.json",
        "--out", dumped / "wrong.npz", "--variant", "window_minus_1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = refimpl("golden", "compare", dumped / "float32.npz", dumped / "wrong.npz")
    assert found.exit_code == 1
    assert "differs from layer 1 attn_out on" in found.stdout


@pytest.mark.parametrize(
    ("tokens", "more", "words"),
    [
        ("[]", (), "empty"),
        ("[1, 999]", (), "outside the vocabulary"),
        ("nonsense", (), "not valid JSON"),
        ("[1]", ("--new", -1), "new is -1"),
        ("[1]", ("--new", 600), "context of 512"),
        ("[1]", ("--model", "nowhere"), "nowhere"),
        ("[1]", ("--variant", "nothing"), "no known mistake"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    tiny_dir: Callable[[str], Path],
    tokens: str,
    more: tuple[object, ...],
    words: str,
) -> None:
    (tmp_path / "ids.json").write_text(tokens)
    out = tmp_path / "out.npz"
    done = refimpl(
        "golden", "dump", "--model", tiny_dir("tiny_a"), "--tokens", tmp_path / "ids.json",
        "--out", out, *more,
    )  # fmt: skip
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_a_checkpoint_whose_values_overflow_is_one_line_and_writes_nothing(
    tmp_path: Path, tiny_dir: Callable[[str], Path]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dir("tiny_a"), model)
    tensors = load_file(model / "model.safetensors")
    for part in ("gate", "up"):
        name = f"model.layers.0.mlp.{part}_proj.weight"
        tensors[name] = tensors[name] * np.asarray(1e30, tensors[name].dtype)
    save_file(tensors, model / "model.safetensors")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    out = tmp_path / "out.npz"
    asked = ("--model", model, "--tokens", tmp_path / "ids.json")
    for more in ((), ("--layers", "0:2")):
        done = refimpl("golden", "dump", *asked, "--out", out, *more)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert "not finite" in done.stderr
        assert not out.exists()
    done = refimpl("generate", *asked)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("more", [(), ("--layers", "0:1")])
def test_only_golden_files_are_replaced(
    tmp_path: Path, tiny_dir: Callable[[str], Path], more: tuple[str, ...]
) -> None:
    ids, model, other = tmp_path / "ids.json", tmp_path / "model.gguf", tmp_path / "other"
    ids.write_text("[1, 2]")
    other.write_text("precious")
    made = refimpl("convert", tiny_dir("tiny_a"), model, "--type", "f32")
    assert made.exit_code == 0, made.stderr
    before = model.read_bytes()
    for out, words in (
        (model, "is read by this run"),
        (ids, "is read by this run"),
        (other, "is no golden file"),
        (tmp_path / "nowhere" / "out.npz", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        done = refimpl("golden", "dump", "--model", model, "--tokens", ids, "--out", out, *more)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr
    assert (model.read_bytes(), ids.read_text(), other.read_text()) == (
        before, "[1, 2]", "precious"
    )  # fmt: skip
    again = ("golden", "dump", "--model", model, "--tokens", ids, "--out", tmp_path / "o.npz")
    assert [refimpl(*again, *more).exit_code for _ in range(2)] == [0, 0]


def test_a_piece_does_not_replace_its_own_input(
    tmp_path: Path, tiny_dir: Callable[[str], Path]
) -> None:
    ids, piece = tmp_path / "ids.json", tmp_path / "piece.npz"
    ids.write_text("[1, 2]")
    asked = ("golden", "dump", "--model", tiny_dir("tiny_a"), "--tokens", ids, "--out", piece)
    assert refimpl(*asked, "--layers", "0:1").exit_code == 0
    done = refimpl(*asked, "--layers", "1:2", "--hidden-in", piece)
    assert done.exit_code == 2
    assert "is read by this run" in done.stderr

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

"""A model verified in pieces: the same numbers as a whole run, from the shards of those layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.cli import main
from refimpl.config import published
from refimpl.errors import InputError
from refimpl.golden.files import read_golden
from refimpl.golden.pieces import parse_layers

T = 20
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 320, T)]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["golden", *[str(a) for a in args]])


def dump(folder: Path, model: Path, out: str, *more: object) -> Result:
    (folder / "ids.json").write_text(json.dumps(IDS))
    return run(
        "dump", "--model", model, "--tokens", folder / "ids.json", "--out", folder / out,
        "--dtype", "float64", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole golden file `all.npz` of a sharded folder `m` and of `m.gguf`."""
    folder = tmp_path_factory.mktemp("pieces")
    synthesize(PRESETS["tiny_a"](), 2, folder / "m", "f32", max_shard_bytes=700_000)
    convert(folder / "m", folder / "m.gguf", "f32")
    assert dump(folder, folder / "m", "all.npz").exit_code == 0
    return folder


@pytest.mark.parametrize("form", ["m", "m.gguf"])
def test_a_chain_of_pieces_equals_the_whole(work: Path, form: str) -> None:
    before: tuple[object, ...] = ()
    for first, stop in ((0, 1), (1, 4), (4, 9)):
        name = f"{form}-{first}.npz"
        done = dump(work, work / form, name, "--layers", f"{first}:{stop}", *before)
        assert done.exit_code == 0, done.output
        before = ("--hidden-in", work / name)
        tolerance = 1e-9 if form == "m" else 1e-6  # GGUF rounds 1 + w of the norms to float32
        same = run("compare", work / "all.npz", work / name, "--tolerance", tolerance)
        assert same.exit_code == 0, same.output
        assert f"layer {stop - 1} output" in same.stdout
        assert f"layer {stop} output" not in same.stdout
    arrays, meta = read_golden(work / f"{form}-4.npz")
    assert arrays["layers"].tolist() == [4, 9]
    assert arrays["logits"].shape == (T, 320)
    assert meta["command"] == "refimpl golden dump --dtype float64 --layers 4:9"


def test_only_the_shards_of_the_layers_are_needed(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    index = json.loads((work / "m" / "model.safetensors.index.json").read_text())
    needed = {f for n, f in index["weight_map"].items() if n.startswith("model.layers.5.")}
    for file in (work / "m").iterdir():
        if file.suffix != ".safetensors" or file.name in needed:
            (folder / file.name).symlink_to(file)
    assert 0 < len(needed) < len(set(index["weight_map"].values()))
    piece = ("--layers", 5, "--hidden-in", work / "all.npz")
    assert dump(tmp_path, folder, "5.npz", *piece).exit_code == 0
    assert run("compare", work / "all.npz", tmp_path / "5.npz").exit_code == 0
    other = dump(tmp_path, folder, "0.npz", "--layers", "0:1")
    assert other.exit_code == 2
    assert "is missing" in other.stderr
    assert "complete the download" in other.stderr


@pytest.mark.parametrize("form", ["f32", "fp8"])
def test_other_shards_are_never_opened(tmp_path: Path, form: str) -> None:
    """They are poisoned here: opening one would fail, reading one would change the numbers."""
    folder = synthesize(PRESETS["tiny_a"](), 2, tmp_path / "m", form, max_shard_bytes=300_000)
    assert dump(tmp_path, folder, "all.npz").exit_code == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layer = {n for n in index if n.startswith("model.layers.6.")}
    assert len(layer) == (20 if form == "fp8" else 17)  # three experts' scales
    needed = {index[name] for name in layer}
    others = set(index.values()) - needed
    assert needed
    assert others
    for name in others:
        (folder / name).write_bytes(b"\xff" * 4096)
    piece = ("--layers", "6:7", "--hidden-in", tmp_path / "all.npz")
    done = dump(tmp_path, folder, "6.npz", *piece)
    assert done.exit_code == 0, done.stderr
    compared = run("compare", tmp_path / "all.npz", tmp_path / "6.npz", "--tolerance", 0)
    assert compared.exit_code == 0, compared.stdout
    refused = dump(tmp_path, folder, "5.npz", "--layers", "0:9")
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1


def test_inspect_names_the_shards_to_download(tmp_path: Path) -> None:
    """From config.json and the index alone; then, of the named files, which are here."""
    made = synthesize(PRESETS["tiny_a"](), 2, tmp_path / "m", "fp8", max_shard_bytes=300_000)
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes((made / name).read_bytes())
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]

    def asked(layers: str) -> tuple[int, dict[str, object]]:
        args = ["inspect", str(folder), "--layers", layers, "--json"]
        done = CliRunner().invoke(main, args)
        return done.exit_code, json.loads(done.stdout)

    def expected(*parts: str) -> list[str]:
        return sorted({index[n] for n in index if any(n.startswith(p) for p in parts)})

    for layers, parts in (
        ("6:7", ("model.layers.6.",)),
        ("0", ("model.layers.0.", "model.embed_tokens.")),
        ("8", ("model.layers.8.", "model.norm.", "lm_head.")),
    ):
        code, found = asked(layers)
        assert code == 1
        assert [f["name"] for f in found["files"]] == expected(*parts)  # type: ignore[attr-defined]
        assert not any(f["present"] for f in found["files"])  # type: ignore[attr-defined]
    for name in expected("model.layers.6."):
        (folder / name).symlink_to(made / name)
    code, found = asked("6:7")
    assert (code, found["complete"], found["nowhere"]) == (0, True, [])
    shown = CliRunner().invoke(main, ["inspect", str(folder), "--layers", "6"]).stdout
    assert shown.splitlines()[0].endswith("tensors of these layers, here")
    refused = CliRunner().invoke(main, ["inspect", str(folder), "--layers", "6", "--check"])
    assert refused.exit_code == 2


def test_a_mistake_in_one_layer_is_found_from_its_own_input(work: Path, tmp_path: Path) -> None:
    arrays, _ = read_golden(work / "all.npz")
    theirs = {"prompt": arrays["prompt"], "hidden": arrays["hidden"].copy()}
    theirs["hidden"][4] += 1e-3  # layer 3's output, which is also layer 4's input
    np.savez(tmp_path / "theirs.npz", **theirs)  # type: ignore[arg-type]
    piece = ("--layers", "3:4", "--hidden-in", tmp_path / "theirs.npz")
    assert dump(tmp_path, work / "m", "3.npz", *piece).exit_code == 0
    done = run("compare", tmp_path / "theirs.npz", tmp_path / "3.npz")
    assert done.exit_code == 1
    assert "differs from layer 3 output on" in done.stdout


def test_last_rows_and_topk(work: Path) -> None:
    assert dump(work, work / "m", "small.npz", "--last", 3, "--topk", 4).exit_code == 0
    whole, _ = read_golden(work / "all.npz")
    small, _ = read_golden(work / "small.npz")
    assert small["positions"].tolist() == [17, 18, 19]
    assert small["hidden"].shape == (10, 3, 64)
    assert "logits" not in small
    logits = whole["logits"][-3:]
    np.testing.assert_array_equal(small["topk_ids"], np.argsort(-logits, axis=-1)[:, :4])
    logprobs = small["topk_logits"] - small["log_normaliser"][:, None]
    exact = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(logprobs), -np.sort(-exact, axis=-1)[:, :4], rtol=1e-9)
    same = run("compare", work / "all.npz", work / "small.npz", "--tolerance", 1e-9)
    assert same.exit_code == 0, same.output
    assert "topk_logits" in same.stdout


def test_pieces_that_share_nothing(work: Path) -> None:
    for name, more in (("p0.npz", ("--layers", "0:1")), ("p8.npz", ("--layers", "8:9",
                       "--hidden-in", work / "all.npz"))):  # fmt: skip
        assert dump(work, work / "m", name, *more).exit_code == 0
    done = run("compare", work / "p0.npz", work / "p8.npz")
    assert done.exit_code == 2
    assert "none in common" in done.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--layers", "3:4"), "layer 3 needs its input; give it with --hidden-in FILE"),
        (("--layers", "4:3"), "expected A:B with 0 <= A < B <= 9"),
        (("--layers", "9"), "expected A:B"),
        (("--layers", "x"), "expected A:B"),
        (
            ("--layers", "5", "--hidden-in", "0.npz"),
            "holds inputs of layers 0 to 1, not of layer 5",
        ),
        (("--layers", "5", "--hidden-in", "short.npy"), "expected (20, 64): one for every token"),
        (("--layers", "5", "--hidden-in", "ids.json"), "not a readable .npy or .npz file"),
        (("--last", 0), "last is 0, the prompt has 20 tokens"),
        (("--topk", 999), "the vocabulary has 320 entries"),
        (("--layers", "0:1", "--new", 3), "pieces take neither --new"),
    ],
)
def test_impossible_pieces_get_one_sentence(
    work: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], words: str
) -> None:
    monkeypatch.chdir(work)
    if not (work / "0.npz").exists():
        assert dump(work, work / "m", "0.npz", "--layers", "0").exit_code == 0
    np.save(work / "short.npy", np.zeros((3, 64)))
    done = dump(work, work / "m", "none.npz", *more)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (work / "none.npz").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:45", (0, 45)), (":", (0, 45)), ("44:", (44, 45)), (":3", (0, 3)), ("7", (7, 8))],
)
def test_ranges_of_layers(text: str, expected: tuple[int, int]) -> None:
    assert parse_layers(text, published()) == expected
    with pytest.raises(InputError, match="trunk layers"):
        parse_layers("44:46", published())


def test_whole_files_compare_as_ever(work: Path) -> None:
    done = run("compare", work / "all.npz", work / "all.npz")
    assert done.exit_code == 0
    assert "mtp_forced_logits_2" in done.stdout


@pytest.mark.parametrize("limited", [False, True])
def test_the_engine_runs_pieces_of_a_whole_file(
    work: Path, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each from the file of the one before, and from the reference's; also with experts that are
    read from disk when they are chosen."""
    from refimpl.engine import budget

    how: tuple[object, ...] = ("--backend", "engine", "--exact", "--dtype", "float32")
    if limited:
        monkeypatch.setattr(budget, "_slots", lambda source, program, size, room, left: 40)
        monkeypatch.setattr(budget, "own_bytes", lambda: 0)
        how += ("--memory", "0.001")
    before: tuple[object, ...] = ()
    for first, stop in ((0, 1), (1, 4), (4, 9)):
        for source in (before, ("--hidden-in", work / "all.npz") if first else ()):
            name, piece = f"engine-{first}.npz", ("--layers", f"{first}:{stop}")
            done = dump(work, work / "m.gguf", name, *piece, *how, *source)
            assert done.exit_code == 0, done.stderr
            assert ("are read when chosen" in done.stderr) == limited
            same = run("compare", work / "all.npz", work / name)
            assert same.exit_code == 0, same.output
            assert f"layer {stop - 1} output" in same.stdout
        before = ("--hidden-in", work / name)
    arrays, meta = read_golden(work / "engine-4.npz")
    assert arrays["logits"].shape == (T, 320) and arrays["final"].shape == (T, 64)
    assert meta["command"].endswith("--layers 4:9 --backend engine --exact")
    small = (*how, "--layers", "4:", "--hidden-in", work / "all.npz", "--last", 3, "--topk", 4)
    assert dump(work, work / "m.gguf", "small-engine.npz", *small).exit_code == 0
    assert run("compare", work / "all.npz", work / "small-engine.npz").exit_code == 0

"""`golden diagnose` names planted mistakes, in every form, and calls rounding rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from refimpl.checkpoint.source import WeightSource
from refimpl.cli import main
from refimpl.golden.candidate import from_arrays
from refimpl.golden.diagnose import Diagnosis, diagnose
from refimpl.golden.dump import golden_arrays
from refimpl.golden.files import write_golden
from refimpl.reference.model import ReferenceModel
from refimpl.reference.variant import NORMATIVE, VARIANTS, Variant

Tiny = Callable[[str], WeightSource]
Arrays = dict[str, np.ndarray]
T = 24
IDS = [int(i) for i in np.random.default_rng(11).integers(3, 259, T)]


@pytest.fixture(scope="module")
def run(tiny: Tiny) -> Callable[..., Arrays]:
    """run(variant name or None, preset, dtype): the golden arrays of a run, computed once."""
    made: dict[Any, Arrays] = {}

    def arrays(name: str | None, preset: str = "tiny_a", dtype: str = "float32") -> Arrays:
        if (name, preset, dtype) not in made:
            flags = VARIANTS[name].flags if name else NORMATIVE
            model = ReferenceModel(tiny(preset), dtype, flags)
            made[name, preset, dtype] = golden_arrays(model, IDS)
        return made[name, preset, dtype]

    return arrays


def ask(source: WeightSource, arrays: Arrays, **more: Any) -> Diagnosis:
    return diagnose(source, from_arrays("a test", arrays, {}, source.config), **more)


def logits_of(arrays: Arrays) -> Arrays:
    return {"prompt": arrays["prompt"], "logits": arrays["logits"]}


@pytest.mark.parametrize(
    ("name", "preset", "words"),
    [
        ("window_plus_1", "tiny_a", "from layer 1 on"),
        ("eps_1e-6", "tiny_a", "from layer 0 on"),
        ("no_clamps", "tiny_a", "from layer 7 on"),
        ("no_routed_clamp", "tiny_a", "from layer 7 on"),
        ("no_shared_clamp", "tiny_a", "from layer 8 on"),
        ("yarn", "tiny_b", "from layer 0 on"),
        ("sglang_deepep", "tiny_b", "from layer 1 on"),
        ("mtp_trunk_to_all", "tiny_a", "from MTP layer 10 on"),
        ("mtp_main_head", "tiny_b", "from MTP layer 6 on"),
    ],
)
def test_a_golden_file_with_a_mistake(
    tiny: Tiny, run: Callable[..., Arrays], name: str, preset: str, words: str
) -> None:
    found = ask(tiny(preset), run(name, preset))
    assert found.verdict == "variant"
    assert found.explanations[0].name == name
    phrase = VARIANTS[name].phrase
    assert found.sentence.startswith(f"equals the reference with {phrase}")
    assert words in found.sentence


@pytest.mark.parametrize(
    ("name", "words"), [("window_minus_1", "layer 1"), ("router_bf16", "layer 2")]
)
def test_logits_alone(tiny: Tiny, run: Callable[..., Arrays], name: str, words: str) -> None:
    found = ask(tiny("tiny_a"), logits_of(run(name)))
    assert [e.name for e in found.explanations] == [name]
    assert f"from {words} on" in found.sentence


def test_rounding_is_no_mistake(tiny: Tiny, run: Callable[..., Arrays]) -> None:
    for arrays in (run(None), logits_of(run(None))):
        found = ask(tiny("tiny_a"), arrays)
        assert found.verdict == "noise"
        assert found.sentence.startswith("no known mistake: differs by honest noise, at most ")
        assert 0 < found.largest < 5e-5
        assert found.explanations == ()
    assert "router_llamacpp_floor" in found.untestable


def test_a_mistake_is_named_through_ten_times_the_rounding(
    tiny: Tiny, run: Callable[..., Arrays]
) -> None:
    """Nothing in the decision presumes how much a candidate rounds."""
    rng = np.random.default_rng(1)
    noisy = dict(logits_of(run("no_attention_gate")))
    noisy["logits"] = noisy["logits"] + 1e-2 * rng.standard_normal(noisy["logits"].shape)
    found = ask(tiny("tiny_a"), noisy)
    assert found.explanations[0].name == "no_attention_gate"
    assert found.verdict == "nearest"
    assert "remains" in found.sentence
    assert ask(tiny("tiny_a"), noisy, precision="bf16").verdict == "variant"


def test_a_mistake_nobody_knows_is_placed_where_it_is(
    tiny: Tiny, run: Callable[..., Arrays]
) -> None:
    """Layer 5's output is scaled; the later layers are right for what they were given."""
    source, arrays = tiny("tiny_a"), dict(run(None))
    model = ReferenceModel(source, "float32")
    from refimpl.golden.hypotheses import run_layer

    hidden = arrays["hidden"].copy()
    hidden[6] = hidden[5] + 1.1 * (hidden[6] - hidden[5])
    for layer in range(6, 9):
        hidden[layer + 1] = run_layer(model, layer, hidden[layer], np.arange(T))
    found = ask(source, {"prompt": arrays["prompt"], "hidden": hidden})
    assert found.verdict == "unexplained"
    assert "departs at layer 5 in a way no known mistake explains" in found.sentence


class Tied:
    """A checkpoint whose router bias makes a choice of experts a near tie."""

    def __init__(self, source: WeightSource, layer: int, bias: np.ndarray) -> None:
        self._source, self._layer, self._bias = source, layer, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def vector(self, key: str, layer: int | None, dtype: Any) -> np.ndarray:
        if key == "router_bias" and layer == self._layer:
            return self._bias.astype(dtype)
        return self._source.vector(key, layer, dtype)


def test_a_choice_at_a_near_tie_may_fall_either_way(tiny: Tiny, run: Callable[..., Arrays]) -> None:
    """A bias moved by a hair flips one choice, which moves the logits far: still rounding."""
    source, layer, row = tiny("tiny_a"), 4, 20
    plain = run(None, dtype="float64")
    chosen, margin = plain["route_idx"][2, row], plain["route_margin"][2, row]

    def tied(side: float) -> Any:
        """The weakest chosen expert is `side` above the strongest of the others."""
        for expert in chosen:
            bias = source.vector("router_bias", layer, np.float64).copy()
            bias[expert] -= margin - side
            found = golden_arrays(ReferenceModel(Tied(source, layer, bias), "float64"), IDS)
            if np.isclose(abs(found["route_margin"][2, row]), abs(side), rtol=1e-3):
                return Tied(source, layer, bias), found
        raise AssertionError("no chosen expert is the weakest")

    (ours, normative), (_, theirs) = tied(1e-6), tied(-1e-6)
    assert not np.array_equal(normative["route_idx"], theirs["route_idx"])
    assert np.abs(normative["logits"] - theirs["logits"]).max() > 1e-2
    for arrays in (theirs, logits_of(theirs)):
        found = ask(ours, arrays)
        assert found.verdict == "noise"
        assert found.sentence.endswith("near tie between experts may fall either way")


def test_every_sentence_names_an_unambiguous_variant() -> None:
    phrases = [v.phrase for v in VARIANTS.values()]
    assert len(set(phrases)) == len(phrases)
    flags = [v.flags for v in VARIANTS.values()]
    assert len(set(flags)) == len(flags)
    assert Variant() not in flags


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, ["golden", "diagnose", *[str(a) for a in args]])


@pytest.fixture
def files(tmp_path: Path, run: Callable[..., Arrays]) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    write_golden(tmp_path / "good.npz", run(None), {"dtype": "float32"})
    np.save(tmp_path / "logits.npy", run("interleaved_rope")["logits"])
    return tmp_path


def test_command_line(files: Path, tiny_dir: Callable[[str], Path]) -> None:
    model = ("--model", tiny_dir("tiny_a"))
    good = cli(files / "good.npz", *model)
    assert good.exit_code == 0
    assert good.stdout.startswith("no known mistake: differs by honest noise")
    bad = cli(files / "logits.npy", *model, "--tokens", files / "ids.json", "--json")
    assert bad.exit_code == 1
    data = json.loads(bad.stdout)
    assert data["sentence"].startswith(
        "equals the reference with interleaved RoPE pairs (2i, 2i+1), from layer 0 on"
    )
    assert data["explanations"][0]["name"] == "interleaved_rope"
    unknown = cli(files / "logits.npy", *model)
    assert unknown.exit_code == 2
    assert "give its ids with --tokens FILE" in unknown.stderr


def test_list_of_known_mistakes() -> None:
    lines = cli("--list").stdout.splitlines()
    assert len(lines) == len(VARIANTS)
    assert [e["name"] for e in json.loads(cli("--list", "--json").stdout)] == list(VARIANTS)
    assert any("https://github.com/" in line for line in lines)

"""Structure against totals: the same rows and folds, only the description of the model differs."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.calibrate import by_sweep, leave_out
from bench.cli import main
from bench.problem import Problem, samples_of
from bench.runs import RunRecord, published_runs_path, read_runs, write_runs
from bench.structure import (
    ARMS,
    LEFT_OUT,
    MIN_SWEEPS,
    Pair,
    _by_totals,
    compare_structure,
    difference,
    family_of,
    groups_of,
    is_neighbour,
    kind_of,
)
from bench.structure_view import structure_markdown, structure_notes, structure_text
from hwmodel.catalogue import load_model
from hwmodel.model import step_shape
from refimpl.errors import InputError

DEVICES = ("m4max-40core", "h200", "h100-sxm", "m2-ultra")


@cache
def some_runs() -> tuple[RunRecord, ...]:
    records, _ = read_runs(published_runs_path())
    return tuple(r for r in records if r.device in DEVICES)


@cache
def pairs() -> tuple[Pair, ...]:
    return tuple(compare_structure(some_runs()))


def test_only_neighbours_whose_structure_is_known_are_compared() -> None:
    samples = [s for s in samples_of(some_runs()) if is_neighbour(s) and not s.beside]
    assert [(p.id, p.quantity) for p in pairs()] == [(s.id, s.quantity) for s in samples]
    assert all(p.model != step_shape().name for p in pairs())
    assert all(set(p.errors) == set(LEFT_OUT) for p in pairs())
    assert all(set(p.errors[out]) == set(ARMS) for p in pairs() for out in LEFT_OUT)


def test_errors_from_structure_are_those_of_the_calibration() -> None:
    problem = Problem(samples_of(some_runs()))
    out = leave_out(problem, by_sweep, *problem.solve())
    errors = np.abs(np.exp(problem.log_time - out.log_time) - 1)
    wanted = {
        (s.id, s.quantity): e
        for s, e in zip(problem.samples, errors, strict=True)
        if is_neighbour(s) and not s.beside
    }
    for p in pairs():
        assert p.errors["sweep"]["structure"] == pytest.approx(wanted[p.id, p.quantity], rel=1e-9)


def test_totals_keep_nothing_but_the_card() -> None:
    sample = next(s for s in samples_of(some_runs()) if s.run.model.name == "deepseek-v4-flash")
    found = _by_totals(sample, 284.0, 13.0)
    guess = found.run.model
    assert guess.name == sample.run.model.name  # the fold of the model stays the same
    assert not guess.certain
    assert guess.parameters == pytest.approx(284e9, rel=1e-3)
    assert guess.active_parameters == pytest.approx(13e9, rel=0.02)
    assert (guess.kinds, guess.mtp_layers) == (("gqa",), 0)
    assert {g.window for g in guess.attention} == {None}
    assert found.tok_s == sample.tok_s
    same = dataclasses.replace(found.run, model=sample.run.model)
    assert same == sample.run


def made(errors: list[tuple[float, float]], per_sweep: int = 2) -> list[Pair]:
    return [
        Pair(str(i), "decode_tok_s", "m", "f", "k", 0, f"s{i // per_sweep}",
             {out: dict(zip(ARMS, e, strict=True)) for out in LEFT_OUT})
        for i, e in enumerate(errors)
    ]  # fmt: skip


def test_the_interval_is_of_the_pairs_and_over_sweeps() -> None:
    rng = np.random.default_rng(1)
    both = rng.uniform(0.05, 0.5, 40)
    better = difference(made([(e, e + 0.1) for e in both]), "sweep")
    assert better.mean_change == pytest.approx((-0.1, -0.1, -0.1))
    assert (better.n, better.sweeps, better.verdict) == (40, 20, "better")
    assert difference(made([(e + 0.1, e) for e in both]), "sweep").verdict == "worse"
    noise = [(e, e + d) for e, d in zip(both, rng.normal(0, 0.2, 40), strict=True)]
    assert difference(made(noise), "sweep").verdict == "open"
    # Many rows of few sweeps are few.
    few = made([(e, e + 0.1) for e in both], per_sweep=40 // (MIN_SWEEPS - 1) + 1)
    assert difference(few, "sweep").verdict == "few"


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [
        ("llama-3-8b", "llama", "dense"),
        ("deepseek-v3", "deepseek-v3", "experts, latent attention"),
        ("qwen3-next-80b-a3b", "qwen3", "experts, linear layers"),
        ("gpt-oss-120b", "gpt-oss", "experts, sliding windows"),
        ("minimax-m3", "minimax", "experts, sparse attention"),
    ],
)
def test_families_and_kinds(name: str, family: str, kind: str) -> None:
    assert (family_of(name), kind_of(load_model(name))) == (family, kind)


def test_every_group_is_shown_and_every_note_names_one() -> None:
    text = structure_text(pairs())
    assert all(name in text for name in groups_of(pairs()))
    report = structure_markdown(pairs())
    assert report.count("\n## ") >= 6
    records, _ = read_runs(published_runs_path())
    models = [s.run.model for s in samples_of(records) if is_neighbour(s)]
    known = {family_of(m.name) for m in models} | {kind_of(m) for m in models}
    assert set(structure_notes()) <= known


def test_the_command_writes_no_fit(tmp_path: Path) -> None:
    runs, report = tmp_path / "runs.csv", tmp_path / "structure.md"
    runs.write_text(write_runs(some_runs()))
    words = ["calibrate", "--runs", str(runs), "--compare-structure", str(report), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert report.is_file() and len(list(tmp_path.iterdir())) == 2
    found = json.loads(result.stdout)
    assert len(found["figures"]) == len(pairs())
    assert found["groups"]["decode_tok_s"]["sweep"]["all"]["n"] > 50


@pytest.mark.parametrize("name", ["no/such/folder.md", "", "."])
def test_a_report_that_cannot_be_written_is_refused_before_the_fits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: object) -> None:
        raise AssertionError("computed first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.structure.compare_structure", never)
    result = CliRunner().invoke(main, ["calibrate", "--compare-structure", name])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_to_compare_is_said() -> None:
    step = [r for r in some_runs() if r.model.lower().startswith("step")]
    with pytest.raises(InputError, match="no usable figure of a model other than Step"):
        compare_structure(step)

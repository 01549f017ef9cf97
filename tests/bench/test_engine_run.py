"""Which arms still need rounds in quiet memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import engine_run
from bench.engine_cases import Case, Entry
from bench.engine_run import measure_cases
from bench.interleave import Round
from bench.runners.base import Measurement, RunnerTest

TEST = RunnerTest(Path("model.gguf"), n_gen=8)


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "sources_hash", lambda: "new")
    monkeypatch.setattr(engine_run, "loop_sources", lambda: "loop")


def case(*labels: str, apart: bool = False, anchor: str = "", mtp: str = "") -> Case:
    test = RunnerTest(TEST.model, n_gen=8, mtp=mtp)
    entries = [
        Entry(k, test, "default" if k == "llama.cpp" else "", anchor=k == anchor) for k in labels
    ]
    return Case("c", "q4_0", "", tuple(entries), apart)


def a_round(*labels: str, kernels: str = "new", after: float = 100.0, loop: str = "") -> Round:
    made = {}
    for k in labels:
        drafts = k.startswith("mtp")
        record = {"kernels": kernels, "loop": loop if drafts else None, "mtp": k if drafts else ""}
        engine = k if k == "llama.cpp" else "refimpl"
        made[k] = Measurement(engine, "1", "", (1.0,), (1,), record)
    return Round("c", 0.0, "host", (100.0,), (after,), {}, made)


def unmet(given: Case, rounds: list[Round], wanted: int, best: float, without: str = "") -> Any:
    """As `bench.engine_run.unmet` has it, with all arms of the case but one."""
    labels = {e.label for e in given.entries if e.label != without}
    return engine_run.unmet(given, labels, rounds, wanted, best)


def labels_of(found: Case | None) -> list[str]:
    return [] if found is None else [e.label for e in found.entries]


def test_arms_that_are_compared_need_quiet_rounds_of_all_of_them() -> None:
    both = case("refimpl", "llama.cpp")
    rounds = [a_round("refimpl", "llama.cpp")]
    assert unmet(both, [], 1, 100) is both and unmet(both, rounds, 2, 100) is both
    assert unmet(both, rounds, 1, 100) is None
    assert unmet(both, [a_round("refimpl", "llama.cpp", after=50)], 1, 100) is both
    assert unmet(both, rounds, 1, 200) is both, "the memory has been twice as fast"


def test_points_on_their_own_need_quiet_rounds_of_their_own() -> None:
    points = case("a", "b", apart=True)
    assert labels_of(unmet(points, [a_round("a")], 1, 100)) == ["b"]
    assert labels_of(unmet(points, [a_round("a"), a_round("a", "b")], 2, 100)) == ["b"]
    assert unmet(points, [a_round("a"), a_round("b")], 1, 100) is None


def test_anchors_are_measured_beside_others_only() -> None:
    points = case("anchor", "a", apart=True, anchor="anchor")
    assert labels_of(unmet(points, [], 1, 100)) == ["anchor", "a"]
    assert labels_of(unmet(points, [a_round("anchor")], 1, 100)) == ["anchor", "a"]
    assert unmet(points, [a_round("a")], 1, 100) is None


def test_rounds_of_other_kernels_or_another_loop_do_not_count() -> None:
    plain, drafts = case("refimpl"), case("mtp auto", mtp="auto")
    assert unmet(plain, [a_round("refimpl", kernels="old")], 1, 100) is plain
    assert unmet(drafts, [a_round("mtp auto", loop="other")], 1, 100) is drafts
    assert unmet(drafts, [a_round("mtp auto")], 1, 100) is drafts
    assert unmet(drafts, [a_round("mtp auto", loop="loop")], 1, 100) is None
    both = case("refimpl", "mtp auto", apart=True)
    mixed = a_round("refimpl", "mtp auto", loop="other")
    assert labels_of(unmet(both, [mixed], 1, 100)) == ["mtp auto"]
    assert mixed.kernels == "new loop other"


def test_an_engine_that_is_not_there_is_not_waited_for() -> None:
    """Whether or not earlier rounds had it."""
    both = case("refimpl", "llama.cpp")
    assert unmet(both, [a_round("refimpl")], 1, 100) is both
    for old in ([], [a_round("refimpl", "llama.cpp", kernels="old")]):
        assert unmet(both, [*old, a_round("refimpl")], 1, 100, without="llama.cpp") is None
    points = replace(both, apart=True)
    assert unmet(points, [a_round("refimpl")], 1, 100, without="llama.cpp") is None


def test_points_of_an_engine_that_is_not_there_end_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the others have their quiet rounds, nothing is left of the case."""

    class Runner:
        def measure(self, test: RunnerTest) -> Measurement:
            return a_round("refimpl").arms["refimpl"]

    monkeypatch.setattr("bench.engine_cases.RefimplRunner", Runner)
    monkeypatch.setattr("refimpl.engine.probe.read_bandwidth", lambda *_: (5e10,))
    monkeypatch.setattr(engine_run, "_SETTLE_S", 0.0)
    monkeypatch.setattr(engine_run, "other_cores", lambda: 0.0)
    monkeypatch.setattr("bench.awake.Awake._start", lambda self: None)
    points, notes = case("refimpl", "llama.cpp", apart=True), list[str]()
    made = measure_cases([points], Path(), tmp_path, 1, 2, {}, notes.append, patience_s=1)
    assert [list(r.arms) for r in made] == [["refimpl"]] * 2
    assert not any("still without" in n for n in notes)

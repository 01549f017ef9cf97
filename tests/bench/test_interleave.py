"""Interleaved rounds: their order, what is kept, when they are quiet, and ratios within them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from bench.interleave import (
    Arm,
    Gate,
    NotQuiet,
    Round,
    append_round,
    best_probe,
    quiet_rounds,
    ratio,
    ratio_of,
    read_rounds,
    run_rounds,
    usable,
)
from bench.runners.base import Measurement, RunnerError, RunnerTest
from hwmodel.errors import RunFileError

TEST = RunnerTest(Path("model.gguf"), n_gen=8)


class Scripted:
    """A runner that gives one speed after the other, and writes down when it was asked."""

    version, flags = "1", ()

    def __init__(self, name: str, speeds: list[float | Exception], log: list[str]) -> None:
        self.name, self._speeds, self._log = name, iter(speeds), log

    def measure(self, test: RunnerTest) -> Measurement:
        self._log.append(self.name)
        value = next(self._speeds)
        if isinstance(value, BaseException):
            raise value
        return Measurement(self.name, "1", "", (value,), (round(8e9 / value),), {"n_gen": 8})


def arms(log: list[str], **speeds: list[float | Exception]) -> list[Arm]:
    return [Arm(name, Scripted(name, values, log), TEST) for name, values in speeds.items()]


def a_round(before: float, after: float, case: str = "c", **speeds: float) -> Round:
    made = {k: Measurement(k, "1", "", (v,), (1,)) for k, v in speeds.items()}
    return Round(case, 0.0, "host", (before,), (after,), {}, made)


def test_arms_take_turns_each_between_two_probes() -> None:
    log: list[str] = []

    def probe() -> tuple[float, ...]:
        log.append("probe")
        return (1e9,)

    kept: list[Round] = []
    run_rounds("c", arms(log, a=[1, 2], b=[3, 4]), 2, probe, "host", kept.append)
    assert log == ["probe", "a", "probe", "b", "probe"] * 2
    assert [[m.median_ts for m in r.arms.values()] for r in kept] == [[1, 3], [2, 4]]


class Together:
    """A runner whose tests take turns: the n-th of them has the n-th row of speeds."""

    name, version, flags = "together", "1", ()

    def __init__(self, *speeds: tuple[float, ...]) -> None:
        self._speeds = speeds

    def measure_together(self, tests: list[RunnerTest]) -> list[Measurement]:
        turns = {"turns": [t.mtp for t in tests]}
        return [Measurement("e", "1", "", v, tuple(1 for _ in v), turns) for v in self._speeds]


def test_arms_that_take_turns_are_measured_at_once_and_compared_sample_by_sample() -> None:
    """The machine becomes twice as fast after the first sample; the ratio does not see it."""
    both = Together((1.0, 2.0, 2.2), (1.1, 2.2, 2.42))
    probes: list[float] = []

    def probe() -> tuple[float, ...]:
        probes.append(1e9)
        return (1e9,)

    kept: list[Round] = []
    members = [Arm(m, both, replace(TEST, mtp=m), "drafts") for m in ("0", "auto")]
    run_rounds("c", [*members, *arms([], other=[5])], 1, probe, "host", kept.append)
    assert list(kept[0].arms) == ["0", "auto", "other"] and len(probes) == 3
    found = ratio(kept, "auto", "0")
    assert found is not None and found.value == pytest.approx(1.1)
    assert kept[0].is_quiet(1e9, "0", "auto")


def test_ctrl_c_keeps_the_rounds_that_were_finished(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    broken: list[float | Exception] = [1, KeyboardInterrupt()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        run_rounds("c", arms([], a=broken), 5, lambda: (1e9,), "host",
                   lambda r: append_round(path, r))  # fmt: skip
    assert [r.arms["a"].median_ts for r in read_rounds(path)] == [1]


def test_further_rounds_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    for value in (1.0, 2.0):
        run_rounds("c", arms([], a=[value]), 1, lambda: (1e9, 2e9), "host",
                   lambda r: append_round(path, r), lambda: {"load": 0.5})  # fmt: skip
    found = read_rounds(path)
    assert [r.arms["a"].samples_ts for r in found] == [(1.0,), (2.0,)]
    assert found[0].probe_before == (1e9, 2e9) and found[0].state == {"load": 0.5}
    assert found[0].arms["a"].record == {"n_gen": 8}


def test_a_line_cut_short_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    append_round(path, a_round(1, 1, a=5))
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    assert len(read_rounds(path)) == 1
    append_round(path, a_round(1, 1, a=7))  # it takes the place of the broken line
    assert [r.arms["a"].median_ts for r in read_rounds(path)] == [5, 7]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "nonsense", '{"format": 2}', '{"format": 1, "case": "c"}']
)
def test_lines_that_are_no_rounds_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RunFileError, match=r"line 1 is no round"):
        read_rounds(path)


def test_an_arm_that_fails_is_named_and_the_others_go_on() -> None:
    kept: list[Round] = []
    run_rounds("c", arms([], a=[RunnerError("it crashed")], b=[2]), 1, lambda: (1.0,), "host",
               kept.append)  # fmt: skip
    assert kept[0].failed == {"a": "it crashed"} and list(kept[0].arms) == ["b"]
    with pytest.raises(RunnerError, match="nothing could be measured: it crashed"):
        run_rounds("c", arms([], a=[RunnerError("it crashed")]), 1, lambda: (1.0,), "host",
                   kept.append)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "quiet"),
    [
        (100, 100, True),
        (100, 91, True),  # within 10 % of each other, both above 90 of 100
        (92, 91, True),
        (100, 89, False),  # more than 10 % apart
        (89, 89, False),  # agree, but 11 % below the best seen
        (100, 111, False),
    ],
)
def test_rounds_are_quiet_if_probes_agree_and_are_near_the_best(
    before: float, after: float, quiet: bool
) -> None:
    rounds = [a_round(100, 100), a_round(before, after)]
    best = {"host": 100.0}
    assert (rounds[1] in quiet_rounds(rounds, best)) == quiet


def test_each_host_has_its_own_best_probe() -> None:
    slow = Round("c", 0.0, "other", (50.0,), (51.0,))
    best = best_probe([a_round(100, 98), slow])
    assert best == {"host": 100.0, "other": 51.0}
    assert quiet_rounds([a_round(100, 98), slow], best) == [a_round(100, 98), slow]


def test_arms_are_judged_by_the_probes_beside_them() -> None:
    # the memory gets slow after b: a and b are quiet, c is not steady, the last arm d is
    made = a_round(100, 60, a=1, b=1, c=1, d=1)
    made = replace(made, between={"a": (99.0,), "b": (98.0,), "c": (61.0,)})
    assert made.probes() == [100, 99, 98, 61, 60]
    assert made.probes("b") == [99, 98] and made.probes("a", "d") == [100, 99, 61, 60]
    assert not made.is_steady() and not made.is_quiet(100)
    assert made.is_quiet(100, "a", "b") and not made.is_quiet(100, "a", "d")
    assert made.is_steady("d") and not made.is_quiet(100, "d") and not made.is_steady("c")


def test_quiet_rounds_go_before_steady_and_these_before_unsteady_ones() -> None:
    quiet, steady, unsteady = a_round(100, 99, a=1), a_round(50, 51, a=1), a_round(100, 50, a=1)
    best = {"host": 100.0}
    assert usable([quiet, steady, unsteady], best, "a") == ([quiet], "quiet")
    assert usable([steady, unsteady], best, "a") == ([steady], "steady")
    assert usable([unsteady], best, "a") == ([unsteady], "unsteady")
    assert usable([quiet], best, "b") == ([], "")


def test_ratios_are_taken_within_rounds() -> None:
    # the machine is twice as fast in the second round; the ratio is the same
    rounds = [a_round(1, 1, a=10, b=5), a_round(2, 2, a=20, b=10), a_round(1, 1, a=10)]
    found = ratio(rounds, "a", "b")
    assert found is not None
    assert (found.value, found.low, found.high, found.rounds) == (2, 2, 2, 2)
    assert ratio(rounds, "a", "c") is None


class Memory:
    """Speeds of the memory, one a probe, the last one for ever; pauses take no real time."""

    def __init__(self, log: list[str], *speeds: float) -> None:
        self._log, self._speeds, self.now = log, [*speeds], 0.0

    def probe(self) -> tuple[float, ...]:
        speed = self._speeds.pop(0) if len(self._speeds) > 1 else self._speeds[0]
        self._log.append(f"{speed:g}")
        return (speed,)

    def pause(self) -> None:
        self.now += 1

    def gate(self, best: float, patience_s: float) -> Gate:
        return Gate(best, patience_s, self.pause, lambda: self.now)


def test_a_gate_lets_every_arm_wait_for_quiet_memory() -> None:
    log: list[str] = []
    memory = Memory(log, 50, 99, 60, 55, 98, 97)
    kept: list[Round] = []
    run_rounds("c", arms(log, a=[1], b=[2]), 1, memory.probe, "host", kept.append,
               gate=memory.gate(100, 10))  # fmt: skip
    assert log == ["50", "99", "a", "60", "55", "98", "b", "97"]
    (made,) = kept
    assert made.waited == {"b": (98,)} and made.between == {"a": (60,)}
    assert made.probes("b") == [98, 97] and made.probes("a") == [99, 60]
    assert made.is_quiet(100, "b") and not made.is_quiet(100, "a")
    assert not made.is_quiet(100) and replace(made, between={"a": (97.0,)}).is_quiet(100)
    assert best_probe([made]) == {"host": 99}
    assert best_probe([replace(made, waited={"b": (120.0,)})]) == {"host": 120}


def test_quiet_memory_is_not_probed_twice() -> None:
    log: list[str] = []
    memory = Memory(log, 99)
    run_rounds("c", arms(log, a=[1], b=[2]), 1, memory.probe, "host", lambda _: None,
               gate=memory.gate(100, 10))  # fmt: skip
    assert log == ["99", "a", "99", "b", "99"]


def test_what_was_measured_before_an_arm_waited_in_vain_is_kept(tmp_path: Path) -> None:
    log: list[str] = []
    memory, kept = Memory(log, 99, 40), list[Round]()
    with pytest.raises(NotQuiet, match=r"not quiet within 5 s: .* 0\.0 GB/s.* go on later"):
        run_rounds("c", arms(log, a=[1], b=[2]), 3, memory.probe, "host", kept.append,
                   gate=memory.gate(100, 5))  # fmt: skip
    assert [list(r.arms) for r in kept] == [["a"]]
    assert memory.now == 5
    append_round(tmp_path / "rounds.jsonl", replace(kept[0], waited={"a": (99.0,)}))
    assert read_rounds(tmp_path / "rounds.jsonl")[0].waited == {"a": (99.0,)}


def test_a_gate_that_never_opens_keeps_nothing() -> None:
    memory, kept = Memory([], 40), list[Round]()
    with pytest.raises(NotQuiet):
        run_rounds("c", arms([], a=[1]), 3, memory.probe, "host", kept.append,
                   gate=memory.gate(100, 0))  # fmt: skip
    assert not kept


def test_a_gate_learns_a_better_best() -> None:
    memory = Memory([], 120)
    gate = memory.gate(100, 0)
    assert gate.wait(memory.probe) == (120,) and gate.best == 120


def test_intervals_of_the_median() -> None:
    few = ratio_of([3, 1, 2])
    assert few is not None and (few.low, few.high) == (1, 3)
    assert few.coverage == 1 - 2 * 0.5**3
    many = ratio_of(list(range(1, 11)))
    assert many is not None and many.value == median(range(1, 11))
    # sign test for 10 values: from the 2nd to the 9th covers 97.9 %, the 3rd to the 8th 89 %
    assert (many.low, many.high) == (2, 9)
    assert many.coverage == pytest.approx(0.9785, abs=1e-4)
    assert ratio_of([]) is None


def test_intervals_cover_the_median_as_often_as_they_say() -> None:
    import numpy as np

    rng = np.random.default_rng(1)

    def hits() -> Iterator[bool]:
        for _ in range(1000):
            found = ratio_of(rng.standard_normal(9).tolist())
            assert found is not None
            yield found.low <= 0 <= found.high

    covered = sum(hits()) / 1000
    found = ratio_of(list(range(9)))
    assert found is not None and found.coverage >= 0.95
    assert covered == pytest.approx(found.coverage, abs=0.02)

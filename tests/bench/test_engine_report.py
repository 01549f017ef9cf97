"""`bench engine`: its cases, the target table from raw rounds, and the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.engine_cases import Case, arms, cases, chosen, make_models, slice_name
from bench.engine_figures import Figures, Row, rows_of
from bench.interleave import Ratio, Round, append_round, read_rounds
from bench.runners.base import Measurement, RunnerError, RunnerTest
from hwmodel.errors import RequestError

PLAIN_BYTES, PROBE = 700e6, 100e9


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["engine", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def measured(speed: float, engine: str = "refimpl", **record: object) -> Measurement:
    record = {"kernels": "new", "model_filename": "slice.gguf", **record}
    return Measurement(engine, "abc", "-n 64", (speed,), (round(64e9 / speed),), record)


def a_round(case: str, probe: float = PROBE, **made: Measurement) -> Round:
    state = {"memory_total_bytes": 64 << 30, "amx": False}
    return Round(case, 1.7e9, "cpu, 2 threads", (probe,), (probe,), state, made)


def decode(speed: float, **record: object) -> Measurement:
    return measured(speed, weight_bytes_per_step=PLAIN_BYTES - 1e6, kv_bytes_per_step=1e6, **record)


def row(figures: Figures, start: str) -> Row:
    (found,) = [r for r in rows_of(figures) if r.what.startswith(start)]
    return found


def test_every_case_has_arms_with_labels_of_their_own() -> None:
    for case in cases(8):
        labels = [e.label for e in case.entries]
        assert len(set(labels)) == len(labels) >= 2
    names = [c.name for c in cases(8)]
    assert len(set(names)) == len(names)
    for what in ("decode", "prefill", "verify"):
        assert {f"{what}-{k}" for k in ("q4_0", "q4_k_s", "q8_0")} <= set(names)


def test_cases_are_chosen_by_name_or_beginning() -> None:
    assert [c.name for c in chosen(["verify-q4_0"], 2)] == ["verify-q4_0"]
    assert {c.name for c in chosen(["drafts"], 2)} == {
        "drafts-q4_0-mtp3", "drafts-q4_k_s-mtp3", "drafts-mini",
    }  # fmt: skip
    assert len(chosen([], 2)) == len(cases(2))
    with pytest.raises(RequestError, match="no case 'dekode'; expected decode-q4_0"):
        chosen(["dekode"], 2)


def test_threads_go_up_to_all_of_them() -> None:
    (case,) = chosen(["threads-q4_0"], 6)
    assert sorted({e.test.threads for e in case.entries}) == [1, 2, 4, 6]


def a_case(name: str) -> Case:
    (found,) = chosen([name], 2)
    return found


def test_variants_of_llama_cpp_join_where_they_are_there(tmp_path: Path) -> None:
    class Fake:
        name, version, flags = "fake", "1", ()

        def measure(self, test: object) -> Measurement:
            raise NotImplementedError

    def labels(*variants: str) -> list[str]:
        made = arms(a_case("decode-q4_0"), tmp_path, {v: Fake() for v in variants})
        return [a.label for a in made]

    assert labels() == ["refimpl"]
    assert labels("default", "no-repack") == [
        "refimpl", "llama.cpp default", "llama.cpp no-repack",
    ]  # fmt: skip
    assert labels("default", "no-amx") == ["refimpl", "llama.cpp default", "llama.cpp no-amx"]
    only_llama = replace(a_case("decode-q4_0"), entries=a_case("decode-q4_0").entries[1:])
    with pytest.raises(RunnerError, match="is llama-bench missing"):
        arms(only_llama, tmp_path, {})
    assert (
        arms(a_case("variants-decode"), tmp_path, {"fa-on": Fake()})[0].label == "llama.cpp fa-on"
    )


def test_missing_slices_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str, int]] = []

    def write(config: object, path: Path, kind: str, seed: int) -> None:
        written.append((path.name, kind, config.num_nextn_predict_layers))  # type: ignore[attr-defined]
        path.touch()

    monkeypatch.setattr("refimpl.checkpoint.slice.write_random", write)
    for _ in range(2):
        make_models(tmp_path / "slices", ["q4_0", "q4_k_s-mtp3", "mini"])
    assert written == [("slice_q4_0.gguf", "q4_0", 0), ("slice_q4_k_s_mtp3.gguf", "q4_k_s", 3)]
    assert slice_name("q8_0") == "slice_q8_0.gguf"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunnerTest]:
    """The tests that refimpl is asked for; its answers and the probe's are made up."""
    tests: list[RunnerTest] = []

    def measure(self: object, test: RunnerTest) -> Measurement:
        tests.append(test)
        return decode(100.0)

    monkeypatch.setattr("bench.runners.refimpl.RefimplRunner.measure", measure)
    monkeypatch.setattr("refimpl.engine.probe.read_bandwidth", lambda *_: (PROBE,) * 3)
    return tests


def test_rounds_are_added_call_by_call(tmp_path: Path, asked: list[RunnerTest]) -> None:
    args = ("measure", "--only", "decode-mini", "--only", "verify-mini", "--no-llama")
    for count in (1, 2):
        result = run(
            *args, "--data", str(tmp_path), "--rounds", str(count), "--threads", "2", "--json"
        )
        assert result.exit_code == 0, result.output
        made = json.loads(result.stdout)
        assert [r["case"] for r in made] == ["verify-mini"] * count + ["decode-mini"] * count
        assert made[-1]["tokens_per_s"] == {"refimpl": 100.0}
    found = read_rounds(tmp_path / "rounds.jsonl")
    assert [r.case for r in found].count("decode-mini") == 3
    assert found[0].state["memory_total_bytes"] > 0 and found[0].probe == PROBE
    assert {t.n_rows for t in asked} == {1, 2, 3, 4}


def test_preparing_warms_every_kernel_once(tmp_path: Path, asked: list[RunnerTest]) -> None:
    result = run("prepare", "--only", "drafts-mini", "--only", "decode-mini", "--json",
                 "--models", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [c["case"] for c in json.loads(result.stdout)] == ["drafts-mini", "decode-mini"]
    assert {(bool(t.mtp), t.repetitions, t.n_gen) for t in asked} == {(True, 1, 4), (False, 1, 4)}
    assert len(asked) == 2


def test_decode_is_judged_against_the_best_variant_of_llama_cpp() -> None:
    rounds = [
        a_round("decode-q4_0", refimpl=decode(90.0), **{
            "llama.cpp default": measured(60.0, "llama.cpp"),
            "llama.cpp no-repack": measured(40.0, "llama.cpp"),
        })
    ]  # fmt: skip
    found = row(Figures(rounds), "decode q4_0 over")
    assert found.what == "decode q4_0 over llama.cpp default"
    assert found.figure is not None and found.figure.value == 1.5
    assert found.verdict == "reached"


def test_share_is_bytes_a_second_over_the_probe_of_the_same_round() -> None:
    rounds = [a_round("decode-q4_0", refimpl=decode(80.0))]
    found = row(Figures(rounds), "decode step q4_0, share")
    assert found.figure is not None
    assert found.figure.value == pytest.approx(PLAIN_BYTES * 80 / PROBE)
    assert found.verdict == "short"  # 56 % of 65 %


def test_verification_is_judged_by_bytes() -> None:
    # four rows read twice the bytes and take 2.2 times as long
    one, four = decode(100.0), measured(
        400 / 2.2, n_rows=4, weight_bytes_per_step=2 * PLAIN_BYTES, kv_bytes_per_step=0.0
    )  # fmt: skip
    figures = Figures([a_round("verify-q4_0", **{"1 rows": one, "4 rows": four})])
    scaled, probed = figures.verification("q4_0", 4)
    assert scaled is not None and probed is not None
    assert scaled.value == pytest.approx(1.1)
    assert probed.value == pytest.approx(PROBE / (2 * PLAIN_BYTES * 100 / 2.2))


def test_drafts_are_judged_by_the_bound_of_bytes() -> None:
    loop = {"mtp_layer_bytes": [70e6, 70e6, 70e6], "steps": 10, "accepted": 0}
    verify = {f"{n} rows": measured(1.0, n_rows=n, weight_bytes_per_step=PLAIN_BYTES * (1 + n) / 2,
                                    kv_bytes_per_step=0.0) for n in (1, 2, 3, 4)}  # fmt: skip
    figures = Figures([
        a_round("verify-q4_0", **verify),
        a_round("drafts-q4_0-mtp3", **{"mtp 0": measured(50.0, **loop),
                                       "mtp auto": measured(60.0, **loop)}),
    ])  # fmt: skip
    assert figures.draft_bound("q4_0-mtp3", 1, (0.88, 0.77, 0.69)) == pytest.approx(1.88 / 1.6)
    assert figures.mtp_share("q4_0-mtp3") == pytest.approx((70e6, 70e6 / PLAIN_BYTES))
    assert figures.mtp_share("q8_0-mtp3") is None
    assert row(figures, "drafts (auto) over none, q4_0").verdict == "reached"
    share = row(figures, "drafts (auto), share of the bound, q4_0")
    best = max((1 + 0.88) / 1.6, (1 + 0.88 + 0.88 * 0.77) / 2.2)
    assert share.figure is not None and share.figure.value == pytest.approx(1.2 / best)


def test_real_acceptance_is_taken_from_the_runs() -> None:
    made = {
        f"mtp {k}": measured(1.0, steps=100, accepted=a) for k, a in ((1, 80), (2, 120), (3, 140))
    }
    rates = Figures([a_round("drafts-mini", **made)]).rates("mini")
    assert rates == pytest.approx((0.8, 0.5, 0.5))


def test_resident_memory_is_the_largest_of_all_tests() -> None:
    resident = [{"other_bytes": 1.5e8}, {"other_bytes": 3.5e8}]
    rounds = [a_round("decode-q4_0", refimpl=decode(1.0, resident=r)) for r in resident]
    found = row(Figures(rounds), "resident memory")
    assert found.figure is not None and found.figure.value == 350
    assert found.verdict == "short"


def test_only_rounds_of_the_newest_kernels_count() -> None:
    old = a_round("decode-q4_0", refimpl=replace(decode(10.0), record={"kernels": "old"}))
    new = a_round("decode-q4_0", refimpl=decode(20.0))
    assert Figures([old, old, new]).newest("decode-q4_0") == [new]


def test_slow_rounds_count_only_where_there_is_no_quiet_one() -> None:
    quiet = a_round("decode-q4_0", refimpl=decode(20.0))
    slow = a_round("decode-q4_0", probe=PROBE / 2, refimpl=decode(10.0))
    figures = Figures([quiet, slow])
    found = figures.speed("decode-q4_0", "refimpl")
    assert found is not None and (found.value, found.rounds) == (20, 1)
    assert figures.basis("decode-q4_0", "refimpl") == "1 quiet round of 2"
    alone = Figures([a_round("verify-q4_0", **{"1 rows": decode(1.0)}), slow])
    found = alone.speed("decode-q4_0", "refimpl")
    assert found is not None and found.value == 10
    steady = "1 steady round of 1, memory at 50 % of its best"
    assert alone.basis("decode-q4_0", "refimpl") == steady


def test_no_share_of_a_bandwidth_that_changed_meanwhile() -> None:
    made = replace(a_round("decode-q4_0", refimpl=decode(20.0)), probe_after=(PROBE / 2,))
    assert Figures([made]).share("decode-q4_0", "refimpl") is None
    assert Figures([made]).speed("decode-q4_0", "refimpl") is not None


@pytest.mark.parametrize(
    ("value", "lower", "verdict"),
    [(1.0, False, "short"), (1.3, False, "reached"), (2.0, False, "aim reached"),
     (1.0, True, "aim reached"), (1.25, True, "reached"), (1.4, True, "short")],
)  # fmt: skip
def test_verdicts(value: float, lower: bool, verdict: str) -> None:
    figure = Ratio(value, value, value, 1, 0.0)
    least, aim = (1.3, 1.1) if lower else (1.3, 2.0)
    assert Row("x", figure, least, aim, "x", "", lower).verdict == verdict
    assert Row("x", None, least, aim, "x", "", lower).verdict == "not measured"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of rounds, one of every case, from speeds that fall from arm to arm."""
    folder = tmp_path / "data"
    folder.mkdir()
    for case in cases(2):
        made = {}
        for i, entry in enumerate(case.entries):
            engine = "llama.cpp" if entry.variant else "refimpl"
            made[entry.label] = replace(
                decode(100.0 - i, n_rows=entry.test.n_rows, mtp_layer_bytes=[1e6] * 3, steps=10,
                       accepted=8 * i, resident={"other_bytes": 2e8, "cache_bytes": 1e6}),
                engine=engine,
            )  # fmt: skip
        append_round(folder / "rounds.jsonl", a_round(case.name, **made))
    return folder


def test_the_report_comes_from_one_command_and_repeats(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    first = run("report", "--data", str(data), "--out", str(out))
    assert first.exit_code == 0, first.output
    text = out.read_text()
    pictures = ("by-type", "depth", "threads", "drafts", "micro-batch")
    for name in pictures:
        assert (data / f"{name}.png").stat().st_size > 10_000
        assert (data / f"{name}.svg").read_text().startswith("<?xml")
        assert f"](data/{name}.png)" in text
    assert text.count("not measured") == 1  # the demand for processors with AMX
    assert "resident memory" in text and "200 MB" in text
    samples = (data / "samples.csv").read_text().splitlines()
    count = sum(len(m.samples_ts) for r in read_rounds(data / "rounds.jsonl")
                for m in r.arms.values())  # fmt: skip
    assert len(samples) == 1 + count
    svgs = [(data / f"{name}.svg").read_bytes() for name in pictures]
    assert run("report", "--data", str(data), "--out", str(out)).exit_code == 0
    assert out.read_text() == text
    assert svgs == [(data / f"{name}.svg").read_bytes() for name in pictures]


def test_what_was_not_measured_is_said(data: Path, tmp_path: Path) -> None:
    lines = (data / "rounds.jsonl").read_text().splitlines(keepends=True)
    (data / "rounds.jsonl").write_text(lines[0])
    result = run("report", "--data", str(data), "--out", str(tmp_path / "r.md"), "--json")
    found = json.loads(result.stdout)
    assert found[0]["verdict"] != "not measured" == found[1]["verdict"]
    assert len(found) == len(rows_of(Figures([])))


def test_bad_input_gets_a_sentence(tmp_path: Path) -> None:
    none = run("report", "--data", str(tmp_path))
    assert none.exit_code == 2 and "no rounds; measure some first" in none.stderr
    (tmp_path / "rounds.jsonl").write_text("nonsense\n")
    bad = run("report", "--data", str(tmp_path))
    assert bad.exit_code == 2 and "line 1 is no round" in bad.stderr
    unknown = run("measure", "--only", "nothing", "--models", str(tmp_path))
    assert unknown.exit_code == 2 and "no case 'nothing'" in unknown.stderr


@pytest.mark.parametrize("name", ["prepare", "measure", "report"])
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and f"bench engine {name}" in result.output

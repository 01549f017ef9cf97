"""`bench run`: cases, rounds that are kept, rows, and what it says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.compare import compare
from bench.importers.table import Stated
from bench.interleave import Arm, Round, append_round, read_rounds
from bench.run import Files, Job, cases, file_runner, measure
from bench.run_rows import rows_of, write_rows
from bench.runners.base import Measurement, RunnerError, RunnerTest
from bench.runners.refimpl import RefimplRunner
from bench.runs import read_runs
from hwmodel.errors import RequestError
from refimpl.engine import probe

RECORD = {
    "model_filename": "some-model-Q4_K_S.gguf", "model_type": "step35 Q4_K", "model_size": 2e9,
    "model_n_params": 4e9, "n_prompt": 0, "n_gen": 32, "n_depth": 512, "type_k": "f16",
    "n_ubatch": 512, "backend": "engine",
}  # fmt: skip
SERVED = {
    "model": "served-q8_0", "concurrency": 2, "requests": 4, "complete": 4, "errors": [],
    "n_gen": 30, "n_prompt": 200, "tokens_counted_by": "server", "reasoning_tokens": 7,
    "ttft_s": 0.25, "tpot_s": 0.02, "itl_median_s": 0.01, "itl_p99_s": 0.05,
    "aggregate_tok_s": 90.0, "server_prefill_tok_s": None, "short_answers": 0, "acceptance": 0.75,
}  # fmt: skip


def measured(*speeds: float, record: dict[str, Any] = RECORD) -> Measurement:
    return Measurement("refimpl", "abc", "-n 32", speeds, tuple(10**9 for _ in speeds), record)


def a_round(case: str = "c", probe: float = 5e10, **arms: Measurement) -> Round:
    return Round(case, 1.8e9, "CPU, 2 threads", (probe,), (probe,), {"load_average": [0]}, arms)


class Given:
    """A runner that gives speeds in turn, or fails."""

    name, version, flags = "given", "1", ()

    def __init__(self, *results: float | str) -> None:
        self.left = list(results)

    def measure(self, test: RunnerTest) -> Measurement:
        found = self.left.pop(0)
        if isinstance(found, str):
            raise KeyboardInterrupt if found == "^C" else RunnerError(found)
        return measured(found)


def arm(label: str, *results: float | str) -> Arm:
    return Arm(label, Given(*results), RunnerTest(Path("m"), n_gen=1))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(probe, "read_bandwidth", lambda *_: (5e10,))
    monkeypatch.setattr("bench.run.time.sleep", lambda _: None)
    monkeypatch.setattr("bench.run.other_cores", lambda: 0.0)
    return Files(tmp_path / "mine.csv")


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["run", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_engines_of_a_file_stand_side_by_side_in_every_case() -> None:
    job = Job(Path("mini"), prompts=(64, 128), gens=(16,), depths=(0, 256))
    found = cases(job, ("refimpl", "refimpl-reference"), None, lambda *_: Given())
    assert [name for name, _ in found] == [
        f"mini {what} @ d{d}" for d in (0, 256) for what in ("pp64", "pp128", "tg16")
    ]
    assert all([a.label for a in arms] == ["refimpl", "refimpl-reference"] for _, arms in found)


def test_endpoints_are_asked_at_every_concurrency() -> None:
    job = Job(None, prompts=(100,), gens=(20,), depths=(0,), concurrency=(1, 8))
    asked: list[tuple[str, int]] = []
    found = cases(job, ("http://a",), None, lambda *a: (asked.append(a), Given())[1])  # type: ignore[func-returns-value]
    assert asked == [("http://a", 1), ("http://a", 8)]
    assert [name for name, _ in found] == ["chat p100 n20 x1", "chat p100 n20 x8"]


def test_unknown_and_missing_engines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="unknown engine 'warp', expected one of refimpl, "):
        file_runner("warp", None)
    with pytest.raises(RunnerError, match="no such program"):
        file_runner("llama.cpp", str(tmp_path / "llama-bench"))
    with pytest.raises(RunnerError, match="refimpl needs a file"):
        cases(Job(None), ("refimpl",), None, lambda *_: Given())
    with pytest.raises(RunnerError, match=r"none\.gguf: no such file"):
        cases(Job(tmp_path / "none.gguf"), ("refimpl",), None, lambda *_: Given())


def test_rounds_are_kept_as_they_finish_and_survive_an_interruption(files: Files) -> None:
    todo = [("c", [arm("a", 1.0, 2.0, "^C"), arm("b", 3.0, 4.0)])]
    with pytest.raises(KeyboardInterrupt):
        measure(todo, 3, files, 1, lambda _: None)
    kept = [json.loads(line) for line in files.rounds.read_text().splitlines()]
    assert [r["arms"]["a"]["samples_ts"] for r in kept] == [[1.0], [2.0]]
    assert kept[0]["state"]["memory_total_bytes"] > 0 and kept[0]["host"].endswith("1 threads")


def test_a_case_that_fails_is_named_and_the_others_go_on(files: Files) -> None:
    notes: list[str] = []
    todo = [
        ("bad", [arm("a", "broken pipe")]),
        ("good", [arm("a", 1.0, 2.0), arm("b", "no", "no")]),
    ]
    assert measure(todo, 2, files, 1, notes.append) == ["bad", "good (b)"]
    assert len(read_rounds(files.rounds)) == 2
    assert sum("broken pipe" in n for n in notes) == 1
    assert any("b failed: no" in n for n in notes)
    late = [("late", [arm("a", 1.0, "broken")])]
    assert measure(late, 2, files, 1, notes.append) == [], "its first round counts"
    with pytest.raises(RunnerError, match="nothing could be measured"):
        measure([("bad", [arm("a", "x")])], 2, files, 1, notes.append)


def test_a_round_says_what_other_programs_used_unless_a_server_is_measured(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr("bench.run.other_cores", lambda: 0.8)
    todo = [("file", [arm("a", 1.0)]), ("chat", [arm("http://localhost:8080 x1", 2.0)])]
    measure(todo, 1, files, 1, notes.append)
    assert [r.state.get("other_cores") for r in read_rounds(files.rounds)] == [0.8, None]
    assert ["other programs used 0.8 cores" in n for n in notes] == [True, False]


def test_rows_of_a_file_say_what_a_token_uses(files: Files) -> None:
    """Engines print all parameters; of experts a token uses some, which the prediction needs."""
    record = {**RECORD, "model_filename": "step-mini-q4_0.gguf"}
    other = {**record, "model_filename": "another.gguf"}
    made = a_round(a=measured(1.0, record=record), b=measured(1.0, record=other))
    append_round(files.rounds, made)
    mini, unknown = write_rows(files, Stated(), Path("mini"))
    assert mini.active_params_b is not None and 0.001 < mini.active_params_b < 0.02
    assert unknown.active_params_b is None
    assert (mini.extra["model_says"], unknown.extra["model_says"]) == (
        "Step mini Q4_K", "step35 Q4_K")  # fmt: skip
    assert [r.active_params_b for r in write_rows(files, Stated(), Path("none.gguf"))] == [None] * 2


def test_a_row_holds_the_median_of_quiet_rounds_and_what_it_depends_on() -> None:
    rounds = [a_round(a=measured(10.0)), a_round(a=measured(12.0)), a_round(a=measured(14.0)),
              a_round(probe=2e10, a=measured(3.0))]  # fmt: skip
    (row,) = rows_of(rounds, Stated())
    assert (row.decode_tok_s, row.prefill_tok_s, row.fit_ok) == (12.0, None, "yes")
    assert (row.model, row.quant, row.weights_gb, row.total_params_b) == (
        "some-model-Q4_K_S", "Q4_K", 2.0, 4.0)  # fmt: skip
    assert (row.device, row.backend_id, row.kv_type, row.context_depth) == (
        "local",
        "cpu",
        "f16",
        512,
    )
    assert row.notes == "3 quiet rounds" and row.extra["host"] == "CPU, 2 threads"
    stated = rows_of(rounds, Stated(model="step-3.5-flash", device="m4max", quant="Q4_K_S"))[0]
    assert (stated.model, stated.device, stated.quant) == ("step-3.5-flash", "m4max", "Q4_K_S")


@pytest.mark.parametrize(
    ("label", "device"),
    [
        ("refimpl", "local"), ("http://localhost:8080 x2", "local"),
        ("http://127.0.0.1:8080 x2", "local"), ("https://gpu.example.com x2", ""),
    ],
)  # fmt: skip
def test_an_endpoint_elsewhere_is_not_this_device(label: str, device: str) -> None:
    arms = {label: measured(40.0, record=SERVED)}
    assert rows_of([a_round(**arms)], Stated())[0].device == device
    assert rows_of([a_round(**arms)], Stated(device="h100"))[0].device == "h100"


def test_a_prefill_is_a_prefill() -> None:
    record = {**RECORD, "n_prompt": 512, "n_gen": 0, "n_depth": 0}
    (row,) = rows_of([a_round(a=measured(99.0, record=record))], Stated())
    assert (row.prefill_tok_s, row.decode_tok_s, row.prompt_tokens) == (99.0, None, 512)


def test_a_served_row_is_per_user_with_latencies_apart() -> None:
    (row,) = rows_of([a_round(a=measured(40.0, record=SERVED))], Stated())
    assert (row.decode_tok_s, row.ttft_ms, row.batch_concurrency) == (pytest.approx(50), 250, 2)
    assert (row.decode_scope, row.quant, row.fit_ok) == ("per_user", "Q8_0", "yes")
    assert (row.extra["itl_median_s"], row.extra["aggregate_tok_s"]) == ("0.01", "90")
    assert (row.extra["acceptance"], row.extra["reasoning_tokens"]) == ("0.75", "7")


def test_a_row_of_broken_answers_is_marked() -> None:
    record = {**SERVED, "complete": 3, "errors": ["the connection dropped midway"]}
    (row,) = rows_of([a_round(a=measured(40.0, record=record))], Stated())
    assert row.fit_ok == "no"
    assert "incomplete: 1 of 4 requests (the connection dropped midway)" in row.notes


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "theirs.csv"
    out.write_text("precious")
    with pytest.raises(RequestError, match=r"exists, but has no theirs\.rounds\.jsonl"):
        Files(out).check()
    with pytest.raises(RequestError, match="no such folder"):
        Files(tmp_path / "no" / "x.csv").check()
    with pytest.raises(OSError, match="File name too long"):
        Files(tmp_path / ("x" * 254)).check()
    append_round(Files(out).rounds, a_round(a=measured(1.0)))
    Files(out).check()


@pytest.fixture
def quick(files: Files, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*results: float | str) -> None:
        given = Given(*results)
        monkeypatch.setattr(RefimplRunner, "measure", lambda self, test: given.measure(test))

    return use


def test_the_command_writes_what_compare_reads(files: Files, quick: Callable[..., None]) -> None:
    quick(10.0, 12.0)
    args = ("-m", "mini", "-p", "0", "-n", "32", "--rounds", "2", "--out", str(files.out))
    result = run(*args, "--json")
    assert result.exit_code == 0
    (printed,) = json.loads(result.stdout)
    assert printed["decode_tok_s"] == "11"
    records, problems = read_runs(files.out)
    assert not problems and records[0].decode_tok_s == 11.0
    (row,) = compare(records)["rows"]
    assert row["status"] != "declined" and row["predicted"] > 0
    quick(14.0)
    assert "3 quiet rounds" in run(*args[:-3], "1", *args[-2:]).stdout  # they are added


def test_ctrl_c_leaves_rows_of_finished_rounds(files: Files, quick: Callable[..., None]) -> None:
    quick(10.0, "^C")
    result = run("-m", "mini", "-p", "0", "-n", "32", "--out", str(files.out))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert read_runs(files.out)[0][0].decode_tok_s == 10.0


def test_exit_code_1_says_that_something_could_not_be_measured(
    files: Files, quick: Callable[..., None]
) -> None:
    quick("the model has fewer positions", 12.0)
    result = run("-m", "mini", "-p", "99999", "-n", "32", "--rounds", "1", "--out", str(files.out))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "not measured: mini pp99999 @ d0"
    assert "some-model-Q4_K_S (step35 Q4_K)" in result.stdout
    assert "12.0" in result.stdout and read_runs(files.out)[0][0].decode_tok_s == 12.0
    assert "Exit code 0: everything was measured, 1: some" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-e", "warp", "-m", "mini"), "unknown engine 'warp'"),
        (("-e", "http://127.0.0.1:9"), "cannot be reached"),
        (("-e", "ftp://x"), "'ftp://x' is no endpoint"),
        (("-m", "mini", "-p", "0", "-n", "0"), "nothing to measure"),
        (("-m", "mini", "--concurrency", ""), "'' is not a list of numbers"),
        (("-m", "mini", "-p", "99999999"), "99999999 is more than 10,000,000"),
        (("-m", "mini", "-p", "1,x"), "'1,x' is not a list of numbers"),
        (("-m", "mini", "--mtp", "7"), "--mtp is '7', expected one of 0, 1, 2, 3, auto"),
        (("-m", "mini", "--timeout", "nan"), "'nan' is not a number"),
        (("-m", "mini", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        ((), "refimpl needs a file"),
    ],
)
def test_bad_input_is_told_in_one_line(files: Files, words: tuple[str, ...], message: str) -> None:
    result = run("--timeout", "1", *words, "--out", str(files.out))
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()
    assert any(message in line for line in last), result.stderr
    assert not files.out.exists() and "Traceback" not in result.output


def test_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "bench run -m mini" in result.output

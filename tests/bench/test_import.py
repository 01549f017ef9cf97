"""Runs of other tools: recognised by content, read by field name, nothing dropped in silence.

The llama-bench and llama-batched-bench files in data/ were written by those programs (build
0c1e570) for the embedded model on a busy machine: their format is the point, not their speeds.
What others published of files that the tools wrote:

* `step-m4max.json`: StepFun's own figures of a Mac Studio in llama-bench's layout (llama.cpp/docs/
  step3.5-flash.md of github.com/stepfun-ai/Step-3.5-Flash; published runs S068 to S073);
* `llama-bench-2025.json`: llama.cpp build 5145, github.com/ggml-org/llama.cpp/pull/12994.

The files of vLLM and SGLang are those of test_import_serving.py.
"""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.importers.llama_bench import quant_of
from bench.importers.read import FORMATS, Imported, import_runs
from bench.importers.table import Stated
from bench.runs import read_runs
from hwmodel.errors import RunFileError

DATA = Path(__file__).parent / "data"
FULL = Stated(model="step-3.5-flash", device="m4max", quant="Q4_0", n_devices=1)


def _import(name: str, stated: Stated = FULL) -> Imported:
    return import_runs(str(DATA / name), stated)


@pytest.mark.parametrize("name", ["llama-bench.json", "llama-bench.jsonl", "llama-bench.csv"])
def test_llama_bench_says_what_was_timed(name: str) -> None:
    records = _import(name, Stated()).records
    assert [(r.prompt_tokens, r.gen_tokens, r.context_depth) for r in records] == [
        (64, None, 0), (None, 16, 0), (64, None, 128), (None, 16, 128),
    ]  # fmt: skip
    first = records[0]
    assert (first.quant, first.engine, first.kv_type, first.device) == (
        "Q4_0", "llama.cpp", "f16", "AMD EPYC",
    )  # fmt: skip
    assert first.weights_gb == pytest.approx(0.014160512) and first.micro_batch == 512
    assert first.prefill_tok_s and first.decode_tok_s is None
    assert records[1].decode_tok_s and records[1].prefill_tok_s is None
    assert first.engine_version == "0c1e570 1" and first.source_date == "2026-11-22"


def test_the_speeds_are_those_of_the_file() -> None:
    raw = json.loads((DATA / "llama-bench.json").read_text())
    found = [r.prefill_tok_s or r.decode_tok_s for r in _import("llama-bench.json").records]
    assert found == pytest.approx([r["avg_ts"] for r in raw])


def test_the_printed_table_has_the_same_figures_rounded() -> None:
    records = _import("llama-bench.md", Stated()).records
    assert [(r.prompt_tokens, r.gen_tokens, r.context_depth) for r in records] == [
        (64, None, 0), (None, 16, 0), (64, None, 128), (None, 16, 128),
    ]  # fmt: skip
    assert records[0].prefill_tok_s == 728.91
    assert records[0].weights_gb == pytest.approx(13.5 * 2**20 / 1e9)
    assert records[0].engine_version == "0c1e570 1"


@pytest.mark.parametrize("name", ["llama-batched-bench.jsonl", "llama-batched-bench.txt"])
def test_batched_decode_is_behind_its_prompt_and_of_all_sequences(name: str) -> None:
    one, two = _import(name).records[:2]
    assert (one.context_depth, one.decode_scope) == (64, "per_user")
    assert (two.batch_concurrency, two.decode_scope) == (2, "aggregate")
    assert one.prefill_tok_s and two.prefill_tok_s is None  # two prompts in one figure


def test_an_older_llama_bench_of_a_device_nobody_knows() -> None:
    """No depth yet, and a card that is in no registry: its name is kept."""
    (run,) = _import("llama-bench-2025.json", Stated()).records
    assert (run.device, run.backend, run.quant) == ("Ascend910B3", "CANN", "F16")
    assert (run.context_depth, run.gen_tokens) == (0, 128)
    assert run.decode_tok_s == pytest.approx(60.984063)
    assert run.engine_version == "12b17501 5145" and run.source_date == "2025-04-17"


def test_every_format_is_recognised_by_exactly_one_reader() -> None:
    for path in DATA.iterdir():
        text = path.read_text()
        kinds = [f.title for f in FORMATS if f.matches(text)]
        # SGLang's fields contain vLLM's; the more demanding one comes first
        assert kinds and (len(kinds) == 1 or "sglang" in path.name), (path.name, kinds)


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("step35 196B Q4_K - Small", "Q4_K_S"),
        ("qwen3moe 30B.A3B Q4_K - Medium", "Q4_K_M"),
        ("gpt-oss 120B MXFP4 MoE", "MXFP4"),
        ("llama 7B Q8_0", "Q8_0"),
        ("llama 7B F16", "F16"),
        ("step35 196B IQ4_XS - 4.25 bpw", "IQ4_XS"),
        ("unknown", ""),
    ],
)
def test_the_type_is_read_off_llama_benchs_spelling(text: str, quant: str) -> None:
    assert quant_of(text) == quant


def test_what_is_missing_is_said_once_with_its_option() -> None:
    problems = _import("llama-batched-bench.jsonl", Stated()).problems
    assert [p.split("; ")[1] for p in problems] == [
        "--model NAME adds it", "--device NAME adds it", "--quant TYPE adds it",
    ]  # fmt: skip
    assert all(p.startswith("4 runs: ") for p in problems)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty, expected one of: llama-bench"),
        ("hello\nworld\n", "begins with 'hello'"),
        ('{"a": 1, "b": 2}', "JSON with the fields a, b"),
        ('[{"n_prompt": 5,\n "n_ge', "is JSON that breaks at line 2, column 2 .Unterminated"),
        ('{"pp": 5}\n\n{"pp": 5, "t', "line 3 is no JSON"),
        ('[{"n_prompt": 5, "n_gen": 0}]', "row 1: no avg_ts"),
        ("n_prompt,n_gen,model\n1,2,x\n", "row 1: no avg_ts"),
        ('{"completed": 4, "request_throughput": 2}', "row 1: no total_input_tokens and no total_"),
        ('[{"n_prompt": 5, "n_gen": 0, "avg_ts": "fast"}]', "avg_ts is 'fast', expected a number"),
        ('[{"n_prompt": 5, "n_gen": 0, "avg_ts": -3}]', "row 1: avg_ts is -3"),
        ('[{"n_prompt": 5, "n_gen": 5, "avg_ts": 3}]', "without a run that can be used"),
        ('{"pp": 5, "tg": 5, "pl": "x", "speed_tg": 1}', "pl is 'x', expected a number"),
        (
            '{"completed": 0, "total_input_tokens": 1, "total_output_tokens": 1,'
            ' "request_throughput": 1, "mean_tpot_ms": 1}',
            "no request was answered",
        ),
        (
            '{"completed": "many", "total_input_tokens": 1, "total_output_tokens": 1,'
            ' "request_throughput": 1, "mean_tpot_ms": 1}',
            "completed is 'many', expected a whole number",
        ),
        ('{"pp": 1%s, "tg": 5, "pl": 1, "speed_tg": 1}' % ("0" * 400), "pp is 1000"),
        ("9" * 5000, "begins with '9999"),
        ("[" * 100_000, "begins with '\\[\\[\\["),
    ],
)
def test_unknown_and_damaged_files_get_a_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RunFileError, match=says):
        import_runs(str(path), FULL)


def test_a_file_that_powershell_redirected_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for coding in ("utf-16", "utf-8-sig"):
        path.write_text((DATA / "llama-bench.json").read_text(), encoding=coding)
        assert len(import_runs(str(path), FULL).records) == 4


def test_impossible_speeds_are_kept_and_named_with_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text('[{"n_prompt": 0, "n_gen": 128, "n_depth": 0, "avg_ts": 9000}]')
    found = import_runs(str(path), Stated(model="step-3.5-flash", device="m4max", quant="Q4_K_S"))
    assert found.records[0].decode_tok_s == 9000
    assert "more than the 8" in found.problems[0] and "m4max allow" in found.problems[0]


def test_two_commands_bring_a_newcomer_onto_the_plot(tmp_path: Path) -> None:
    """The file names its model and type; only the device has to be said."""
    out, pictures = tmp_path / "mine.csv", tmp_path / "pictures"
    args = ["import", str(DATA / "step-m4max.json"), "--device", "m4max", "--out", str(out)]
    first = CliRunner().invoke(main, args)
    assert first.exit_code == 0, first.output
    assert first.stderr.splitlines()[-1].endswith("11 runs") and "adds it" not in first.stderr
    second = CliRunner().invoke(main, ["compare", "--runs", str(out), "--out", str(pictures)])
    assert second.exit_code == 0, second.output
    assert second.stdout.startswith("11 figures (") and "declined" not in second.stdout
    assert (pictures / "predicted-measured.png").stat().st_size > 10_000


def test_appending_keeps_what_was_there_and_ids_stay_apart(tmp_path: Path) -> None:
    out = tmp_path / "runs.csv"
    args = ["import", str(DATA / "llama-bench.json"), "--device", "m4max", "--out", str(out)]
    assert CliRunner().invoke(main, args).exit_code == 0
    args[1] = str(DATA / "llama-bench.csv")
    args += ["--append"]
    assert CliRunner().invoke(main, args).exit_code == 0
    records, problems = read_runs(out)
    assert len(records) == 8 and len({r.id for r in records}) == 8 and not problems


def test_runs_that_are_there_already_are_not_appended_again(tmp_path: Path) -> None:
    out = tmp_path / "runs.csv"
    files = [str(DATA / name) for name in ("step-m4max.json", "llama-bench.md")]
    args = ["import", *files, "--device", "m4max", "--out", str(out)]
    assert CliRunner().invoke(main, args).exit_code == 0
    before = out.read_bytes()
    again = CliRunner().invoke(main, [*args, "--append"])
    assert again.exit_code == 0 and "15 runs in" in again.stderr and "already" in again.stderr
    assert out.read_bytes() == before


def test_a_file_to_import_is_never_the_one_to_write(tmp_path: Path) -> None:
    """The other tool's measurements would be gone."""
    file = tmp_path / "lb.json"
    file.write_bytes((DATA / "llama-bench.json").read_bytes())
    link = tmp_path / "link.json"
    link.symlink_to(file)
    for out in (file, link):
        for more in ([], ["--append"]):
            args = ["import", str(file), "--device", "m4max", "--out", str(out), *more]
            run = CliRunner().invoke(main, args)
            assert run.exit_code == 2 and "is a file to import" in run.stderr
    assert file.read_bytes() == (DATA / "llama-bench.json").read_bytes()


def test_where_it_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    out = tmp_path / "no" / "runs.csv"
    run = CliRunner().invoke(main, ["import", str(DATA / "llama-bench.json"), "--out", str(out)])
    assert run.exit_code == 2 and "llama-bench JSON" not in run.stderr
    assert "No such file or directory" in run.stderr


@pytest.mark.parametrize("drafts", ["-1", "x", "1.5", "65"])
def test_drafts_that_are_no_number_are_refused(drafts: str) -> None:
    run = CliRunner().invoke(main, ["import", str(DATA / "llama-bench.csv"), "--mtp", drafts])
    assert run.exit_code == 2 and "expected none or 0 to 64" in run.stderr and not run.stdout


def test_what_a_comparison_would_guess_is_said_at_once() -> None:
    stated = Stated(model="step-3.5-flash", device="m4max", quant="NOPE", n_devices=1)
    (problem,) = _import("step-m4max.json", stated).problems
    assert "a comparison will guess" in problem and "NOPE" in problem


def test_refimpl_bench_is_imported_as_what_it_is(tmp_path: Path) -> None:
    """Its records have llama-bench's fields, and its own: engine, drafts, rows of a step."""
    base = {
        "engine": "refimpl", "model_filename": "step-mini.gguf", "model_type": "step35 Q4_0",
        "n_prompt": 0, "n_gen": 8, "avg_ts": 50.0, "n_rows": 1, "mtp": None,
        "simulated_acceptance": [], "synthetic_kv": False,
    }  # fmt: skip
    rows = [
        base, {**base, "mtp": "3"}, {**base, "n_rows": 4},
        {**base, "mtp": "2", "simulated_acceptance": [0.9, 0.8]}, {**base, "synthetic_kv": True},
    ]  # fmt: skip
    file = tmp_path / "own.json"
    file.write_text(json.dumps(rows))
    plain, drafts, rows4, simulated, synthetic = import_runs(str(file), FULL).records
    assert plain.engine == "refimpl" and plain.decode_tok_s == 50 and plain.drafts == 0
    assert drafts.drafts == 3 and drafts.fit_ok == "yes"
    assert rows4.decode_tok_s is None and "steps of 4 tokens" in rows4.problems[0]
    assert rows4.extra["llama-bench:avg_ts"] == "50.0"
    assert simulated.notes == "simulated acceptance" and simulated.fit_ok == "no"
    assert synthetic.notes == "random keys and values" and synthetic.fit_ok == "yes"


def test_the_table_of_refimpl_bench_says_the_same(tmp_path: Path) -> None:
    head = "| model | size | params | backend | threads | test | t/s |\n" + "|---" * 7 + "|\n"
    row = "| step35 Q4_0 | 13.50 MiB | 22.85 M | engine | 2 | {} | 50.00 ± 1.00 |\n"
    tests = ("tg8", "tg8 mtp 3†", "tg8 x4 rows", "tg8 @ d64*", "pp16+tg8")
    file = tmp_path / "own.md"
    file.write_text(head + "".join(map(row.format, tests)) + "\nbuild: 75cb433, kernels avx512\n")
    plain, drafts, rows4, deep, both = import_runs(str(file), FULL).records
    assert (plain.engine, plain.engine_version, plain.decode_tok_s) == ("refimpl", "75cb433", 50)
    assert drafts.drafts == 3 and drafts.fit_ok == "no"
    assert rows4.decode_tok_s is None and both.decode_tok_s is None and both.prefill_tok_s is None
    assert deep.context_depth == 64 and deep.notes == "random keys and values"
    assert "a prompt and generated text together" in both.problems[0]


def test_a_device_that_nothing_is_known_of_is_named_at_once(tmp_path: Path) -> None:
    stated = dataclasses.replace(FULL, device="unknownium")
    problems = import_runs(str(DATA / "llama-bench.json"), stated).problems
    assert len(problems) == 1
    assert (
        "4 runs: kept, but a comparison will decline it: unknown device 'unknownium'" in problems[0]
    )


def test_a_device_file_of_ones_own_is_compared(tmp_path: Path) -> None:
    device, out = tmp_path / "box.toml", tmp_path / "runs.csv"
    stated = 'source = "unverified", as_of = "2026-11"'
    device.write_text(
        f'schema = 1\nname = "box"\nclass = "apple"\n[memory]\n'
        f"total_bytes = {{ value = 128e9, {stated} }}\n[bandwidth]\n"
        f"peak_bytes_per_s = {{ value = 600e9, {stated} }}\n"
    )
    args = ["import", str(DATA / "step-m4max.json"), "--device", str(device), "--out", str(out)]
    assert CliRunner().invoke(main, args).exit_code == 0
    for chosen in ([], ["--device", str(device)]):
        run = CliRunner().invoke(main, ["compare", "--runs", str(out), *chosen, "--json", "-"])
        rows = json.loads(run.stdout)["rows"]
        assert len(rows) == 11
        assert {r["device"] for r in rows} == {"box"} and all(r["predicted"] for r in rows)


def test_unknown_fields_survive_the_csv() -> None:
    run = CliRunner().invoke(main, ["import", str(DATA / "llama-bench.csv")])
    row = next(csv.DictReader(io.StringIO(run.stdout)))
    assert row["llama-bench:n_threads"] == "2" and row["llama-bench:flash_attn"] == "-1"


def test_fewer_than_one_device_is_refused() -> None:
    run = CliRunner().invoke(main, ["import", str(DATA / "llama-bench.csv"), "--count", "0"])
    assert run.exit_code == 2 and "0 is not in the range" in run.stderr and not run.stdout

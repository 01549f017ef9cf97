"""`refimpl bench` on the command line: forms of output, meanings of its tests, bad input."""

import csv
import io
import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
from click.testing import CliRunner, Result

from refimpl.cli import main

# fields of llama-bench's records that mean the same here (its test::get_fields)
SHARED = {
    "build_commit", "cpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen",
    "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns",
    "samples_ts",
}  # fmt: skip


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["bench", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def records(*words: str) -> list[dict[str, object]]:
    result = run(*words, *(() if "-t" in words or "reference" in words else ("-t", "1")), "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_records_have_llama_benchs_fields_and_every_sample() -> None:
    pp, tg = records("-p", "8", "-n", "4", "-r", "3", "-t", "2")
    assert set(pp) >= SHARED
    assert (pp["n_prompt"], pp["n_gen"], tg["n_prompt"], tg["n_gen"]) == (8, 0, 0, 4)
    for found, tokens in ((pp, 8), (tg, 4)):
        ns, ts = found["samples_ns"], found["samples_ts"]
        assert isinstance(ns, list) and isinstance(ts, list) and len(ns) == len(ts) == 3
        assert ts == pytest.approx([1e9 * tokens / n for n in ns])
        assert found["avg_ts"] == pytest.approx(fmean(ts))
        assert found["stddev_ts"] == pytest.approx(stdev(ts))
    assert tg["n_threads"] == 2 and tg["type_k"] == "f16" and tg["steps"] == 12


def test_bytes_of_a_step_are_those_of_the_model() -> None:
    from refimpl.backends import model_path
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.inventory import inventory

    one, four = records("-p", "0", "-n", "8", "--rows", "1,4", "-r", "1", "-d", "3")
    source = open_checkpoint(model_path("mini"))
    config, fixed, expert = source.config, 0, 0
    for t in inventory(config):
        size = source.stored_bytes(t.key, t.layer)
        if t.role == "routed":
            expert += size // config.moe_num_experts
        elif t.role not in ("embedding", "mtp"):
            fixed += size
    assert one["weight_bytes_per_step"] == fixed + expert * config.moe_top_k
    many = four["weight_bytes_per_step"]
    assert isinstance(many, float)
    assert fixed + expert * config.moe_top_k < many < fixed + 4 * expert * config.moe_top_k
    row = 4 * config.num_attention_groups * config.head_dim  # keys and values, two bytes each
    visible = [
        sum(min(p + 1, s.window or p + 1) for s in config.layers[: config.num_hidden_layers])
        for p in range(3, 11)
    ]
    assert one["kv_bytes_per_step"] == row * fmean(visible)


@pytest.mark.parametrize("form", ["md", "csv", "jsonl"])
def test_other_forms_say_the_same(form: str) -> None:
    out = run("-p", "4", "-n", "2", "-d", "0,5", "-r", "1", "-o", form).stdout
    names = ["pp4", "tg2", "pp4 @ d5", "tg2 @ d5"]
    if form == "md":
        rows = [line.split("|") for line in out.splitlines() if line.startswith("| step35")]
        assert [r[6].strip() for r in rows] == names
        assert "build: " in out
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [r["test"] for r in rows] == names
        assert [json.loads(r["samples_ts"]) for r in rows]
    else:
        assert [json.loads(line)["test"] for line in out.splitlines()] == names


def test_both_backends_take_the_same_tests() -> None:
    (found,) = records("--backend", "reference", "-p", "0", "-n", "2", "-d", "3", "-r", "1")
    assert (found["backend"], found["n_depth"], found["type_k"]) == ("reference", 3, "f32")


def test_depth_may_be_synthetic_and_says_so() -> None:
    args = ("-p", "0", "-n", "2", "-d", "600", "-r", "2", "--synthetic-kv")
    (found,) = records(*args, "--kv-type", "q8_0")
    assert found["synthetic_kv"] is True and found["type_k"] == "q8_0"
    assert "not by a prefill" in run(*args).stdout


def test_exact_arithmetic_keeps_float32() -> None:
    (found,) = records("-p", "0", "-n", "2", "-r", "1", "--exact")
    assert found["exact"] is True and found["type_k"] == "f32"


def test_simulated_acceptance_gives_the_rates_asked_for() -> None:
    none, three = records("-p", "0", "-n", "120", "-r", "1", "--mtp", "0,3",
                          "--simulate-acceptance", ".9,.5,.2")  # fmt: skip
    assert none["drafted"] == 0 and three["simulated_acceptance"] == [0.9, 0.5, 0.2]
    steps, accepted = three["steps"], three["accepted"]
    assert isinstance(steps, int) and isinstance(accepted, int)
    assert accepted / steps == pytest.approx(0.9 + 0.45 + 0.09, rel=0.03)


def test_numbers_of_drafts_take_turns() -> None:
    found = records("-p", "0", "-n", "8", "-r", "2", "--mtp", "0,1,auto",
                    "--simulate-acceptance", ".9")  # fmt: skip
    labels = ["tg8 mtp 0", "tg8 mtp 1", "tg8 mtp auto"]
    assert [r["test"] for r in found] == labels
    assert all(r["turns"] == labels and r["samples_tokens"] == [8, 8] for r in found)


def test_drafts_on_real_text_are_accepted_or_not(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("    def __init__(self, name):\n        self.name = name\n\n    def get(")
    (found,) = records("-p", "0", "-n", "24", "-r", "1", "--mtp", "1", "--prompt", str(prompt))
    drafted, accepted = found["drafted"], found["accepted"]
    assert isinstance(drafted, int) and isinstance(accepted, int)
    assert 0 < accepted <= drafted and found["simulated_acceptance"] == []


def test_the_embedded_model_has_prompts_of_its_own() -> None:
    from refimpl.cli_bench import _texts

    given = {"acceptance": (), "prompts": ()}
    assert len(_texts("mini", given)) == 20
    assert _texts("mini", {**given, "acceptance": (0.5,)}) == ()


def test_a_prompt_may_be_given(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def main():\n")
    (found,) = records("-p", "0", "-n", "4", "-r", "2", "--mtp", "0", "--prompt", str(prompt))
    assert found["samples_tokens"] == [4, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "x"), "not a list of numbers"),
        (("-p", "-3"), "-p is -3, expected 0 or more tokens"),
        (("-p", "4", "-d", "0,1022"), "pp4 @ d1022 needs 1,029 positions (1,022 of depth, 4 timed"),
        (("--mtp", "2", "--simulate-acceptance", ".9,2"), "has 2, expected 0 to 1"),
        (("-d", ","), "not a list of numbers"),
        (("-p", "0", "-n", "0"), "nothing to run"),
        (("--rows", "5"), "5 rows a step"),
        (("-r", "0"), "repetitions is 0"),
        (("-ub", "0"), "micro-batch is 0"),
        (("--mtp", "7"), "mtp is '7'"),
        (("--simulate-acceptance", ".5"), "needs drafts"),
        (("--mtp", "1", "--simulate-acceptance", ".1,.1,.1,.1"), "at most 3"),
        (("--mtp", "1", "-d", "9", "--synthetic-kv"), "no --synthetic-kv"),
        (("--backend", "reference", "--exact"), "belongs to the engine"),
        (("--mtp", "1", "--prompt", "/nowhere/prompt"), "No such file"),
        (("-m", "/nowhere/model.gguf"), "no such file"),
        (("-d", "300000", "--synthetic-kv"), "the model has"),
        (("--threads", "0"), "threads is 0"),
    ],
)
def test_bad_input_gets_a_sentence(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""  # no table or list that was begun
    assert len(result.stderr.strip().splitlines()) == 1

"""`refimpl generate` and `refimpl convert`, end to end on tiny checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from refimpl.cli import main
from refimpl.reference.model import ReferenceModel


@pytest.fixture
def model(tiny_dir: Callable[[str], Path]) -> str:
    return str(tiny_dir("tiny_a"))


def run(*args: str, stdin: str | bytes = "") -> Result:
    done = CliRunner().invoke(main, args, input=stdin)
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done


def run_json(*args: str, stdin: str | bytes = "") -> dict[str, Any]:
    done = run(*args, "--json", stdin=stdin)
    assert done.exit_code == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_the_continuation_goes_to_stdout_and_speeds_to_stderr(model: str) -> None:
    args = ("generate", "def f(x):", "--model", model, "--max-new-tokens", "12")
    text = run_json(*args)["text"]
    done = run(*args)
    assert done.stdout == text + "\n"
    assert done.stderr.startswith("refimpl: prompt: 9 tokens in ")
    assert "11 more in" in done.stderr and "ended by: length" in done.stderr


def test_json_holds_the_whole_record(model: str) -> None:
    record = run_json("generate", "ab", "--model", model, "--max-new-tokens", "5")
    assert len(record["ids"]) == 5
    assert record["finish_reason"] == "length"
    assert record["seed"] is None
    assert (record["backend"], record["dtype"], record["model"]) == ("reference", "float32", model)
    assert record["mtp"] == {
        "steps": 4,
        "drafted": 0,
        "accepted": 0,
        "drafted_by_position": [],
        "accepted_by_position": [],
    }
    timings = record["timings"]
    assert (timings["prompt_tokens"], timings["decoded_tokens"]) == (2, 4)
    assert all(timings[k] > 0 for k in ("load_s", "prefill_s", "ttft_s", "decode_s"))
    assert timings["decode_tokens_per_s"] == pytest.approx(4 / timings["decode_s"])


@pytest.mark.parametrize("mtp", ["1", "2", "3", "auto"])
def test_greedy_text_is_the_same_with_any_number_of_drafts(model: str, mtp: str) -> None:
    args = ("generate", "class A", "--model", model, "--max-new-tokens", "25")
    plain, drafted = run_json(*args), run_json(*args, "--mtp", mtp)
    assert (drafted["ids"], drafted["text"]) == (plain["ids"], plain["text"])
    stats = drafted["mtp"]
    assert 1 + stats["steps"] + stats["accepted"] == 25
    if mtp != "auto":
        assert stats["drafted"] == int(mtp) * stats["steps"]


def test_sampling_repeats_with_the_seed_that_the_run_reports(model: str) -> None:
    args = ("generate", "a", "--model", model, "--max-new-tokens", "12", "--temperature", "1.5")
    cuts = ("--top-k", "100", "--top-p", "0.99", "--min-p", "0.001", "--mtp", "2")
    first = run_json(*args, *cuts)
    assert run_json(*args, *cuts, "--seed", str(first["seed"]))["ids"] == first["ids"]
    assert run_json(*args, *cuts, "--seed", str(first["seed"] + 1))["ids"] != first["ids"]


def test_sampling_options_without_temperature_are_remarked_upon(model: str) -> None:
    done = run("generate", "a", "--model", model, "--max-new-tokens", "1", "--top-k", "5")
    assert "nothing is sampled" in done.stderr


def test_prompt_from_stdin_argument_and_ids_agree(model: str, tmp_path: Path) -> None:
    more = ("--model", model, "--max-new-tokens", "6")
    by_argument = run_json("generate", "für\n", *more)
    assert run_json("generate", "-", *more, stdin="für\n")["ids"] == by_argument["ids"]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list("für\n".encode())))
    by_ids = run_json("generate", "--tokens", str(ids), *more)
    by_stdin = run_json("generate", "--tokens", "-", *more, stdin=ids.read_text())
    assert by_ids["ids"] == by_stdin["ids"]
    assert by_ids["timings"]["prompt_tokens"] == by_argument["timings"]["prompt_tokens"] == 5


def test_stdin_that_is_not_utf8_is_refused(model: str) -> None:
    done = run("generate", "-", "--model", model, stdin=b"caf\xe9")
    assert done.exit_code == 2
    assert "stdin: the prompt is not UTF-8 (byte 3 is 0xe9)" in done.stderr


def test_stop_text_ends_the_continuation(model: str) -> None:
    args = ("generate", "abc", "--model", model, "--max-new-tokens", "30")
    text = run_json(*args)["text"]
    stop = text[6:8]
    record = run_json(*args, "--stop", "never in it", "--stop", stop, "--mtp", "3")
    assert record["finish_reason"] == "stop"
    assert record["text"] == text[: text.index(stop)]
    assert run(*args, "--stop", stop).stdout == record["text"] + "\n"


def test_generation_ends_with_the_context(model: str, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([7] * 510))
    record = run_json("generate", "--tokens", str(ids), "--model", model, "--mtp", "3")
    assert record["finish_reason"] in ("context", "stop")
    assert len(record["ids"]) <= 3


@pytest.mark.parametrize("dtype", ["float64", "bf16"])
def test_other_arithmetic(model: str, dtype: str) -> None:
    record = run_json("generate", "ab", "--model", model, "--dtype", dtype, "--max-new-tokens", "2")
    assert record["dtype"] == dtype and len(record["ids"]) == 2


def test_ctrl_c_prints_what_there_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("generate", "abc", "--model", model, "--max-new-tokens", "20")
    whole = run_json(*args)
    calls = 0
    decode = ReferenceModel.decode

    def interrupted(self, *given, **named):
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise KeyboardInterrupt
        return decode(self, *given, **named)

    monkeypatch.setattr(ReferenceModel, "decode", interrupted)
    done = run(*args, "--json")
    assert done.exit_code == 130
    record = json.loads(done.stdout)
    assert record["finish_reason"] == "interrupted"
    assert record["ids"] == whole["ids"][:5]
    streamed = run(*args)
    assert streamed.exit_code == 130
    assert streamed.stdout == record["text"] + "\n"
    assert "ended by: interrupted" in streamed.stderr


def test_ctrl_c_while_loading_ends_quietly(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refimpl.backends.tokenizer_of", interrupted)
    done = run("generate", "abc", "--model", model)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "refimpl: interrupted\n")


# Decoding waits at its 20th step until standard input ends, so that the reader leaves before.
WAITING = """
import itertools, sys
from refimpl.cli import main
from refimpl.reference.model import ReferenceModel

def decode(*given, count=itertools.count(), plain=ReferenceModel.decode):
    if next(count) == 20:
        sys.stdin.read()
    return plain(*given)

ReferenceModel.decode = decode
main()
"""


def test_a_reader_that_leaves_early_is_no_error(model: str) -> None:
    command = [sys.executable, "-c", WAITING]
    command += ["generate", "abc", "--model", model, "--max-new-tokens", "60"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 141
    assert errors == ""


def test_converted_files_generate_the_same_text(model: str, tmp_path: Path) -> None:
    args = ("--max-new-tokens", "8")
    original = run_json("generate", "xyz", "--model", model, *args)
    out = str(tmp_path / "model.gguf")
    done = run("convert", model, out, "--type", "bf16")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.startswith(f"refimpl: wrote {out}: ")
    assert done.stderr.count("\n") == 1  # a progress bar on terminals only
    converted = run_json("generate", "xyz", "--model", out, *args, "--mtp", "3")
    assert converted["ids"] == original["ids"]


def test_a_model_without_mtp_layers_cannot_draft(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "trunk.gguf")
    assert run("convert", model, out, "--type", "q8_0", "--no-mtp").exit_code == 0
    done = run("generate", "xyz", "--model", out, "--mtp", "1")
    assert done.exit_code == 2
    assert "mtp is 1, but the model has 0 MTP layers" in done.stderr
    record = run_json("generate", "xyz", "--model", out, "--mtp", "auto", "--max-new-tokens", "3")
    assert record["mtp"]["drafted"] == 0


def test_without_a_tokenizer_ids_still_work(model: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in Path(model).iterdir():
        if "tokenizer" not in path.name:
            (bare / path.name).symlink_to(path)
    done = run("generate", "abc", "--model", str(bare))
    assert done.exit_code == 2
    assert "has no tokenizer; give token ids with --tokens FILE" in done.stderr
    args = ("generate", "--tokens", "-", "--model", str(bare), "--max-new-tokens", "3")
    record = run_json(*args, stdin="[1, 2]")
    assert len(record["ids"]) == 3 and record["text"] == ""
    assert "--json gives the ids" in run(*args, stdin="[1, 2]").stderr


def test_limited_threads_change_nothing(model: str) -> None:
    args = ("generate", "abc", "--model", model, "--max-new-tokens", "4")
    assert run_json(*args, "--threads", "1")["ids"] == run_json(*args)["ids"]


def test_a_second_process_finds_every_kernel_compiled() -> None:
    command = [sys.executable, "-c", "from refimpl.cli import main; main()"]
    command += ["generate", "def main():", "--max-new-tokens", "4"]
    for first in (True, False):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert first or "compiling" not in done.stderr

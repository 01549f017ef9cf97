"""`refimpl` as a whole: help, version, speed of start-up, and one sentence for every mistake."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from refimpl.cli import main


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """The words of every command below `group`."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        yield (*above, name)


@pytest.mark.parametrize("words", list(commands(main)), ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.stdout
    assert f"refimpl {' '.join(words)} " in done.stdout.replace("\n", " ")


@pytest.mark.parametrize("program", ["refimpl", "hwmodel", "bench"])
def test_no_list_of_commands_cuts_a_sentence(program: str) -> None:
    for group in groups(importlib.import_module(f"{program}.cli").main):
        listed = CliRunner().invoke(group, ["--help"]).stdout.partition("Commands:")[2]
        ctx = click.Context(group)
        assert "..." not in listed
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            assert f"{name} {command.get_short_help_str(1000)}" in " ".join(listed.split())


def groups(group: click.Group) -> Iterator[click.Group]:
    """A group and all groups in it."""
    yield group
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from groups(command)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("refimpl", ["golden", "compare", "a", "b", "--tolerance", "nan"]),
        ("bench", ["run", "--timeout", "nan"]),
        ("bench", ["engine", "measure", "--patience", "nan"]),
        ("bench", ["engine", "residency", "--limit", "NaN"]),
        ("bench", ["loop", "measure", "--patience", "nan"]),
    ],
)
def test_not_a_number_is_refused(program: str, words: list[str]) -> None:
    done = CliRunner().invoke(importlib.import_module(f"{program}.cli").main, words)
    assert done.exit_code == 2 and f"'{words[-1]}' is not a number" in done.stderr


def test_version() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.startswith("refimpl, version ")


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["golden", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    heavy = ["numpy", "numba", "tokenizers", "safetensors", "gguf"]
    program = (
        "import sys\nfrom refimpl.cli import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.fixture
def folder(tmp_path: Path, tiny_dir: Callable[[str], Path]) -> Path:
    """Files for the mistakes below."""
    (tmp_path / "model").symlink_to(tiny_dir("tiny_a"))
    (tmp_path / "bad.json").write_text("{not json")
    (tmp_path / "text.json").write_text('{"ids": [1]}')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bool.json").write_text("[true, 2]")
    (tmp_path / "range.json").write_text("[1, 999]")
    (tmp_path / "negative.json").write_text("[1, -2]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "long.json").write_text(json.dumps([5] * 600))
    (tmp_path / "latin1.json").write_bytes(b"[1] \xe9")
    (tmp_path / "ok.json").write_text("[1, 2, 3]")
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    return tmp_path


MISTAKES = [
    (["generate"], "give either a PROMPT or --tokens FILE"),
    (["generate", "x", "--tokens", "ok.json"], "give either a PROMPT or --tokens FILE"),
    (["generate", ""], "the prompt is empty"),
    (["generate", "-"], "the prompt is empty"),  # nothing on stdin
    (["generate", "x", "--model", "none.gguf"], "none.gguf"),
    (["generate", "x", "--model", "nowhere/at/all"], "nowhere/at/all"),
    (["generate", "x", "--model", "garbage.gguf"], "garbage.gguf"),
    (["generate", "x", "--model", "."], "no config.json in this folder"),
    (["generate", "--tokens", "none.json"], "none.json: No such file"),
    (["generate", "--tokens", "."], "Is a directory"),
    (["generate", "--tokens", "bad.json"], "bad.json: not valid JSON"),
    (["generate", "--tokens", "text.json"], "text.json: expected a JSON list of token ids"),
    (["generate", "--tokens", "bool.json"], "bool.json: expected a JSON list of token ids"),
    (["generate", "--tokens", "negative.json"], "negative.json: expected"),
    (["generate", "--tokens", "empty.json"], "empty.json: the list of token ids is empty"),
    (["generate", "--tokens", "deep.json"], "deep.json: not valid JSON"),
    (["generate", "--tokens", "latin1.json"], "latin1.json: the list of ids is not UTF-8"),
    (["generate", "--tokens", "range.json"], "token 1 of the prompt is 999"),
    (["generate", "--tokens", "long.json"], "has 600 tokens, the context holds 512"),
    (["generate", "x", "--max-new-tokens", "-5"], "max-new-tokens is -5"),
    (["generate", "x", "--max-new-tokens", "many"], "'many' is not a valid integer"),
    (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
    (["generate", "x", "--temperature", "nan"], "temperature is nan"),
    (["generate", "x", "--top-k", "-1"], "top-k is -1"),
    (["generate", "x", "--top-p", "0"], "top-p is 0.0"),
    (["generate", "x", "--min-p", "2"], "min-p is 2.0"),
    (["generate", "x", "--seed", "-1"], "seed is -1"),
    (["generate", "x", "--mtp", "4"], "'4' is not one of"),
    (["generate", "x", "--threads", "0"], "threads is 0"),
    (["generate", "x", "--stop", ""], "a stop string is empty"),
    (["generate", "x", "--backend", "engine", "--dtype", "float64"], "float64"),
    (["generate", "x", "--dtype", "int8"], "'int8' is not one of"),
    (["generate", "x", "--wrong"], "No such option"),
    (["unknown"], "No such command 'unknown'"),
    (["convert", "none", "out.gguf", "--type", "q8_0"], "none"),
    (["convert", "model", "out.gguf"], "Missing option '--type'"),
    (["convert", "model", "out.gguf", "--type", "q3"], "'q3' is not one of"),
    (["convert", "model", "no/such/out.gguf", "--type", "f32"], "no/such"),
    (["convert", "model", "folder", "--type", "q4_0"], "a folder of safetensors can hold"),
    (["convert", "model", "out.gguf", "--type", "fp8"], "a GGUF file can hold f32, f16, bf16"),
    (["inspect", "."], ".: no config.json in this folder"),
    (["synth", "a.gguf", "--experts", "5"], "--experts goes with --preset slice, not with tiny_a"),
    (["synth", "a.gguf", "--preset", "slice", "--experts", "5"], "5 experts asked for"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda v: v if type(v) is str else None)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    args: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if args[0] == "generate" and "--model" not in args:
        args = [*args, "--model", "model"]
    before = {p.name for p in folder.iterdir()}
    done = CliRunner().invoke(main, args)
    lines = done.stderr.splitlines()
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("refimpl: error: ")
    assert message in lines[0]
    assert {p.name for p in folder.iterdir()} == before


def test_an_installation_without_the_embedded_model_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("refimpl.backends.EMBEDDED_FILE", "left-out.gguf")
    done = CliRunner().invoke(main, ["generate", "x"])
    assert done.exit_code == 2
    assert "no embedded model (mini/left-out.gguf is not in the package)" in done.stderr
    assert "--model PATH" in done.stderr


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    done = CliRunner().invoke(main, ["generate", "x", "--model", str(folder / "model")])
    assert done.exit_code == 2
    assert done.stderr == (
        "refimpl: error: the package 'tokenizers' is missing; "
        "install it with: pip install tokenizers\n"
    )


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("refimpl.backends.open_model", broken)
    done = CliRunner().invoke(main, ["generate", "x"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_without_arguments_the_help_is_shown() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 2
    assert "Commands:" in done.output


FULL = Path("/dev/full")  # every write to it finds the disk full
full = pytest.mark.skipif(not FULL.is_char_device(), reason="this system has no /dev/full")


def in_shell(words: str, redirection: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A `refimpl` command with its streams led elsewhere."""
    command = f'"{sys.executable}" -c "from refimpl.cli import main; main()" {words} {redirection}'
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=folder)


@full
@pytest.mark.parametrize("words", ["--help", "inspect mini", "inspect mini --json"])
def test_an_output_that_cannot_be_written_is_told(words: str, tmp_path: Path) -> None:
    done = in_shell(words, f">{FULL}", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "refimpl: error: output: No space left on device\n"


@pytest.mark.parametrize("redirection", ["2>&-", pytest.param(f"2>{FULL}", marks=full)])
def test_remarks_that_nobody_can_read_do_not_stop_the_work(
    redirection: str, folder: Path, tmp_path: Path
) -> None:
    words = f"convert {folder}/model out.gguf --type f32"  # says what it wrote
    done = in_shell(words, redirection, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    read = in_shell("inspect out.gguf --json", redirection, tmp_path)
    assert json.loads(read.stdout)["format"] == "GGUF"
    assert in_shell("inspect nothing.gguf", redirection, tmp_path).returncode == 2

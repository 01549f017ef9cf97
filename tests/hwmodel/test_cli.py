"""The command line: help with examples, exit codes, errors in one line, data on stdout."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from hwmodel.cli import main

RUNNER = CliRunner()


def run(*words: str) -> Result:
    result = RUNNER.invoke(main, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    if isinstance(group, click.Group):
        ctx = click.Context(group)
        for name in group.list_commands(ctx):
            yield from commands(group.get_command(ctx, name), (*path, name))


ALL = dict(commands(main))


@pytest.mark.parametrize("path", ALL, ids=lambda p: " ".join(p) or "hwmodel")
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"hwmodel {' '.join(path)}".strip() in result.output


@pytest.mark.parametrize("path", ALL, ids=lambda p: " ".join(p) or "hwmodel")
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    for parameter in ALL[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_every_command_that_prints_data_prints_json() -> None:
    for path, command in ALL.items():
        if not isinstance(command, click.Group):
            assert any("--json" in p.opts for p in command.params), path


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", "--device", "m4max"], 0),
        (["plan", "--device", "M4Max", "--quant", "q4_k_s", "--engine", "LLAMA.CPP"], 0),
        (["plan", "--device", "h100", "--count", "1", "--quant", "Q8_0"], 1),
        (["plan", "--device", "nothing"], 2),
        (["plan", "--device", "m4max", "--context", "1M"], 2),
        (["plan", "--device", "m4max", "--engine", "vllm"], 2),
        (["plan", "--device", "m4max", "--count", "x"], 2),
        (["plan"], 2),
        (["plan", "--no-such-option"], 2),
        (["frobnicate"], 2),
        (["devices", "show", "nothing"], 2),
        (["devices", "check", "none.toml"], 2),
        (["sweep", "--device", "m4max", "--depths", "1,x"], 2),
        (["sweep", "--device", "m4max", "--drafts", "7"], 2),
        (["explain", "decode", "--device", "nothing"], 2),
        (["compare", "m4max", "nothing"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    if code == 2:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1


def test_plan_as_json_is_one_object_on_stdout() -> None:
    result = run("plan", "--device", "dgx-spark", "--json")
    found = json.loads(result.stdout)
    assert found["device"] == "dgx-spark"
    assert found["fits"] is True
    assert result.stderr == ""


def test_devices_list_show_check(tmp_path: Path) -> None:
    listed = json.loads(run("devices", "list", "--json").stdout)
    assert {"h100", "m4max"} <= {d["name"] for d in listed}
    assert "m4max" in run("devices", "list").stdout
    shown = run("devices", "show", "m4max").stdout
    assert "sudo sysctl iogpu.wired_limit_mb=122880" in shown
    assert "https://github.com/youssofal/MTPLX/issues/64" in shown
    good = tmp_path / "box.toml"
    good.write_text(
        'schema = 1\nname = "box"\nclass = "cpu"\n'
        '[memory]\ntotal_bytes = { value = 1e11, source = "label", as_of = "2026-01" }\n'
        '[bandwidth]\npeak_bytes_per_s = { value = 1e11, source = "unverified", as_of = "2026" }\n'
    )
    assert "2 numbers, each with a source; unverified: bandwidth" in run(
        "devices", "check", str(good)
    ).stdout.replace("\n", " ")
    good.write_text(good.read_text().replace('source = "label", ', ""))
    refused = run("devices", "check", str(good))
    assert refused.exit_code == 2
    assert "'memory.total_bytes' has no source" in refused.stderr


def test_engines_list_and_show() -> None:
    assert "llama.cpp" in run("engines", "list").stdout
    shown = run("engines", "show", "vllm").stdout
    assert "--tensor-parallel-size {value}" in shown
    assert json.loads(run("engines", "show", "sglang", "--json").stdout)["max_drafts"] == 3
    assert len(json.loads(run("engines", "list", "--json").stdout)) > 10


def test_compare_puts_devices_side_by_side() -> None:
    text = run("compare", "m4max", "dgx-spark", "h100").stdout
    assert len(text.splitlines()) == 4
    rows = json.loads(run("compare", "m4max", "dgx-spark", "--json").stdout)
    assert [r["device"] for r in rows] == ["m4max", "dgx-spark"]
    assert rows[0]["decode_short_tok_s"] > rows[1]["decode_short_tok_s"]


def test_sweep_is_tidy_csv() -> None:
    result = run("sweep", "--device", "m4max", "--depths", "0,4K,64K", "--drafts", "0,1")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    decode = [r for r in rows if r["quantity"] == "decode_tok_s"]
    assert [(int(r["depth"]), int(r["drafts"])) for r in decode] == [
        (0, 0), (0, 1), (4096, 0), (4096, 1), (65536, 0), (65536, 1),
    ]  # fmt: skip
    assert {r["quantity"] for r in rows} == {"decode_tok_s", "prefill_tok_s"}
    for r in rows:
        assert 0 < float(r["low"]) < float(r["value"]) < float(r["high"])
    as_json = json.loads(run("sweep", "--device", "m4max", "--depths", "0", "--json").stdout)
    assert as_json[0]["device"] == "m4max"


def test_explain_goes_down_to_counts_and_sources() -> None:
    words = ["explain", "decode", "--device", "m4max", "--quant", "Q4_K_S", "--depth", "8192"]
    found = json.loads(run(*words, "--json").stdout)
    assert found["counts"]["multiply_adds"]["routed"] == 42 * 8 * 3 * 1280 * 4096
    assert found["counts"]["kv_bytes_written"] == 45 * 4096
    total = sum(t["seconds"] for t in found["terms"])
    assert 1 / total == pytest.approx(found["value"], rel=1e-6)
    assert all(s["source"] for s in found["sources"])
    text = run(*words).stdout
    assert "Terms" in text
    assert "multiply-adds" in text
    assert "github.com/youssofal/MTPLX" in text


@pytest.mark.parametrize("figure", ["memory", "prefill", "ttft"])
def test_explain_every_figure(figure: str) -> None:
    assert run("explain", figure, "--device", "h100", "--count", "4").exit_code == 0
    found = json.loads(run("explain", figure, "--device", "h100", "--json").stdout)
    assert found["weights_bytes_by_role"]["routed"] > 1e10


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_plan_can_be_drawn(name: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    assert run("plan", "--device", "m4max", "--plot", str(path)).exit_code == 0
    assert path.read_bytes().startswith(start)
    assert run("plan", "--device", "m4max", "--plot", "a.bmp").exit_code == 2


def test_a_plan_imports_nothing_heavy() -> None:
    """Neither --help nor a plan loads numpy or anything larger."""
    code = (
        "import sys\n"
        "from hwmodel.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'scipy', 'pandas', 'matplotlib', 'numba', 'torch'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    for words in (["--help"], ["plan", "--device", "m4max"], ["plan", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "heavy: []"


@pytest.mark.parametrize(
    "command",
    [
        "plan --device", "cost --device", "sweep --device", "explain decode --device", "compare",
        "roofline --device", "frontier --device",
    ],
)  # fmt: skip
def test_a_model_of_short_context_needs_no_option(command: str) -> None:
    """What is asked by default ends where the model does: 4,096 tokens here."""
    result = run(*command.split(), "m4max", "--model", "llama-2-7b")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("x.pdf", "expected a name that ends in .png or .svg"),
        ("no/x.png", "the folder of"),
        (f"{'x' * 300}.png", "File name too long"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_plan(
    plot: str, words: str, tmp_path: Path
) -> None:
    done = RUNNER.invoke(main, ["plan", "--device", "m4max", "--plot", str(tmp_path / plot)])
    assert done.exit_code == 2 and words in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())

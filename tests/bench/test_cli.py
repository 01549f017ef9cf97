"""`bench compare` and `bench calibrate` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.runs import published_runs_path, read_runs, write_runs

RUNNER = CliRunner()
COMMANDS = ("calibrate", "compare")


def run(*words: str, text: str | None = None) -> Result:
    result = RUNNER.invoke(main, list(words), input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., Path]:
    """A CSV of the published rows that a filter keeps."""

    def file(keep: Callable[..., bool]) -> Path:
        records, _ = read_runs(published_runs_path())
        path = tmp_path / "runs.csv"
        path.write_text(write_runs([r for r in records if keep(r)]))
        return path

    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"bench {name}" in result.output
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert all(p.help for p in command.params if isinstance(p, click.Option))


def test_compare_writes_one_object(runs: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    result = run("compare", "--runs", str(runs(lambda r: r.sweep == "s35-m4max")),
                 "--json", str(out))  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert set(found) == {"rows", "summary"}
    assert len(found["rows"]) == 7 + 6
    for row in found["rows"]:
        promised = "id quantity measured predicted low high status reason"
        assert set(promised.split()) <= set(row)
        assert row["low"] < row["predicted"] < row["high"]
    assert found["summary"]["coverage"] == 1.0
    assert "m4max" in result.stdout


def test_dash_puts_json_alone_on_stdout(runs: Callable[..., Path]) -> None:
    path = runs(lambda r: r.sweep == "s35-spark")
    found = json.loads(run("compare", "--runs", str(path), "--json", "-").stdout)
    piped = run("compare", "--runs", "-", "--json", "-", text=path.read_text())
    assert json.loads(piped.stdout) == found


def test_bad_rows_are_notes_and_unknown_devices_are_declined(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(
        "id,model,quant,device,engine,decode_tok_s,fit_ok\n"
        "A,Step-3.5-Flash,Q4_K_S,m4max,llama.cpp,48 tok/s,yes\n"
        "B,Step-3.5-Flash,Q4_K_S,m4max,llama.cpp,20 ms,yes\n"
        "C,Step-3.5-Flash,Q4_K_S,warp-core,llama.cpp,500,yes\n"
        "D,Step-3.5-Flash,Q4_K_S,m4max,llama.cpp,9999,yes\n"
    )
    result = run("compare", "--runs", str(path), "--json", "-")
    assert result.exit_code == 0
    assert "line 3 (B): decode_tok_s is '20 ms'" in result.stderr
    rows = {r["id"]: r for r in json.loads(result.stdout)["rows"]}
    assert set(rows) == {"A", "C", "D"}
    assert rows["C"]["status"] == "declined"
    assert rows["C"]["predicted"] is None
    assert "warp-core" in rows["C"]["reason"]
    assert "beyond the physical limit" in rows["D"]["reason"]
    assert rows["D"]["predicted"] == pytest.approx(rows["A"]["predicted"])


def test_out_writes_plots_table_and_data(runs: Callable[..., Path], tmp_path: Path) -> None:
    path = runs(lambda r: r.sweep in ("s35-spark", "s35-m4max"))
    folder = tmp_path / "pictures"
    result = run("compare", "--runs", str(path), "--out", str(folder))
    assert result.exit_code == 0
    names = {p.name for p in folder.iterdir()}
    assert names == {
        f"{n}.{kind}" for kind in ("png", "svg")
        for n in ("predicted-measured", "decode-depth", "bytes-by-role", "draft-gain", "residuals")
    } | {"table.txt", "comparison.json"}  # fmt: skip
    assert (folder / "decode-depth.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text() in result.stdout


def test_without_options_the_published_runs_are_drawn_into_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, an installed package included: the pictures come under that folder."""
    monkeypatch.chdir(tmp_path)
    result = run("compare")
    assert result.exit_code == 0
    folder = Path("reports/compare")
    assert f"wrote {folder}/residuals.png" in result.stderr
    assert (folder / "table.txt").read_text() == result.stdout
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.svg"))) == 5


def test_options_draw_nothing_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("compare", "--device", "m4max")
    assert list(tmp_path.iterdir()) == []


def test_own_runs_beside_the_published_ones(runs: Callable[..., Path]) -> None:
    path = runs(lambda r: r.id == "S068")
    words = ("compare", "--runs", "published", "--runs", str(path), "--json", "-")
    found = json.loads(run(*words).stdout)
    assert [r["id"] for r in found["rows"]].count("S068") == 2 * [
        r["id"] for r in json.loads(run("compare", "--json", "-").stdout)["rows"]
    ].count("S068")


def test_filters_by_device_and_model() -> None:
    only = json.loads(
        run("compare", "--device", "M4 Max", "--model", "step 3.5", "--json", "-").stdout
    )
    assert {r["device"] for r in only["rows"]} <= {"m4max"}
    assert {r["model"] for r in only["rows"]} == {"step-3.5-flash"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--runs", "none.csv"], "cannot be read"),
        (["compare", "--device", "m4maxx"], "did you mean m4max"),
        (["compare", "--device", "rtx-pro-6000"], "no row of"),
        (["compare", "--fit", "none.json"], "cannot be read"),
        (["calibrate", "--runs", "none.csv"], "cannot be read"),
        (["compare", "--no-such"], "No such option"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_too_few_rows_make_no_fit(runs: Callable[..., Path], tmp_path: Path) -> None:
    path = runs(lambda r: r.id in ("S068", "S069"))
    result = run("calibrate", "--runs", str(path), "--out", str(tmp_path / "fit.json"))
    assert result.exit_code == 2
    assert "usable figures" in result.stderr
    assert not (tmp_path / "fit.json").exists()


def test_results_that_cannot_be_written_are_refused_before_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for option, name, words in (
        ("--out", "file", "a file; expected a folder"),
        ("--json", "no/x.json", "No such file or directory"),
    ):
        done = run("compare", "--device", "m4max", option, str(tmp_path / name))
        assert (done.exit_code, done.stdout) == (2, "") and words in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

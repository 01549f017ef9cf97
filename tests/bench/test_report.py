"""The validation report: the same data give the same bytes, and what is missing is said."""

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.report import row_notes, write_report
from bench.runs import published_runs_path, read_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report without a loop and without rounds of the engine."""
    found = tmp_path_factory.mktemp("report")
    write_report(found / "validation.md", found / "loop", found / "cpu_engine")
    return found


def test_the_same_data_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    words = ["report", "--out", str(tmp_path / "validation.md"), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and set(json.loads(result.stdout)) >= {"coverage", "by_device"}
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(names) == 1 + 10 + 2 + 5
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_report_says_what_and_how_well(folder: Path) -> None:
    text = (folder / "validation.md").read_text()
    for heading in (
        "Are the predictions true?", "What was predicted", "Errors", "By device",
        "Where it is wrong", "The loop closed", "The CPU engine", "does not show",
    ):  # fmt: skip
        assert heading in text
    assert "baseline without a fit" in text and "its sweep left out" in text
    assert "Not run yet: `bench loop --help`" in text
    assert "Not measured yet: `bench engine --help`" in text
    assert str(folder) not in text and "nan" not in text
    for name in ("predicted-measured", "residuals", "decode-depth", "bytes-by-role", "draft-gain"):
        assert f"](compare/{name}.png)" in text and (folder / "compare" / f"{name}.png").is_file()


def test_the_tables_hold_the_values_behind_the_pictures(folder: Path) -> None:
    def read(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((folder / "compare" / name).read_text())))

    rows = read("rows.csv")
    compared = json.loads((folder / "compare" / "comparison.json").read_text())["rows"]
    assert [r["id"] for r in rows] == [r["id"] for r in compared]
    depths = read("decode-depth.csv")
    assert {bool(r["measured"]) for r in depths} == {True, False}
    shares = read("bytes-by-role.csv")
    assert all(int(r["kv_bytes"]) > 0 and int(r["routed_bytes"]) > 0 for r in shares)
    assert {r["drafts"] for r in read("draft-gain.csv")} == {"1", "2", "3"}
    assert {r["group"] for r in read("errors.csv")} == {"quantity", "device", "engine"}


def test_every_note_is_of_a_published_row_and_the_worst_have_one(folder: Path) -> None:
    ids = {r.id for r in read_runs(published_runs_path())[0]}
    assert {name for name, _ in row_notes()} <= ids
    assert "No reason found in the source." not in (folder / "validation.md").read_text()

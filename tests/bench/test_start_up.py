"""The start of `refimpl generate`, cold and warm, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bench import start_up
from hwmodel.errors import RunFileError


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs of the command are replaced by their folder of kernels: full ones start at once."""
    folders: list[Path] = []

    def start(cache: Path) -> dict[str, Any]:
        cold = cache not in folders
        folders.append(cache)
        seconds = 10.0 + len(folders) if cold else 0.5
        return {"first_text_s": seconds, "whole_s": seconds + 1, "announced": cold}

    monkeypatch.setattr(start_up, "start", start)
    return folders


def test_every_cold_run_has_an_empty_folder_and_warm_ones_a_full_one(launched: list[Path]) -> None:
    record = start_up.measure(cold=2, warm=3)
    assert len(set(launched[:2])) == 2 and set(launched[2:]) == {launched[1]}
    assert [r["announced"] for r in record["cold"] + record["warm"]] == [True] * 2 + [False] * 3


def test_the_report_judges_the_first_text(launched: list[Path]) -> None:
    record = start_up.measure(cold=1, warm=1)
    table = start_up.section(record)[-1].splitlines()
    assert "11.00 (11.00 to 11.00)" in table[2] and table[2].endswith("reached |")
    slow = {**record, "warm": [{"first_text_s": 1.2, "whole_s": 1.3, "announced": False}]}
    assert start_up.section(slow)[-1].endswith("short |")
    assert start_up.section(None) == []


def test_a_run_of_the_real_command_that_fails_says_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFIMPL_SIMD", "nonsense")
    with pytest.raises(click.ClickException, match="nonsense"):
        start_up.start(tmp_path)


def test_a_record_is_read_back(tmp_path: Path, launched: list[Path]) -> None:
    record = start_up.measure(cold=1, warm=1)
    (tmp_path / start_up.FILE).write_text(json.dumps(record))
    assert start_up.read_record(tmp_path / start_up.FILE) == record
    assert start_up.read_record(tmp_path / "none.json") is None
    (tmp_path / start_up.FILE).write_text("{")
    with pytest.raises(RunFileError, match="not JSON"):
        start_up.read_record(tmp_path / start_up.FILE)


def test_where_nothing_can_be_written_nothing_is_measured(
    tmp_path: Path, launched: list[Path]
) -> None:
    result = CliRunner().invoke(start_up.main, ["--out", str(tmp_path / "no" / "x.json")])
    assert result.exit_code == 2 and "No such file or directory" in result.output
    assert not launched

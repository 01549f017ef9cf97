"""The page about the embedded model: what its tables say, and that it is written the same again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from refimpl.mini import report, report_types

MEASURED = json.loads((Path(__file__).parents[2] / "reports" / "mini.json").read_text("utf-8"))


def test_a_row_of_a_type_holds_its_figures() -> None:
    found = copy.deepcopy(MEASURED["by_type"])
    found["types"] = found["types"][:2]
    row = found["types"][1]
    row["perplexity"] = {"value": 12.3456, "standard_error": 0.5}
    row["distance"]["top1_agreement"] = {"value": 0.975, "standard_error": 0.0125}
    lines = report_types.type_section(found)
    (shown,) = [line for line in lines if line.startswith(f"| {row['type']} |")]
    assert "| 12.346 ± 0.500 |" in shown and shown.endswith("| 97.50 ± 1.25 % |")
    assert any(line.startswith("| f32 |") and line.endswith("| 1 | | | | |") for line in lines)


def test_drafts_and_experts_of_code_and_prose_are_listed() -> None:
    lines = report_types.statistics_section(MEASURED["by_type"]["statistics"])
    assert sum(line.startswith(("| code |", "| prose |")) for line in lines) == 6
    assert sum(line.startswith(f"| {n} |") for n in range(1, 9) for line in lines) >= 8


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    page = report.page(MEASURED, report.read_log(report.LOG))
    committed = (Path(__file__).parents[2] / "reports" / "mini.md").read_text("utf-8")
    assert page.rstrip() == committed.rstrip()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_curve_is_drawn_the_same_again(tmp_path: Path, suffix: str) -> None:
    drawn = []
    for _ in range(2):
        report.draw_curve(report.read_log(report.LOG)[:60], 4.0, tmp_path)
        drawn.append((tmp_path / f"{report.CURVE}.{suffix}").read_bytes())
    assert drawn[0] == drawn[1]

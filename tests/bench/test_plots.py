"""The pictures say what they show: axes with units, guides, sources, groups told apart."""

from typing import Any

import pytest

from bench.compare import compare
from bench.plots import depth_figure, depth_panels, panels_of, scatter_figure
from bench.runs import RunRecord, published_runs_path, read_runs


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    found, _ = read_runs(published_runs_path())
    return [r for r in found if r.sweep.startswith(("s35", "s37"))]


@pytest.fixture(scope="module")
def rows(records: list[RunRecord]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = compare(records)["rows"]
    return found


def visible(figure: Any) -> list[Any]:
    return [a for a in figure.axes if a.get_visible()]


def texts(figure: Any) -> str:
    return " | ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_calibrated_and_held_out_are_told_apart() -> None:
    base = {"judged": True, "quantity": "decode_tok_s", "device": "x", "measured": 10.0}
    rows = [
        {**base, "predicted": 9.0, "status": "calibrated", "held_out_predicted": 8.0},
        {**base, "predicted": 7.0, "status": "held_out", "held_out_predicted": None},
        {**base, "predicted": 6.0, "status": "extrapolated", "held_out_predicted": None},
        {**base, "predicted": None, "status": "declined", "held_out_predicted": None},
        {
            **base,
            "predicted": 1.0,
            "status": "held_out",
            "held_out_predicted": None,
            "judged": False,
        },
    ]
    inside, outside = panels_of(rows)
    assert [p[2] for p in inside.points] == [9.0]
    assert [(p[2], p[3]) for p in outside.points] == [(8.0, False), (7.0, False), (6.0, True)]
    assert "in the fit" in inside.title
    assert "held out" in outside.title


def test_predicted_against_measured(rows: list[dict[str, Any]]) -> None:
    figure = scatter_figure(rows, "measured: runs.csv; predicted: fit of today")
    for axes in visible(figure):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xlabel() == "measured, tokens/s"
        assert axes.get_ylabel() == "predicted, tokens/s"
    found = texts(figure)
    for expected in ("±20 %", "predicted = measured", "m4max", "dgx-spark", "median error",
                     "measured: runs.csv"):  # fmt: skip
        assert expected in found


def test_decode_against_depth(records: list[RunRecord]) -> None:
    panels = depth_panels(records)
    assert {"m4max", "dgx-spark"} <= {name for name, _ in panels}
    for _, curves in panels:
        assert all(len(c.measured) >= 4 for c in curves)
    figure = depth_figure(records, "measured: runs.csv; predicted: fit of today")
    assert len(visible(figure)) == len(panels)
    for axes in visible(figure):
        assert axes.get_xlabel() == "tokens in the KV cache"
        assert axes.get_ylim()[0] == 0
    found = texts(figure)
    assert all(word in found for word in ("its band", "datasheet limit", "Step-3.5-Flash Q4_K_S"))


def test_nothing_to_draw_is_said() -> None:
    assert "no row that counts has a prediction" in texts(scatter_figure([], "x"))
    assert "no sweep" in texts(depth_figure([], "x"))

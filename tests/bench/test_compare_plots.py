"""Bytes by role, the gain of drafts and residuals: the values and what the pictures say."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare
from bench.compare_plots import (
    gains,
    gains_figure,
    read_bytes,
    residual_groups,
    residuals_figure,
    role_bars,
    roles_figure,
)
from bench.resolve import resolve
from bench.runs import RunRecord, published_runs_path, read_runs
from hwmodel.fit import load_fit
from hwmodel.predict import predict
from hwmodel.quant import weight_bytes


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    found, _ = read_runs(published_runs_path())
    return [r for r in found if r.sweep.startswith("s35")]


def texts(figure: Any) -> str:
    return " | ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_bytes_of_a_token_are_those_of_the_type(records: list[RunRecord]) -> None:
    bars = role_bars(records)
    assert [b.total for b in bars] == sorted((b.total for b in bars), reverse=True)
    names = [b.label for b in bars]
    assert "Step 3.5 Flash Q4_K_S" in names
    run = resolve(next(r for r in records if r.quant == "Q4_K_S"))
    short, deep = read_bytes(run, 0), read_bytes(run, 65536)
    assert {k: v for k, v in short.items() if k != "kv"} == {
        k: v for k, v in deep.items() if k != "kv"
    }
    assert deep["kv"] > 100 * short["kv"]
    assert 0 < sum(short.values()) < 0.1 * weight_bytes(run.model, run.quant)
    found = texts(roles_figure(records))
    assert "routed experts" in found and "GB read to decode one token" in found


def test_gains_are_ratios_within_a_sweep(records: list[RunRecord]) -> None:
    found = gains(records, load_fit())
    three = [g for g in found if set(g.measured) == {1, 2, 3}]
    assert len(three) >= 3
    first = next(g for g in three if "IQ4_XS" in g.title)
    assert first.measured[1] == (pytest.approx(45.61 / 35.38),)
    assert all(0.5 < v < 2.5 for g in found for v in g.predicted.values())
    shown = texts(gains_figure(records, load_fit(), "measured: runs.csv"))
    assert "drafts per step" in shown and "speed-up over no drafts" in shown


HOST = """schema = 1
name = "host"
class = "cpu"
[memory]
total_bytes = { value = 512e9, source = "test", as_of = "2026-11" }
[bandwidth]
measured_bytes_per_s = { value = 90e9, source = "test", as_of = "2026-11" }
cache_bytes_per_s = { value = 900e9, source = "test", as_of = "2026-11" }
[flop]
measured_fp32_per_s = { value = 2e12, source = "test", as_of = "2026-11" }
[cpu]
cache_bytes = { value = CACHE, source = "test", as_of = "2026-11" }
"""


@pytest.mark.parametrize("cache", ["32e6", "400e9"])
def test_gains_of_a_probed_host_are_those_that_its_rows_are_predicted_with(
    records: list[RunRecord], tmp_path: Path, cache: str
) -> None:
    """With the host's own effects, and from its last cache where the model stays there."""
    path = tmp_path / "host.toml"
    path.write_text(HOST.replace("CACHE", cache))
    sweep = "s35-pr20981-Q4_K_S-32768"
    rows = [
        dataclasses.replace(r, device=str(path), n_devices=1.0, backend="cpu")
        for r in records
        if r.sweep == sweep
    ]
    found = gains(rows, load_fit())[0]
    speeds = [
        predict(resolve(next(r for r in rows if r.drafts == n)), "decode_tok_s").value
        for n in (0, 2)
    ]
    assert speeds[0] and speeds[1]
    assert found.predicted[2] == pytest.approx(speeds[1] / speeds[0])


def test_a_sweep_without_a_plain_run_has_no_gain(records: list[RunRecord]) -> None:
    drafted = [r for r in records if r.drafts]
    assert gains(drafted, load_fit()) == []
    assert "no sweep with and without drafts" in texts(gains_figure(drafted, load_fit(), "x"))


def test_small_groups_share_a_line(records: list[RunRecord]) -> None:
    rows = compare(records)["rows"]
    groups = residual_groups(rows, "device")
    sizes = [len(g) for name, g in groups if name != "others"]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 3
    judged = [r for r in rows if r["judged"] and r["predicted"] is not None]
    assert sum(len(g) for _, g in groups) == len(judged)
    found = texts(residuals_figure(rows, "measured: runs.csv"))
    for word in ("calibrated: in the fit", "held out", "predicted / measured", "by engine"):
        assert word in found


def test_nothing_to_draw_is_said(records: list[RunRecord]) -> None:
    lost = [dataclasses.replace(r, device="somebody's machine") for r in records[:3]]
    assert "no row of a model" in texts(roles_figure(lost))
    assert "no row that counts has a prediction" in texts(residuals_figure([], "x"))

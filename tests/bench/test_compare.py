"""bench compare: predictions beside measurements, in the row's own scope, without looking."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from bench.compare import compare, own_run, speed_text, worst_rows
from bench.compare_view import comparison_text
from bench.importers.read import import_runs
from bench.importers.table import Stated
from bench.runs import RunRecord, published_runs_path, read_runs
from hwmodel.fit import load_fit

ROW = RunRecord(
    id="X1", model="Step-3.5-Flash", total_params_b=196.81, active_params_b=11.0, quant="Q4_K_S",
    weights_gb=111.5, device="m4max-40core", n_devices=1, engine="llama.cpp",
    engine_version="Metal", mtp="none", batch_concurrency=1, prompt_tokens=2048,
    context_depth=2048, gen_tokens=128, decode_tok_s=48.5, prefill_tok_s=420.0,
    source_date="2026-08", fit_ok="yes", sweep="x",
)  # fmt: skip


def one(record: RunRecord, quantity: str = "decode_tok_s") -> dict:  # type: ignore[type-arg]
    rows = compare([record])["rows"]
    return next(r for r in rows if r["quantity"] == quantity)


def test_every_measured_figure_has_one_row() -> None:
    rows = compare([ROW, dataclasses.replace(ROW, id="X2", prefill_tok_s=None)])["rows"]
    assert [(r["id"], r["quantity"]) for r in rows] == [
        ("X1", "decode_tok_s"), ("X1", "prefill_tok_s"), ("X2", "decode_tok_s"),
    ]  # fmt: skip


def test_measured_figures_change_no_prediction() -> None:
    other = one(dataclasses.replace(ROW, decode_tok_s=4.0, prefill_tok_s=1e7, ttft_ms=1.0))
    same = ("predicted", "low", "high", "limiting", "baseline")
    assert {k: other[k] for k in same} == {k: one(ROW)[k] for k in same}


def test_beyond_the_physical_limit_is_flagged_and_kept() -> None:
    found = one(dataclasses.replace(ROW, decode_tok_s=5000.0))
    assert found["beyond_limit"] and "physical limit" in found["reason"]
    assert found["predicted"] == one(ROW)["predicted"]
    assert not one(ROW)["beyond_limit"]


def test_figures_are_in_the_scope_of_the_row() -> None:
    batch = dataclasses.replace(ROW, batch_concurrency=8, decode_tok_s=120.0)
    user = one(batch)
    total = one(dataclasses.replace(batch, decode_scope="aggregate"))
    for key in ("predicted", "low", "high"):
        assert total[key] == pytest.approx(8 * user[key])


def test_a_row_without_known_hardware_is_declined_with_null_figures() -> None:
    found = one(dataclasses.replace(ROW, device="somebody's machine"))
    assert found["status"] == "declined" and found["reason"]
    assert found["predicted"] is found["low"] is found["high"] is None


def test_a_new_configuration_of_a_known_family_is_held_out() -> None:
    assert one(dataclasses.replace(ROW, context_depth=5000, prompt_tokens=5000))["status"] == (
        "held_out"
    )


def test_a_published_run_in_another_tools_words_is_no_held_out_one() -> None:
    """llama-bench's file tells neither the prompt of decoding nor the fit's date."""
    file = Path(__file__).parent / "data" / "step-m4max.json"
    records = import_runs(str(file), Stated()).records
    found = compare(records)["rows"]
    assert {r["status"] for r in found} == {"calibrated"}
    assert all(r["held_out_predicted"] for r in found)
    slower = [dataclasses.replace(r, decode_tok_s=0.97 * r.decode_tok_s)
              for r in records if r.decode_tok_s and r.context_depth]  # fmt: skip
    assert {r["status"] for r in compare(slower)["rows"]} == {"held_out"}


def test_of_two_runs_of_one_configuration_the_one_measured_is_meant() -> None:
    run = next(r for r in load_fit().runs if r.quantity == "decode_tok_s")
    other = dataclasses.replace(run, id="twin", measured=1.5 * run.measured)
    for runs in ((run, other), (other, run)):
        fit = dataclasses.replace(load_fit(), runs=runs)
        found = own_run(fit, "decode_tok_s", run.config, 1.02 * run.measured)
        assert found is run


def test_efficiencies_of_another_host_saw_no_run_of_this_one() -> None:
    run = load_fit().runs[0]
    borrowed = dataclasses.replace(load_fit(), borrowed="another host's")
    assert own_run(load_fit(), run.quantity, run.config, run.measured) is not None  # type: ignore[arg-type]
    assert own_run(borrowed, run.quantity, run.config, run.measured) is None  # type: ignore[arg-type]


def test_unknown_names_are_extrapolated_with_a_wider_band() -> None:
    strange = one(dataclasses.replace(ROW, engine="turbo9000"))
    assert strange["status"] == "extrapolated" and "turbo9000" in strange["reason"]
    assert strange["high"] / strange["low"] > one(ROW)["high"] / one(ROW)["low"]


def test_rows_that_may_not_be_judged_are_predicted_all_the_same() -> None:
    found = compare([dataclasses.replace(ROW, fit_ok="no (warm-up)")])
    assert all(r["predicted"] for r in found["rows"])
    assert found["summary"]["judged"] == 0 and found["summary"]["median"] is None


def test_the_published_runs() -> None:
    """Coverage, errors of left-out sweeps and bands of the shipped fit on the shipped runs."""
    records, _ = read_runs(published_runs_path())
    found = compare(records, load_fit())
    summary = found["summary"]
    assert summary["coverage"] >= 0.95
    decode = summary["by_quantity"]["decode_tok_s"]
    prefill = summary["by_quantity"]["prefill_tok_s"]
    assert decode["held_out"]["median"] <= 0.10 and decode["held_out"]["p90"] <= 0.30
    assert prefill["held_out"]["median"] <= 0.20
    for part in (decode, prefill):
        assert 0.80 <= part["in_band"] <= 0.95
        assert 0.80 <= part["held_out"]["in_band"] <= 0.95
    assert decode["held_out"]["median"] < decode["baseline"]["median"]
    assert len(worst_rows(found["rows"])) == 10
    json.dumps(found, allow_nan=False)


def test_every_figure_is_finite() -> None:
    records, _ = read_runs(published_runs_path())
    for r in compare(records)["rows"]:
        if r["status"] != "declined":
            assert all(math.isfinite(r[k]) and r[k] > 0 for k in ("predicted", "low", "high"))
            assert r["low"] < r["predicted"] < r["high"]


def test_a_declined_row_is_counted_under_its_canonical_names() -> None:
    row = dataclasses.replace(ROW, device="Apple M4 Max (128 GB)", quant="", weights_gb=None)
    found = compare([row])
    assert found["rows"][0]["status"] == "declined"
    assert found["rows"][0]["predicted"] is None
    assert set(found["summary"]["by_device"]) == {"m4max"}


def test_impossible_figures_are_named_with_both_numbers() -> None:
    text = comparison_text(compare([dataclasses.replace(ROW, decode_tok_s=5000.0)]))
    assert "impossible: X1: measured 5000 tok/s is beyond the physical limit of" in text


def test_rows_that_do_not_count_are_shown_where_none_does() -> None:
    rows = [dataclasses.replace(ROW, id=f"X{i}", fit_ok="no") for i in range(6)]
    text = comparison_text(compare(rows))
    assert "none counts in the errors below" in text and "errors in %" not in text
    assert "not judged" in text and "2 more, see --json" in text


@pytest.mark.parametrize(
    ("tok_s", "text"), [(0.123456, "0.1235"), (48.18, "48.18"), (1000.4, "1000"), (17940, "17940")]
)
def test_speeds_are_never_written_with_an_exponent(tok_s: float, text: str) -> None:
    assert speed_text(tok_s) == text

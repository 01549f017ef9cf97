"""Calibration: honest errors, one estimator, and a fit that is never replaced by a worse one."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest

from bench.calibrate import baseline_tok_s, by_sweep, calibrate, errors_of, leave_out, worse
from bench.paired import change_of
from bench.problem import Problem, per_user, samples_of
from bench.resolve import resolve
from bench.runs import RunRecord, published_runs_path, read_runs
from hwmodel.fit import Fit, FittedRun, load_fit, seconds
from hwmodel.predict import predict
from refimpl.errors import InputError


@cache
def some_runs() -> tuple[RunRecord, ...]:
    """Published runs of two machines and two engines: enough to fit, few enough to be quick."""
    records, _ = read_runs(published_runs_path())
    return tuple(r for r in records if r.device in ("m4max-40core", "h200", "h100-sxm"))


@cache
def problem() -> Problem:
    return Problem(samples_of(some_runs()))


def test_the_fit_and_the_estimator_agree_on_every_run() -> None:
    """The vectorised times are those of predict(): there is one estimator."""
    p = problem()
    effects = np.linspace(-0.3, 0.3, len(p.names))
    fit = p.fit(effects, np.zeros((len(effects), len(effects))), {"decode_tok_s": 0.1})
    logs, _ = p.times(effects)
    for sample, log_time in zip(p.samples, logs, strict=True):
        if not sample.beside:
            assert seconds(sample.parts, fit) == pytest.approx(np.exp(log_time), rel=1e-9)
            value = predict(sample.run, sample.quantity, fit).value
            assert value == pytest.approx(sample.amount / np.exp(log_time), rel=1e-9)


def test_slopes_are_the_derivatives() -> None:
    p = problem()
    x = np.full(len(p.names), 0.05)
    logs, share = p.times(x)
    slopes = p.slopes(share)
    for k in range(0, len(x), 17):
        moved = x.copy()
        moved[k] += 1e-6
        assert (p.times(moved)[0] - logs) / 1e-6 == pytest.approx(slopes[:, k], abs=1e-4)


def test_fitting_reduces_the_loss_and_stays_near_the_priors() -> None:
    p = problem()
    effects, inverse = p.solve()
    use = np.ones(len(p.samples))
    start = np.zeros(len(p.names))
    assert p.loss(p.times(effects)[0], effects, use) < p.loss(p.times(start)[0], start, use)
    assert np.abs(effects).max() < 1.5
    assert np.all(np.diag(inverse) > 0)


def test_a_held_out_sweep_does_not_see_its_own_figures() -> None:
    """Change what one sweep measured tenfold: its left-out prediction does not move."""
    runs = some_runs()
    target = "s35-m4max"
    changed = [
        dataclasses.replace(r, decode_tok_s=(r.decode_tok_s or 0) * 10 or None)
        if r.sweep == target
        else r
        for r in runs
    ]
    logs = []
    for records in (runs, changed):
        p = Problem(samples_of(records))
        out = leave_out(p, by_sweep, *p.solve())
        logs.append([v for s, v in zip(p.samples, out.log_time, strict=True) if s.sweep == target])
    assert logs[0] == pytest.approx(logs[1], abs=0.02)


def test_calibrate_makes_a_fit_with_errors_bands_and_runs() -> None:
    fit = calibrate(some_runs(), "2026-11")
    decode = fit.errors["decode_tok_s"]
    assert decode["fit"]["median"] <= decode["leave_sweep_out"]["median"]
    assert {"leave_device_out", "leave_model_out", "baseline", "by_device", "by_engine"} <= set(
        decode
    )
    held_in = [r.low <= r.measured <= r.high for r in fit.runs]
    assert sum(held_in) / len(held_in) > 0.8
    assert fit.data_hash and fit.as_of == "2026-11"


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(InputError, match="usable figures"):
        calibrate(some_runs()[:2])


def test_rows_that_may_not_enter_a_fit_do_not() -> None:
    ids = {s.id for s in samples_of(some_runs()) if not s.beside}
    assert ids <= {r.id for r in some_runs() if r.may_fit}


def test_aggregate_figures_are_shared_among_the_sequences() -> None:
    record = RunRecord("x", decode_tok_s=80.0, batch_concurrency=8, decode_scope="aggregate")
    assert per_user(record, "decode_tok_s") == 10
    assert per_user(dataclasses.replace(record, decode_scope="per_user"), "decode_tok_s") == 80


def test_baseline_is_bandwidth_and_150_microseconds_a_layer() -> None:
    record = next(r for r in some_runs() if r.id == "S001")
    found = baseline_tok_s(resolve(record), "decode_tok_s")
    weights = 6.785e9 / (0.8 * 546e9)
    assert found == pytest.approx(1 / (weights + 45 * 150e-6), rel=0.01)


def fit_with(errors: list[float], column: str = "held_out") -> Fit:
    """A fit of figures of 100 tok/s from as many sources, with those left-out errors."""
    runs = tuple(
        FittedRun(
            id=f"R{i}", quantity="decode_tok_s", config={}, measured=100.0, predicted=100.0,
            held_out=100.0, new_device=100.0, low=0.0, high=0.0, source=f"bench {i}",
        )
        for i in range(len(errors))
    )  # fmt: skip
    found = []
    for run, error in zip(runs, errors, strict=True):
        changed: dict[str, Any] = {column: 100 * (1 + error)}
        found.append(dataclasses.replace(run, **changed))
    return Fit(runs=tuple(found))


@pytest.mark.parametrize(
    ("column", "left_out"), [("held_out", "sweeps"), ("new_device", "devices")]
)
def test_a_fit_is_worse_where_the_same_figures_say_so_together(column: str, left_out: str) -> None:
    errors = [0.01 * (i % 30) for i in range(60)]
    old, new = fit_with(errors, column), fit_with([e + 0.02 for e in errors], column)
    assert f"leaving {left_out} out, the median error of decode_tok_s on the 60" in str(
        worse(new, old)
    )
    assert worse(old, new) is None
    assert worse(new, Fit()) is None


def test_a_change_that_goes_both_ways_is_noise() -> None:
    """The median may rise while as many figures fall: no reason to keep the old fit."""
    old = [0.01 * (i % 30) for i in range(60)]
    new = [abs(e + (0.012 if i % 2 else -0.01)) for i, e in enumerate(old)]
    assert np.median(new) > np.median(old)
    assert worse(fit_with(new), fit_with(old)) is None


def test_figures_that_were_measured_again_are_not_compared() -> None:
    old = fit_with([0.1] * 20)
    again = Fit(runs=tuple(dataclasses.replace(r, measured=150.0) for r in old.runs))
    assert worse(again, old) is None


def test_a_paired_change_is_surer_than_the_spread_of_the_errors() -> None:
    """Errors that spread widely, all 1 point larger: the interval is that point."""
    before = [i / 40 for i in range(40)]
    after = [e + 0.01 for e in before]
    change, low, high = change_of(before, after, [str(i) for i in range(40)], np.mean)
    assert (change, low, high) == pytest.approx((0.01, 0.01, 0.01))


def test_statistics() -> None:
    found = errors_of([1.1, 0.9, 2.0])
    assert (found["n"], found["worst"]) == (3, 1.0)
    assert found["median"] == pytest.approx(0.1)
    assert errors_of([]) == {"n": 0}


def test_the_shipped_fit_was_made_from_the_shipped_runs() -> None:
    from bench.calibrate import data_hash

    records, _ = read_runs(published_runs_path())
    assert load_fit().data_hash == data_hash(records)

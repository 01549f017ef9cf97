"""Fitting the cost model to measured runs, and measuring its honest error.

Residuals are logarithms of predicted over measured time under a robust loss (soft l1); every effect
is drawn towards 0 with the spread of its level (`hwmodel.fit.LEVEL_SPREAD`), so that a device class
is believed before a device and a device before a quant type on it.

Cross-validation refits without whole sweeps, without whole devices and without whole models; each
error is computed on rows that its refit never saw. The bands of the fit are widened until those of
the left-out sweeps hold `BAND_SHARE` of the measured figures.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.paired import change_of
from bench.problem import FITTED, Problem, Sample, samples_of
from bench.runs import RunRecord
from hwmodel.fit import Fit, FittedRun
from hwmodel.predict import config_columns, open_spread, predict, step_parts
from hwmodel.run import Quantity, RunConfig
from refimpl.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BAND_SHARE = 0.90
MIN_SAMPLES = 12


def baseline_tok_s(run: RunConfig, quantity: Quantity) -> float | None:
    """The yardstick without a fit: 0.8 of peak bandwidth plus 150 us per layer, decode only.

    Every byte of the always-read weights, of the experts that the batch touches and of the KV
    cache at 0.8 of the peak of all devices that work at once.
    """
    if quantity != "decode_tok_s":
        return None
    parts, amount = step_parts(run, quantity)
    read = sum(p.peak_s for p in parts if p.resource in ("memory bandwidth", "host memory", "disk"))
    return amount / (read / 0.8 + run.model.layers * 150e-6)


@dataclass(frozen=True)
class LeftOut:
    """What refits without each group say of that group's samples.

    `log_time` (R,) predicted, `variance` (R,) of the effects' part of it.
    """

    log_time: Array
    variance: Array


def leave_out(
    problem: Problem, key: Callable[[Sample], str], effects: Array, inverse: Array
) -> LeftOut:
    """Refit without each group in turn and predict the group with that refit."""
    import numpy as np

    groups = np.array([key(s) for s in problem.samples])
    log_time, variance = np.empty(len(groups)), np.empty(len(groups))
    for group in dict.fromkeys(groups):
        left = np.flatnonzero(groups == group)
        x, spread = problem.solve_without(left, effects, inverse)
        logs, share = problem.times(x)
        slope = problem.slopes_of(share, left)
        log_time[left] = logs[left]
        variance[left] = np.einsum("rk,kl,rl->r", slope, spread, slope)
    return LeftOut(log_time, variance)


def errors_of(ratio: Iterable[float]) -> dict[str, float]:
    """Median, 90th percentile and worst of |predicted / measured - 1|."""
    import numpy as np

    off = np.abs(np.array(list(ratio)) - 1)
    if not len(off):
        return {"n": 0}
    return {
        "n": len(off),
        "median": float(np.median(off)),
        "p90": float(np.quantile(off, 0.9)),
        "worst": float(off.max()),
    }


def data_hash(records: Sequence[RunRecord]) -> str:
    """SHA-256 of the rows as they entered the fit."""
    text = repr([sorted(r.row().items()) for r in records])
    return hashlib.sha256(text.encode()).hexdigest()


def by_sweep(sample: Sample) -> str:
    """The group of a sample when whole sweeps are left out."""
    return sample.sweep


def by_device(sample: Sample) -> str:
    """The group of a sample when whole devices are left out."""
    return sample.device


def by_model(sample: Sample) -> str:
    """The group of a sample when whole models are left out."""
    return sample.run.model.name


def calibrate(records: Sequence[RunRecord], as_of: str = "") -> Fit:
    """Fit the cost model to the rows that may enter a fit.

    Raises:
        InputError: too few such rows.
    """
    import dataclasses

    import numpy as np

    samples = samples_of(records)
    if len(samples) < MIN_SAMPLES:
        raise InputError(
            f"{len(samples)} usable figures, expected at least {MIN_SAMPLES} rows with fit_ok=yes"
        )
    problem = Problem(samples)
    effects, inverse = problem.solve()
    out = {
        name: leave_out(problem, key, effects, inverse)
        for name, key in (("sweep", by_sweep), ("device", by_device), ("model", by_model))
    }
    quantities = np.array([s.quantity if not s.beside else "speed-up" for s in samples])
    sigma = _residual_spread(problem, effects, quantities)
    fit = dataclasses.replace(
        problem.fit(effects, inverse, sigma), band=_bands(problem, out["sweep"], sigma)
    )
    runs = _fitted_runs(problem, fit, effects, out)
    return dataclasses.replace(
        fit,
        runs=runs,
        errors=_errors(problem, effects, out, runs),
        data_hash=data_hash(records),
        as_of=as_of,
    )


def _residual_spread(problem: Problem, effects: Array, quantities: Array) -> dict[str, float]:
    """Robust spread of the residuals of the fit by quantity (1.48 x median of their size)."""
    import numpy as np

    logs = problem.times(effects)[0] - problem.log_time
    return {
        str(q): max(0.03, float(1.4826 * np.median(np.abs(logs[quantities == q]))))
        for q in dict.fromkeys(quantities)
    }


def _bands(problem: Problem, out: LeftOut, sigma: Mapping[str, float]) -> dict[str, float]:
    """Multiple of the predicted spread that holds `BAND_SHARE` of the left-out figures."""
    import numpy as np

    quantities = np.array([s.quantity if not s.beside else "speed-up" for s in problem.samples])
    own = np.array([sigma[q] for q in quantities])
    extra = np.array([open_spread(s.run) for s in problem.samples])
    width = np.sqrt(out.variance + own**2 + extra**2)
    z = np.abs(out.log_time - problem.log_time) / width
    return {
        str(q): float(np.quantile(z[quantities == q], BAND_SHARE))
        for q in dict.fromkeys(quantities)
    }


def _fitted_runs(
    problem: Problem, fit: Fit, effects: Array, out: Mapping[str, LeftOut]
) -> tuple[FittedRun, ...]:
    import numpy as np

    now = np.exp(problem.times(effects)[0])
    found = []
    for i, s in enumerate(problem.samples):
        if s.beside:
            continue
        estimate = predict(s.run, s.quantity, fit)
        found.append(
            FittedRun(
                id=s.id,
                quantity=s.quantity,
                config=config_columns(s.run),
                measured=s.tok_s,
                predicted=s.amount / float(now[i]),
                held_out=s.amount / math.exp(out["sweep"].log_time[i]),
                new_device=s.amount / math.exp(out["device"].log_time[i]),
                low=estimate.low or 0.0,
                high=estimate.high or 0.0,
                source=s.source,
            )
        )
    return tuple(found)


def _errors(
    problem: Problem, effects: Array, out: Mapping[str, LeftOut], runs: Sequence[FittedRun]
) -> dict[str, Any]:
    """Cross-validation statistics by quantity, overall and by device and engine."""
    import numpy as np

    table: dict[str, Any] = {}
    configs = {(r.id, r.quantity): r.config for r in runs}
    ups = [i for i, s in enumerate(problem.samples) if s.beside]
    for q in FITTED:
        rows = [i for i, s in enumerate(problem.samples) if s.quantity == q and not s.beside]
        logs = {
            "fit": problem.times(effects)[0],
            **{f"leave_{k}_out": v.log_time for k, v in out.items()},
        }
        ratios = {k: np.exp(problem.log_time - v) for k, v in logs.items()}
        base = {
            i: (baseline_tok_s(problem.samples[i].run, q) or math.nan) / problem.samples[i].tok_s
            for i in rows
        }
        entry: dict[str, Any] = {k: errors_of(v[rows]) for k, v in ratios.items()}
        if q == "decode_tok_s":
            entry["baseline"] = errors_of(base.values())
        for label, column in (("by_device", "device"), ("by_engine", "engine")):
            groups: dict[str, list[int]] = defaultdict(list)
            for i in rows:
                sample = problem.samples[i]
                groups[str(configs[sample.id, sample.quantity][column])].append(i)
            entry[label] = {
                name: {
                    **{k: errors_of(v[picked]) for k, v in ratios.items() if k != "fit"},
                    **({"baseline": errors_of(base[i] for i in picked)}
                       if q == "decode_tok_s" else {}),
                }
                for name, picked in sorted(groups.items())
            }  # fmt: skip
        if q == "decode_tok_s" and ups:
            entry["speed_up_of_drafts"] = {k: errors_of(v[ups]) for k, v in ratios.items()}
        table[q] = entry
    return table


HELD_OUT = {"held_out": "sweeps", "new_device": "devices"}


def worse(new: Fit, old: Fit) -> str | None:
    """Why a new fit should not replace an old one, None where it may.

    Both are compared on the figures that both hold, each predicted without its sweep and without
    its device: the new one is refused where the median or the mean of its errors is larger and the
    interval of the paired change (`bench.paired`, over sources) excludes 0. A change within that
    interval is noise: which rows happen to stand in the middle.
    """
    import numpy as np

    theirs = {(r.id, r.quantity): r for r in old.runs}
    for q in FITTED:
        mine = [r for r in new.runs if r.quantity == q and _same(r, theirs.get((r.id, q)))]
        if not mine:
            continue
        groups = [r.source or r.id for r in mine]
        for column, left_out in HELD_OUT.items():
            before = [_off(theirs[r.id, q], column) for r in mine]
            after = [_off(r, column) for r in mine]
            for name, statistic in (("median", np.median), ("mean", np.mean)):
                change, low, high = change_of(before, after, groups, statistic)
                if low > 0:
                    return (
                        f"leaving {left_out} out, the {name} error of {q} on the {len(mine)} "
                        f"figures of both fits is {100 * change:+.1f} points larger "
                        f"({100 * low:+.1f} to {100 * high:+.1f})"
                    )
    return None


def _same(mine: FittedRun, theirs: FittedRun | None) -> bool:
    return theirs is not None and math.isclose(mine.measured, theirs.measured, rel_tol=1e-3)


def _off(run: FittedRun, column: str) -> float:
    """|predicted / measured - 1| without the run's sweep or device."""
    return abs(float(getattr(run, column)) / run.measured - 1)

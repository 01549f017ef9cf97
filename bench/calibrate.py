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

from bench.resolve import resolve
from bench.runs import RunRecord
from hwmodel.fit import Fit, FittedRun, prior_spread
from hwmodel.predict import config_columns, open_spread, predict, step_parts
from hwmodel.run import Quantity, RunConfig
from hwmodel.timing import Part
from refimpl.errors import InputError, RefimplError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Indices = NDArray[np.intp]

RATIO_ONLY = "mtp_ratio_only"
FITTED: tuple[Quantity, ...] = ("decode_tok_s", "prefill_tok_s")
RESIDUAL = 0.10  # scale of the robust loss, natural logarithm
BAND_SHARE = 0.90
MIN_SAMPLES = 12
MAX_STEPS = 25
CONVERGED = 1e-4  # predicted fall of the loss, relative, at which a refit stops


@dataclass(frozen=True)
class Sample:
    """One measured figure with the parts that predict it; `tok_s` is per user.

    A run with drafts is often published beside its sibling without, in conditions that are not
    stated: then `beside` holds the sibling's parts, and `tok_s` is the speed-up over it.
    """

    id: str
    quantity: Quantity
    run: RunConfig
    parts: tuple[Part, ...]
    amount: float
    tok_s: float
    sweep: str
    device: str
    source: str
    beside: tuple[Part, ...] = ()

    @property
    def seconds(self) -> float:
        """Measured time of the step that the parts describe (relative to `beside`, if any)."""
        return self.amount / self.tok_s


def samples_of(records: Sequence[RunRecord]) -> list[Sample]:
    """The figures of the rows that may enter a fit and can be predicted, and the speed-ups."""
    found = _speed_ups(records)
    for record in records:
        for quantity in FITTED:
            tok_s = per_user(record, quantity)
            if tok_s is None or not record.may_fit_quantity(quantity):
                continue
            try:
                run = resolve(record, quantity)
                parts, amount = step_parts(run, quantity)
            except RefimplError:
                continue
            device = run.devices[0].device.name
            found.append(
                Sample(
                    record.id,
                    quantity,
                    run,
                    tuple(parts),
                    amount,
                    tok_s,
                    record.sweep or record.id,
                    device,
                    record.source_url,
                )
            )
    return found


def _speed_ups(records: Sequence[RunRecord]) -> list[Sample]:
    """Rows that count as a ratio to the row of their sweep without drafts."""
    siblings = {r.sweep: r for r in records if r.sweep and r.drafts == 0 and r.decode_tok_s}
    found: list[Sample] = []
    for record in records:
        sibling = siblings.get(record.sweep)
        tok_s = per_user(record, "decode_tok_s")
        if record.fit_ok != RATIO_ONLY or not record.drafts or sibling is None or tok_s is None:
            continue
        base = per_user(sibling, "decode_tok_s")
        try:
            run, alone = resolve(record), resolve(sibling)
            parts, amount = step_parts(run, "decode_tok_s")
            beside, _ = step_parts(alone, "decode_tok_s")
        except RefimplError:
            continue
        if base and run.model.mtp_layers and run.workload.concurrency == alone.workload.concurrency:
            found.append(
                Sample(
                    record.id,
                    "decode_tok_s",
                    run,
                    tuple(parts),
                    amount,
                    tok_s / base,
                    record.sweep,
                    run.devices[0].device.name,
                    record.source_url,
                    tuple(beside),
                )
            )
    return found


def per_user(record: RunRecord, quantity: Quantity) -> float | None:
    """The measured figure of a row in tokens per second of one sequence."""
    value = record.prefill_tok_s if quantity == "prefill_tok_s" else record.decode_tok_s
    if value is None or value <= 0:
        return None
    if quantity == "decode_tok_s" and record.decode_scope == "aggregate":
        return value / max(1.0, record.batch_concurrency or 1.0)
    return value


class Problem:
    """The samples as arrays: R rows (samples), P parts, K effects.

    `base` (P,), `row` (P,) the sample of each part, `sign` (P,) -1 for the parts of a sibling,
    `single` (R,) False for speed-ups over one, `features` (P, K) sparse, `log_time` (R,)
    measured, `spread` (K,) of each effect before any run.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        import numpy as np
        from scipy import sparse

        self.samples = list(samples)
        names = sorted({n for s in samples for p in (*s.parts, *s.beside) for n, _ in p.features})
        index = {name: k for k, name in enumerate(names)}
        self.names = names
        base: list[float] = []
        row: list[int] = []
        at: list[int] = []
        effect: list[int] = []
        value: list[float] = []
        for r, s in enumerate(self.samples):
            for one, part in [(r, p) for p in s.parts] + [(r + len(samples), p) for p in s.beside]:
                for name, v in part.features:
                    at.append(len(base))
                    effect.append(index[name])
                    value.append(v)
                base.append(max(part.base_s, 1e-30))
                row.append(one)
        self.base = np.array(base)
        self.total = np.array(row)
        self.row = self.total % len(samples)
        self.sign = np.where(self.total < len(samples), 1.0, -1.0)
        self.single = np.array([not s.beside for s in self.samples])
        shape = (len(base), len(names))
        self.features = sparse.csr_matrix((value, (at, effect)), shape=shape)
        self.log_time = np.log([s.seconds for s in self.samples])
        self.spread = np.array([prior_spread(n) for n in names])

    def times(self, effects: Array) -> tuple[Array, Array]:
        """Logarithm of the predicted times (R,), and each part's share of its time (P,).

        The shares of a sibling's parts are negative: its time divides.
        """
        import numpy as np

        times = self.base * np.exp(self.features @ effects)
        n = len(self.samples)
        total = np.bincount(self.total, times, minlength=2 * n)
        beside = np.where(self.single, 1.0, total[n:])
        log_time: Array = np.log(total[:n] / beside)
        share: Array = self.sign * times / total[self.total]
        return log_time, share

    def slopes(self, share: Array) -> Array:
        """Derivative of the logarithms by the effects (R, K)."""
        import numpy as np
        from scipy import sparse

        shape = (len(self.samples), len(share))
        by_row = sparse.csr_matrix((share, (self.row, np.arange(len(share)))), shape=shape)
        return np.asarray((by_row @ self.features).toarray())

    def loss(self, log_time: Array, effects: Array, use: Array) -> float:
        """Soft l1 of the runs marked in `use` (R,) plus the squares of the priors."""
        import numpy as np

        z = ((log_time - self.log_time) / RESIDUAL) ** 2
        return float(use @ (2 * (np.sqrt(1 + z) - 1)) + np.sum((effects / self.spread) ** 2))

    def pull(self, log_time: Array, use: Array) -> tuple[Array, Array]:
        """Weights (R,) of the linearised loss, and weight times residual (R,)."""
        import numpy as np

        residual = log_time - self.log_time
        z = (residual / RESIDUAL) ** 2
        weight = use / RESIDUAL**2 / np.sqrt(1 + z)
        return weight, weight * residual

    def solve(self) -> tuple[Array, Array]:
        """The effects (K,) that fit all samples best, and the inverse Hessian (K, K) there.

        Gauss-Newton on the robust loss with the priors as ridge, steps halved until it falls.
        """
        import numpy as np
        from scipy.linalg import cho_factor, cho_solve

        use = np.ones(len(self.samples))
        x = np.zeros(len(self.names))
        ridge = self.spread**-2.0
        logs, share = self.times(x)
        value = self.loss(logs, x, use)
        for _ in range(MAX_STEPS):
            slope = self.slopes(share)
            weight, pull = self.pull(logs, use)
            factor = cho_factor(slope.T @ (weight[:, None] * slope) + np.diag(ridge))
            step = cho_solve(factor, slope.T @ pull + ridge * x)
            x, logs, share, now = self._walk(x, step, value, use)
            if value - now < 1e-5 * value:
                break
            value = now
        slope = self.slopes(share)
        weight, _ = self.pull(logs, use)
        inverse = np.linalg.inv(slope.T @ (weight[:, None] * slope) + np.diag(ridge))
        return x, np.asarray(inverse, dtype=np.float64)

    def _walk(
        self, x: Array, step: Array, value: float, use: Array
    ) -> tuple[Array, Array, Array, float]:
        """One step, halved until the loss does not rise."""
        size = 1.0
        while True:
            candidate = x - size * step
            logs, share = self.times(candidate)
            now = self.loss(logs, candidate, use)
            if now <= value or size < 1e-4:
                return candidate, logs, share, now
            size /= 2

    def solve_without(self, left: Indices, start: Array, inverse: Array) -> tuple[Array, Array]:
        """The effects (K,) fitted without the samples at `left` (n,), and its inverse Hessian.

        Starts at the full solution and iterates to the optimum of the reduced loss, with the
        inverse Hessian of the full problem downdated by the rows left out (Woodbury).
        """
        import numpy as np

        use = np.ones(len(self.samples))
        logs, share = self.times(start)
        weight, _ = self.pull(logs, use)
        rows = self.slopes_of(share, left)  # (n, K)
        half = inverse @ rows.T  # (K, n)
        inner = np.diag(1 / np.maximum(weight[left], 1e-12)) - rows @ half
        inverse = inverse + half @ np.linalg.solve(inner, half.T)
        use[left] = 0.0
        x, value = start, self.loss(logs, start, use)
        for _ in range(MAX_STEPS):
            _, pull = self.pull(logs, use)
            gradient = self.features.T @ (share * pull[self.row]) + x / self.spread**2
            step = inverse @ gradient
            if float(gradient @ step) < CONVERGED * value:
                break
            x, logs, share, value = self._walk(x, step, value, use)
        return x, inverse

    def slopes_of(self, share: Array, rows: Indices) -> Array:
        """`slopes` for some rows only (n, K)."""
        import numpy as np
        from scipy import sparse

        wanted = np.flatnonzero(np.isin(self.row, rows))
        place = {int(r): i for i, r in enumerate(rows)}
        at = np.array([place[int(r)] for r in self.row[wanted]])
        shape = (len(rows), len(wanted))
        by_row = sparse.csr_matrix((share[wanted], (at, np.arange(len(wanted)))), shape=shape)
        return np.asarray((by_row @ self.features[wanted]).toarray())

    def fit(self, effects: Array, covariance: Array, sigma: Mapping[str, float]) -> Fit:
        """The effects as a `Fit`, without those that the samples say nothing about."""
        return Fit(
            effects={n: float(v) for n, v in zip(self.names, effects, strict=True)},
            covariance=tuple(
                tuple(float(v) for v in row[: i + 1]) for i, row in enumerate(covariance)
            ),
            sigma=dict(sigma),
        )


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


def worse(new: Fit, old: Fit) -> str | None:
    """Why a new fit should not replace an old one: its left-out median error is larger."""
    for q in FITTED:
        mine = new.errors.get(q, {}).get("leave_sweep_out", {}).get("median")
        theirs = old.errors.get(q, {}).get("leave_sweep_out", {}).get("median")
        if mine is not None and theirs is not None and mine > theirs * 1.02 + 1e-4:
            return (
                f"leaving sweeps out, the new fit's median error of {q} is {100 * mine:.1f} %, "
                f"the present one's {100 * theirs:.1f} %"
            )
    return None

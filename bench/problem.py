"""The measured figures as arrays, and the solver of the fit.

A sample is one measured figure with the parts that predict it; a problem is all of them as arrays,
with the robust loss (soft l1 on logarithms), the priors as ridge, and Gauss-Newton. Refits without
some samples start at the full solution with its inverse Hessian, downdated by the rows left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.resolve import resolve
from bench.runs import RunRecord
from hwmodel.fit import Fit, prior_spread
from hwmodel.parts import Part
from hwmodel.predict import step_parts
from hwmodel.run import Quantity, RunConfig
from refimpl.errors import RefimplError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Indices = NDArray[np.intp]

RATIO_ONLY = "mtp_ratio_only"
FITTED: tuple[Quantity, ...] = ("decode_tok_s", "prefill_tok_s")
# Scale of the robust loss, natural logarithm. Nested cross-validation takes 0.03 to 0.07 where
# sweeps are left out and 0.10 or more where whole sources are; errors differ by a few per cent.
RESIDUAL = 0.08
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

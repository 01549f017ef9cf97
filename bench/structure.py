"""Does the structure of a neighbour predict its speed better than its totals?

Every figure of a model other than Step is predicted twice, with efficiencies refitted each time:
described by its structure (`hwmodel.catalogue`), and by nothing but the total and active parameters
that its model card states (`hwmodel.model.shape_from_totals`). Rows, folds and procedure are the
same: whole sweeps, devices and models are left out in turn as `bench.calibrate` does.

The interval of a difference comes from the paired bootstrap of `bench.paired`, over sweeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.calibrate import by_device, by_model, by_sweep, leave_out
from bench.paired import INTERVAL, change_of
from bench.problem import FITTED, Problem, Sample, samples_of
from bench.runs import RunRecord
from hwmodel.model import ModelShape, shape_from_totals
from hwmodel.predict import step_parts
from refimpl.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ARMS = ("structure", "totals")
LEFT_OUT: dict[str, Callable[[Sample], str]] = {
    "sweep": by_sweep, "device": by_device, "model": by_model,
}  # fmt: skip
MIN_SWEEPS = 4
DEEP = 16384  # tokens in the cache from which a row counts as deep


@dataclass(frozen=True)
class Pair:
    """One figure of a neighbour under both descriptions.

    `errors` is |predicted / measured - 1| by what was left out and by arm.
    """

    id: str
    quantity: str
    model: str
    family: str
    kind: str
    depth: int
    sweep: str
    errors: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Difference:
    """Errors of both arms over one group of figures, and structure minus totals with interval."""

    n: int
    sweeps: int
    median: tuple[float, float]
    mean: tuple[float, float]
    p90: tuple[float, float]
    mean_change: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `open`: whether the interval of the mean's change excludes 0;
        `few` where so few sweeps are no sample of anything."""
        _, low, high = self.mean_change
        if self.sweeps < MIN_SWEEPS:
            return "few"
        return "better" if high < 0 else "worse" if low > 0 else "open"


def family_of(name: str) -> str:
    """The family of a model: `qwen3.5` of `qwen3.5-35b-a3b`, `llama` of `llama-3-8b`."""
    parts = name.split("-")
    return "-".join(parts[:2]) if parts[0] in ("gpt", "deepseek") and len(parts) > 1 else parts[0]


def kind_of(shape: ModelShape) -> str:
    """What a structure says that totals do not, in words."""
    found = ["experts" if shape.experts else "dense"]
    if "mla" in shape.kinds:
        found.append("latent attention")
    if any(g.selected or g.compress > 1 for g in shape.attention):
        found.append("sparse attention")
    if "linear" in shape.kinds:
        found.append("linear layers")
    if any(g.window and not g.selected for g in shape.attention):
        found.append("sliding windows")
    return ", ".join(found)


def is_neighbour(sample: Sample) -> bool:
    """A model other than Step whose structure is known."""
    return sample.run.model.certain and not sample.run.model.is_step


def compare_structure(records: Sequence[RunRecord]) -> list[Pair]:
    """Held-out errors of every neighbour's figures under both descriptions.

    Raises:
        InputError: no such figures.
    """
    samples = samples_of(records)
    stated = {r.id: (r.total_params_b, r.active_params_b) for r in records}
    rows = [i for i, s in enumerate(samples) if is_neighbour(s) and not s.beside]
    if not rows:
        raise InputError("no usable figure of a model other than Step whose structure is known")
    arms = {
        "structure": samples,
        "totals": [_by_totals(s, *stated[s.id]) if is_neighbour(s) else s for s in samples],
    }
    errors = {arm: _held_out(found) for arm, found in arms.items()}
    return [
        Pair(
            id=s.id,
            quantity=s.quantity,
            model=s.run.model.name,
            family=family_of(s.run.model.name),
            kind=kind_of(s.run.model),
            depth=s.run.workload.depth or 0,
            sweep=s.sweep,
            errors={k: {arm: float(errors[arm][k][i]) for arm in ARMS} for k in LEFT_OUT},
        )
        for i, s in ((i, samples[i]) for i in rows)
    ]


def _by_totals(sample: Sample, total_b: float | None, active_b: float | None) -> Sample:
    """The same figure, its model known by the parameters that its card states."""
    shape = sample.run.model
    total = 1e9 * total_b if total_b else float(shape.parameters)
    active = 1e9 * active_b if active_b else float(shape.active_parameters)
    guess = shape_from_totals(shape.name, total, min(total, active))
    run = dataclasses.replace(sample.run, model=guess)
    parts, amount = step_parts(run, sample.quantity)
    return dataclasses.replace(sample, run=run, parts=tuple(parts), amount=amount)


def _held_out(samples: Sequence[Sample]) -> dict[str, Array]:
    """|predicted / measured - 1| (R,) of refits without each sweep, device and model."""
    import numpy as np

    problem = Problem(samples)
    effects, inverse = problem.solve()
    return {
        name: np.abs(
            np.exp(problem.log_time - leave_out(problem, key, effects, inverse).log_time) - 1
        )
        for name, key in LEFT_OUT.items()
    }


def difference(pairs: Sequence[Pair], left_out: str) -> Difference:
    """Both arms over a group, with the paired bootstrap of their difference over sweeps."""
    import numpy as np

    both = np.array([[p.errors[left_out][arm] for arm in ARMS] for p in pairs])  # (N, 2)
    sweeps = [p.sweep for p in pairs]
    median, mean = np.median(both, axis=0), np.mean(both, axis=0)
    p90 = np.quantile(both, 0.9, axis=0)
    return Difference(
        n=len(pairs),
        sweeps=len(set(sweeps)),
        median=(float(median[0]), float(median[1])),
        mean=(float(mean[0]), float(mean[1])),
        p90=(float(p90[0]), float(p90[1])),
        mean_change=change_of(both[:, 1], both[:, 0], sweeps, np.mean),
    )


def groups_of(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The figures of one quantity: all, deep ones, by kind of structure and by family."""
    found = {"all": list(pairs), f"{DEEP:,} tokens deep or more": [
        p for p in pairs if p.depth >= DEEP
    ]}  # fmt: skip
    for column in ("kind", "family"):
        for name in sorted({getattr(p, column) for p in pairs}):
            found[name] = [p for p in pairs if getattr(p, column) == name]
    return {name: group for name, group in found.items() if group}


def structure_json(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Differences by quantity, what was left out and group, and the figures themselves."""
    table = {
        q: {
            out: {
                name: {**dataclasses.asdict(d), "verdict": d.verdict}
                for name, group in groups_of([p for p in pairs if p.quantity == q]).items()
                for d in (difference(group, out),)
            }
            for out in LEFT_OUT
        }
        for q in FITTED
        if any(p.quantity == q for p in pairs)
    }
    return {"arms": list(ARMS), "interval": INTERVAL, "groups": table,
            "figures": [dataclasses.asdict(p) for p in pairs]}  # fmt: skip

"""Predictions for this host: the cost model, its efficiencies fitted to the probe points alone.

The structure (bytes and operations of a step, by part) and the starting point of every effect are
those of the shipped fit; what a new device, engine or type may change is fitted to the probe points
of that engine (`WIDE`). Slices stream their weights from memory; the embedded model stays in the
last cache, so the same host is a second device, `local-cache`, whose bandwidth is that cache's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.loop_points import ENGINES, Point, model_file
from bench.problem import Problem, Sample
from hwmodel.fit import Fit, level_of, load_fit, part_seconds, prior_spread
from hwmodel.predict import config_columns, predict, step_parts
from hwmodel.probed import merged
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, RunConfig, Workload

if TYPE_CHECKING:
    from hwmodel.devices import Device

# Standard deviation (natural logarithm) of what no published run says of this host and engine.
WIDE = {
    "device": 1.5, "class+group": 1.0, "family": 1.0, "engine": 1.0, "quant": 0.4,
    "class+quant": 0.4,
}  # fmt: skip
RESIDUAL = 0.05  # of a probe point, beside what the effects leave open


def cache_device(device: Device, bytes_per_s: float, source: str, as_of: str) -> Device:
    """The host with the bandwidth of its last cache, as `hwmodel.probed.cache_device`."""
    from hwmodel import probed
    from hwmodel.quantity import Quantity

    return probed.cache_device(device, Quantity(bytes_per_s, source, as_of))


class Host:
    """This host as the cost model sees it, and the configurations of points on it.

    Args:
        device: the probe's device file.
        cache: see `cache_device`.
        folder: where the models lie.
    """

    def __init__(self, device: Device, cache: Device, folder: Path) -> None:
        self.device, self.cache, self.folder = device, cache, folder
        self._weights: dict[str, Any] = {}

    def run(self, point: Point) -> RunConfig:
        """The configuration of a point.

        Raises:
            CheckpointError: its model is not there, or is damaged.
        """
        from hwmodel.engines import load_engine
        from hwmodel.weights_file import read_weights

        if point.model not in self._weights:
            self._weights[point.model] = read_weights(model_file(point.model, self.folder))
        model, quant = self._weights[point.model]
        work = Workload(
            prompt_tokens=point.prompt, depth=point.depth, generated_tokens=point.generated,
            drafts=point.drafts, acceptance=acceptance(point.drafts),
        )  # fmt: skip
        device = self.cache if point.is_embedded else self.device
        engine = load_engine(point.engine)
        choice = EngineChoice(engine, "cpu", engine.version, engine.date)
        name = model_file(point.model, self.folder).name
        quant = dataclasses.replace(quant, name=name, default=load_quant(point.type).default)
        return RunConfig(model, quant, (DeviceCount(device),), choice, workload=work)


def acceptance(drafts: int) -> tuple[float, ...] | None:
    """The simulated acceptance of so many drafts."""
    from bench.engine_cases import ACCEPTANCE

    return ACCEPTANCE[:drafts] or None


def fit_host(host: Host, measured: Mapping[str, float], points: Sequence[Point]) -> dict[str, Fit]:
    """One fit for each engine, to its probe points; `measured` tokens/s by the point's id.

    Raises:
        InputError: a point cannot be described to the cost model.
    """
    shipped = load_fit()
    found = {}
    for engine in ENGINES:
        mine = [p for p in points if p.probe and p.engine == engine and p.id in measured]
        if mine:
            found[engine] = _fit([sample_of(host, p, measured[p.id]) for p in mine], shipped)
    return found


def sample_of(host: Host, point: Point, tok_s: float) -> Sample:
    """A measured point with the parts that predict it.

    Raises:
        InputError: it cannot be described to the cost model.
    """
    run = host.run(point)
    parts, amount = step_parts(run, point.quantity)
    device = run.devices[0].device.name
    return Sample(
        point.id, point.quantity, run, tuple(parts), amount, tok_s, point.id, device, "this host"
    )


def _fit(samples: Sequence[Sample], shipped: Fit) -> Fit:
    """The shipped effects, moved as far as the samples ask for."""
    return merged(moved(samples, shipped), shipped)


def moved(samples: Sequence[Sample], shipped: Fit) -> Fit:
    """Of the shipped effects those that the samples speak of, moved as far as they ask for."""
    import numpy as np

    problem = Problem([_from_shipped(s, shipped) for s in samples])
    problem.spread = np.array([_spread(name) for name in problem.names])
    moves, inverse = problem.solve()
    both = zip(problem.names, map(float, moves), strict=True)
    return Fit(
        effects={n: shipped.effect(n) + move for n, move in both},
        covariance=tuple(tuple(map(float, row[: i + 1])) for i, row in enumerate(inverse)),
        sigma={"decode_tok_s": RESIDUAL, "prefill_tok_s": RESIDUAL},
        band=shipped.band,
        as_of=shipped.as_of,
    )


def _from_shipped(sample: Sample, shipped: Fit) -> Sample:
    moved = tuple(dataclasses.replace(p, base_s=part_seconds(p, shipped)) for p in sample.parts)
    return dataclasses.replace(sample, parts=moved)


def _spread(name: str) -> float:
    return max(prior_spread(name), WIDE.get(level_of(name), 0.0))


def predictions(
    host: Host, fits: Mapping[str, Fit], points: Sequence[Point], measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a point: what the model says, whether the probe saw it, what the probe measured."""
    rows = []
    for p in points:
        if p.engine not in fits:
            continue
        run = host.run(p)
        estimate = predict(run, p.quantity, fits[p.engine])
        columns = config_columns(run)
        rows.append({
            "id": p.id, "probe": p.probe, "engine": p.engine, "model": p.model,
            "quantity": p.quantity, "device": columns["device"], "prompt": p.prompt,
            "depth": p.depth, "drafts": p.drafts, "predicted": estimate.value,
            "low": estimate.low, "high": estimate.high, "limiting": estimate.limiting,
            "probe_measured": measured.get(p.id) if p.probe else None,
            "terms_s": {t.name: t.seconds for t in estimate.terms},
        })  # fmt: skip
    return rows

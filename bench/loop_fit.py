"""Efficiencies of a probed host, from all of its loop's points, for `hwmodel plan --device local`.

The loop itself predicts from its probe points alone. Once it is compared, all that was measured
says more: the effects of each engine are fitted anew, and their honest error comes from refits that
never saw the file (type of weights, model) that a point belongs to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.calibrate import BAND_SHARE, errors_of
from bench.interleave import Round
from bench.loop_points import ENGINES, Point, points
from bench.loop_predict import moved, sample_of
from bench.loop_run import COMPARISON, Measured, host_of, measured, read
from hwmodel.errors import RunFileError
from hwmodel.fit import Fit, FittedRun, load_fit, seconds, spread
from hwmodel.predict import config_columns, predict
from hwmodel.probed import as_file, merged
from hwmodel.run import Quantity

if TYPE_CHECKING:
    from bench.problem import Sample

_LEAST_SIGMA = 0.03  # repetitions on a quiet host differ by as much
_QUANTITIES: tuple[Quantity, ...] = ("decode_tok_s", "prefill_tok_s")


def fit_loop(folder: Path, models: Path, rounds: Sequence[Round]) -> dict[str, Any]:
    """The JSON of the host's efficiencies.

    Raises:
        RunFileError: the loop is not compared yet.
        InputError: a model is missing or damaged.
    """
    host, probe = host_of(folder, models)
    compared = read(folder / COMPARISON, "bench loop compare")
    speeds = _speeds(compared, rounds)
    fits = {}
    for engine in ENGINES:
        mine = [p for p in points() if p.engine == engine and p.id in speeds]
        if mine:
            samples = [sample_of(host, p, speeds[p.id].tok_s) for p in mine]
            fits[engine] = fit_engine(mine, samples)
    if not fits:
        raise RunFileError(f"{folder}: no point of the loop is measured: bench loop measure")
    return as_file(fits, f"{probe['host']} ({probe['as_of']})", str(probe["as_of"]))


def _speeds(compared: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Measured]:
    """What the comparison holds of each point; rounds measured since then are in it too."""
    try:
        rows = [r for r in compared["rows"] if r["measured"]]
        told = {str(r["id"]): Measured(float(r["measured"]), r["basis"], r["rounds"]) for r in rows}
        seen = {str(r["id"]): told[str(r["id"])] for r in rows if r["probe"]}
    except (KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{COMPARISON}: not written by bench loop compare ({error!r})") from None
    outside = [p for p in points() if p.id not in seen]
    return {**told, **measured(rounds, outside, seen)}


def fit_engine(mine: Sequence[Point], samples: Sequence[Sample]) -> Fit:
    """One engine's effects with errors and bands from refits without the point's file."""
    shipped = load_fit()
    fit = moved(samples, shipped)
    fit = dataclasses.replace(fit, sigma=_sigma(samples, merged(fit, shipped)))
    held: dict[str, tuple[float, float]] = {}  # predicted tokens/s, spread of its logarithm
    for model in dict.fromkeys(p.model for p in mine):
        others = [s for p, s in zip(mine, samples, strict=True) if p.model != model]
        if not others:
            continue
        without = merged(dataclasses.replace(moved(others, shipped), sigma=fit.sigma), shipped)
        for p, s in zip(mine, samples, strict=True):
            if p.model == model:
                value = s.amount / seconds(s.parts, without)
                held[p.id] = value, spread(s.parts, without, s.quantity)
    fit = dataclasses.replace(fit, band=_bands(samples, held))
    return dataclasses.replace(
        fit,
        errors=_errors(samples, fit, held),
        runs=tuple(_run(s, merged(fit, shipped), held) for s in samples),
    )


def _sigma(samples: Sequence[Sample], fit: Fit) -> dict[str, float]:
    """Robust spread of what the fit leaves, by quantity."""
    found: dict[str, float] = {}
    for q in _QUANTITIES:
        off = [abs(math.log(seconds(s.parts, fit) / s.seconds)) for s in samples if s.quantity == q]
        found[q] = max(_LEAST_SIGMA, median(off) / 0.6745) if off else 2 * _LEAST_SIGMA
    return found


def _bands(
    samples: Sequence[Sample], held: Mapping[str, tuple[float, float]]
) -> dict[str, float]:  # fmt: skip
    """Multiples of the spread that hold the stated share of the points left out."""
    import numpy as np

    found: dict[str, float] = {}
    for q in _QUANTITIES:
        off = [
            abs(math.log(held[s.id][0] / s.tok_s)) / held[s.id][1]
            for s in samples
            if s.quantity == q and s.id in held
        ]
        found[q] = max(1.0, float(np.quantile(off, BAND_SHARE))) if off else 2.0
    return found


def _errors(
    samples: Sequence[Sample], fit: Fit, held: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """As in the published fit: in the fit, without the point's file, and with the published fit
    alone, for which a measured speed is a datasheet's."""
    shipped = load_fit()
    own = merged(fit, shipped)
    found: dict[str, Any] = {}
    for q in _QUANTITIES:
        mine = [s for s in samples if s.quantity == q]
        found[q] = {
            "fit": errors_of(s.amount / seconds(s.parts, own) / s.tok_s for s in mine),
            "leave_sweep_out": errors_of(held[s.id][0] / s.tok_s for s in mine if s.id in held),
            "published": errors_of(s.amount / seconds(s.parts, shipped) / s.tok_s for s in mine),
        }
    return found


def _run(sample: Sample, fit: Fit, held: Mapping[str, tuple[float, float]]) -> FittedRun:
    said = predict(sample.run, sample.quantity, fit)
    alone = sample.amount / seconds(sample.parts, load_fit())
    value = sample.amount / seconds(sample.parts, fit)
    return FittedRun(
        id=sample.id, quantity=sample.quantity, config=config_columns(sample.run),
        measured=sample.tok_s, predicted=value, held_out=held.get(sample.id, (value, 0.0))[0],
        new_device=alone, low=said.low or value, high=said.high or value, source="bench loop",
    )  # fmt: skip

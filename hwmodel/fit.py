"""The fit file: fitted effects with their covariance, errors, and the runs they came from.

Written by `bench calibrate`, shipped as `hwmodel/fits/published.json`. `seconds` and `spread` are
the one place where parts and effects become a time and its uncertainty: prediction calls them with
one run, the fit with all runs at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hwmodel.parts import Part
from hwmodel.run import NearestRun
from refimpl.errors import InputError

SCHEMA = 1
MAX_FIT_BYTES = 8 << 20
# Standard deviation of an effect before any run is seen, by level (natural logarithm).
LEVEL_SPREAD: dict[str, float] = {
    "all": 0.15, "class": 0.15, "group": 0.15, "family": 0.10, "class+group": 0.12,
    "engine": 0.08, "device": 0.08, "quant": 0.12, "class+quant": 0.08, "age": 0.05,
    "early": 0.20, "depth": 0.20, "type": 0.08, "width": 0.20, "parallel": 0.20, "kind": 0.25,
    "tokens": 0.10, "speed": 0.10, "dies": 0.25,
}  # fmt: skip


# Parts whose prior is rough: their spreads are this many times those of their levels.
PART_SPREAD = {"verify": 4.0, "drafts": 2.0, "draft overhead": 2.0, "sequence": 2.0, "rows": 2.0}


def level_of(effect: str) -> str:
    """`weights/class=apple` -> `class`."""
    return effect.partition("/")[2].partition("=")[0]


def prior_spread(effect: str) -> float:
    """Standard deviation of an effect before any run is seen."""
    part = effect.partition("/")[0]
    return LEVEL_SPREAD.get(level_of(effect), 0.1) * PART_SPREAD.get(part, 1.0)


@dataclass(frozen=True)
class FittedRun:
    """One measured figure that the fit was made on.

    `predicted` comes from the fit itself, `held_out` from a refit that never saw its sweep,
    `new_device` from one that never saw its device.
    """

    id: str
    quantity: str
    config: Mapping[str, Any]
    measured: float
    predicted: float
    held_out: float
    new_device: float
    low: float
    high: float
    source: str = ""


@dataclass(frozen=True)
class Fit:
    """Effects and how sure they are.

    Attributes:
        effects: fitted value by effect name; an effect that is not listed is 0.
        covariance: of the listed effects, in their order (lower triangle; in the file each row is
            one text of numbers).
        sigma: residual spread (natural logarithm) by quantity.
        band: multiple of the standard deviation that makes the band, by quantity, set so that
            the bands of held-out runs hold the stated share of them.
        errors: cross-validation statistics as `bench calibrate` printed them.
        runs: the measured figures behind it.
        borrowed: why it is not this device's own, where efficiencies are of another one
            (`hwmodel.probed`); empty for published runs.
    """

    effects: Mapping[str, float] = field(default_factory=dict)
    covariance: tuple[tuple[float, ...], ...] = ()
    sigma: Mapping[str, float] = field(default_factory=dict)
    band: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[FittedRun, ...] = ()
    data_hash: str = ""
    as_of: str = ""
    borrowed: str = ""

    def effect(self, name: str) -> float:
        """Fitted value, 0 for an effect the runs say nothing about."""
        return self.effects.get(name, 0.0)


def part_seconds(part: Part, fit: Fit) -> float:
    """Seconds of one part under a fit."""
    return part.base_s * math.exp(sum(v * fit.effect(name) for name, v in part.features))


def seconds(parts: Sequence[Part], fit: Fit) -> float:
    """Seconds of a step: the sum of its parts."""
    return sum(part_seconds(p, fit) for p in parts)


def gradient(parts: Sequence[Part], fit: Fit) -> dict[str, float]:
    """Derivative of the logarithm of the time by each effect."""
    times = [part_seconds(p, fit) for p in parts]
    total = sum(times)
    found: dict[str, float] = {}
    for part, t in zip(parts, times, strict=True):
        for name, value in part.features:
            found[name] = found.get(name, 0.0) + value * t / total
    return found


@lru_cache(maxsize=8)
def _index(names: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def spread(parts: Sequence[Part], fit: Fit, quantity: str) -> float:
    """Standard deviation of the logarithm of the time: residual, effects, and what is unseen."""
    slope = gradient(parts, fit)
    index = _index(tuple(fit.effects))
    variance = fit.sigma.get(quantity, 0.15) ** 2
    known = [(index[name], g) for name, g in slope.items() if name in index]
    for i, g in known:
        for j, h in known:
            row, column = (i, j) if i >= j else (j, i)
            variance += g * h * fit.covariance[row][column]
    for name, g in slope.items():
        if name not in index:
            variance += (g * prior_spread(name)) ** 2
    return math.sqrt(max(variance, fit.sigma.get(quantity, 0.15) ** 2))


def unseen(parts: Sequence[Part], fit: Fit, level: str) -> list[str]:
    """Effects of a level that the run needs and the fit does not have."""
    names = {name for p in parts for name, _ in p.features if level_of(name) == level}
    return sorted(n for n in names if n not in fit.effects)


def published_path() -> Path:
    """The fit that ships with the project."""
    return Path(__file__).parent / "fits" / "published.json"


@lru_cache(maxsize=4)
def load_fit(path: Path | None = None) -> Fit:
    """A fit file; without a path the shipped one, or no fit (priors alone) where that is absent.

    Raises:
        InputError: the file is missing, too large, not JSON, or not a fit of this schema.
    """
    if path is None:
        shipped = published_path()
        return load_fit(shipped) if shipped.is_file() else Fit()
    return from_json(read_json(path, "bench calibrate"), str(path))


def read_json(path: Path, made_by: str) -> Any:
    """The JSON of a file of efficiencies, whatever it holds.

    Raises:
        InputError: the file is missing, too large or not JSON; the message names what makes one.
    """
    try:
        if path.stat().st_size > MAX_FIT_BYTES:
            raise InputError(f"{path}: too large for a fit file ({MAX_FIT_BYTES} bytes at most)")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON fit file ({error}); run {made_by}") from None


# What a file of another form leads to when it is read as a fit.
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def from_json(data: Any, name: str = "fit") -> Fit:
    """Build a fit from parsed JSON.

    Raises:
        InputError: a key is missing or of the wrong form; the message names it.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{name}: expected a fit file with schema {SCHEMA}; run bench calibrate")
    try:
        effects = {str(k): float(v) for k, v in data["effects"].items()}
        covariance = tuple(tuple(map(float, row.split())) for row in data["covariance"])
        runs = tuple(_run(r) for r in data.get("runs", ()))
        fit = Fit(
            effects=effects,
            covariance=covariance,
            sigma={str(k): float(v) for k, v in data["sigma"].items()},
            band={str(k): float(v) for k, v in data["band"].items()},
            errors={str(q): _statistics(e) for q, e in data.get("errors", {}).items()},
            runs=runs,
            data_hash=str(data.get("data_hash", "")),
            as_of=str(data.get("as_of", "")),
        )
    except _DAMAGED as error:
        raise InputError(f"{name}: not a valid fit file ({error!r}); run bench calibrate") from None
    shape_ok = len(covariance) == len(effects)
    shape_ok = shape_ok and all(len(row) == i + 1 for i, row in enumerate(covariance))
    finite = all(map(math.isfinite, (*effects.values(), *fit.sigma.values(), *fit.band.values())))
    finite = finite and all(math.isfinite(v) for row in covariance for v in row)
    if not shape_ok or not finite:
        raise InputError(
            f"{name}: effects, covariance and spreads of the fit do not belong together"
        )
    return fit


def _run(data: Mapping[str, Any]) -> FittedRun:
    """A run of a fit file; what is computed with must be numbers, and a speed above 0."""
    run = FittedRun(**data)
    counts = [float(run.config.get(k) or 0) for k in ("devices", *_UNLIKE_NUMBERS)]
    speeds = [0.0 + getattr(run, k) for k in _SPEEDS]
    if not all(map(math.isfinite, counts)) or not all(0 <= v < math.inf for v in speeds):
        raise ValueError(f"run {run.id!r:.40}: a number is negative or not finite")
    if not (run.measured > 0 and run.held_out > 0):
        raise ValueError(f"run {run.id!r:.40}: a speed is 0")
    return run


def _statistics(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Errors of one quantity: statistics by what was left out, or by group and that."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in data.items():
        if any(isinstance(v, dict) for v in entry.values()):
            found[name] = _statistics(entry)
            continue
        found[name] = values = {str(k): 0.0 + v for k, v in entry.items()}
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"errors {name!r:.40}: a number is not finite")
        if values.get("n"):
            found[name] = {**values, "n": int(values["n"]), **{k: values[k] for k in _SHOWN}}
    return found


_SHOWN = ("median", "p90")  # what a plan says of errors


def to_json(fit: Fit) -> dict[str, Any]:
    """The JSON form of a fit, numbers rounded to what the runs support."""
    return {
        "schema": SCHEMA,
        "as_of": fit.as_of,
        "data_hash": fit.data_hash,
        "errors": fit.errors,
        "sigma": {k: round(v, 6) for k, v in fit.sigma.items()},
        "band": {k: round(v, 6) for k, v in fit.band.items()},
        "effects": {k: round(v, 6) for k, v in fit.effects.items()},
        "covariance": [" ".join(_short(v) for v in row) for row in fit.covariance],
        "runs": [
            {**r.__dict__, "config": dict(r.config), **{k: _digits(getattr(r, k)) for k in _SPEEDS}}
            for r in fit.runs
        ],
    }


_SPEEDS = ("measured", "predicted", "held_out", "new_device", "low", "high")


def _short(value: float) -> str:
    """Two digits, and nothing below a spread of 0.3 %: that much the runs support."""
    return "0" if abs(value) < 1e-5 else f"{value:.2g}"


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


# How much a difference in each column of the configuration makes a run less alike.
_UNLIKE = {
    "model": 3.0, "device": 2.5, "class": 2.5, "engine": 1.5, "quant": 1.5, "devices": 1.0,
    "split": 1.0, "offload": 2.0, "drafts": 1.0,
}  # fmt: skip
_UNLIKE_NUMBERS = {"depth": 0.3, "concurrency": 0.5, "prompt": 0.2}


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How unlike two configurations are: named columns by weight, numbers by doublings."""
    total = sum(w for key, w in _UNLIKE.items() if a.get(key) != b.get(key))
    for key, weight in _UNLIKE_NUMBERS.items():
        x, y = float(a.get(key) or 0), float(b.get(key) or 0)
        base = 1024.0 if key != "concurrency" else 1.0
        total += weight * abs(math.log2((x + base) / (y + base)))
    return total


def nearest_run(fit: Fit, config: Mapping[str, Any], quantity: str) -> NearestRun | None:
    """The measured run most like a configuration, with its held-out prediction."""
    candidates = [r for r in fit.runs if r.quantity == quantity]
    if not candidates:
        return None
    best = min(candidates, key=lambda r: (distance(config, r.config), r.id))
    return NearestRun(
        id=best.id,
        description=describe(best.config),
        measured=best.measured,
        predicted=best.held_out,
        held_out=True,
        source=best.source,
    )


def engines_measured(fit: Fit, model: str) -> dict[str, int]:
    """How many figures of a model the fit holds by engine, most first."""
    found: dict[str, int] = {}
    for r in fit.runs:
        if r.config.get("model") == model:
            name = str(r.config.get("engine"))
            found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def unmeasured(fit: Fit, config: Mapping[str, Any]) -> str:
    """That no figure of a model was measured in an engine, empty where one was.

    Efficiencies of the engine then come from its runs of other models.
    """
    own = engines_measured(fit, str(config.get("model")))
    if not fit.runs or str(config.get("engine")) in own:
        return ""
    text = f"no measured run of {config.get('model')} in {config.get('engine')}"
    if own:
        text += "; all are of " + ", ".join(f"{name} ({n} figures)" for name, n in own.items())
    return text


def describe(config: Mapping[str, Any]) -> str:
    """One line for a configuration: `Step 3.5 Flash Q4_K_S on m4max, llama.cpp, depth 8192`."""
    count = int(config.get("devices") or 1)
    device = f"{count} x {config.get('device')}" if count > 1 else str(config.get("device"))
    text = f"{config.get('model')} {config.get('quant')} on {device}, {config.get('engine')}"
    text += f", depth {int(config.get('depth') or 0)}"
    if int(config.get("concurrency") or 1) > 1:
        text += f", {int(config['concurrency'])} sequences"
    return text

"""The one estimator: a configuration in, a speed with its band out.

`predict` is a pure function of the configuration and of the fit file; `plan`, `compare`, tables and
plots all call it. It never sees a measured figure of the run it predicts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hwmodel.effects import context_of
from hwmodel.fit import Fit, nearest_run, part_seconds, seconds, spread
from hwmodel.parts import Part
from hwmodel.placement import machine
from hwmodel.probed import cache_note, fit_for, in_cache
from hwmodel.run import Estimate, Quantity, RunConfig, Status, Term
from hwmodel.speculative import tokens_per_step
from hwmodel.timing import decode_parts, prefill_parts
from refimpl.errors import RefimplError

# Further spread (natural logarithm) for what a run leaves open.
UNSTATED_DEPTH = 0.10
UNKNOWN_NAME = 0.20
GUESSED_SHAPE = 0.20
# How far a run may go beyond the measured ones of its class and engine and still be calibrated:
# a factor of the most that was measured, or of so little that it needs no measurement.
_REACH = (
    ("devices", 1, 1, "devices"),
    ("concurrency", 2, 1, "sequences"),
    ("depth", 2, 4096, "tokens in the cache"),
)
BAND = 1.6  # multiple of the standard deviation where a fit states none


def predict(
    run: RunConfig, quantity: Quantity = "decode_tok_s", fit: Fit | None = None
) -> Estimate:
    """The speed of a run.

    `decode_tok_s` is tokens per second of each sequence, `prefill_tok_s` prompt tokens per second
    of one sequence, `ttft_s` seconds until its first token. The estimate is declined, with the
    reason, where no device or no size of the weights is known; it never raises for a run.
    """
    try:
        run = in_cache(run)
        fit = fit_for(run) if fit is None else fit
        parts, amount = step_parts(run, quantity)
    except RefimplError as error:
        return _declined(quantity, str(error))
    total = seconds(parts, fit)
    if not math.isfinite(total) or total <= 0:
        return _declined(quantity, "the configuration leaves nothing to compute or to read")
    half = _band(parts, run, fit, quantity)
    value, low, high = _oriented(quantity, amount, total, half)
    roof = _roofline(parts)
    status, reason = _status(run, fit, quantity)
    nearest = nearest_run(fit, config_columns(run), quantity)
    return Estimate(
        quantity=quantity,
        unit="s" if quantity == "ttft_s" else "tok/s",
        value=value,
        low=low,
        high=high,
        roofline=roof if quantity == "ttft_s" else amount / roof,
        limiting=_limiting(parts, fit, run),
        terms=_terms(parts, fit),
        status=status,
        reason=reason,
        nearest=nearest,
        provenance=_provenance(run, fit),
    )


def step_parts(run: RunConfig, quantity: Quantity) -> tuple[list[Part], float]:
    """The parts of what is timed, and the tokens it yields (1 for ttft_s).

    Raises:
        InputError: no device with a known bandwidth, or impossible acceptance figures.
    """
    if quantity == "decode_tok_s":
        drafts = run.workload.drafts
        return decode_parts(run), tokens_per_step(drafts, run.workload.acceptance)
    parts = prefill_parts(run)
    if quantity == "prefill_tok_s":
        return parts, float(max(1, run.workload.prompt_tokens or 512))
    first = dataclasses.replace(
        run.workload,
        depth=(run.workload.depth or 0) + run.workload.prompt_tokens,
        concurrency=1,
        drafts=0,
    )
    return [*parts, *decode_parts(dataclasses.replace(run, workload=first))], 1.0


def _oriented(
    quantity: Quantity, amount: float, total: float, half: float
) -> tuple[float, float, float]:
    value = total if quantity == "ttft_s" else amount / total
    return value, value * math.exp(-half), value * math.exp(half)


def _band(parts: Sequence[Part], run: RunConfig, fit: Fit, quantity: Quantity) -> float:
    key = "decode_tok_s" if quantity == "decode_tok_s" else "prefill_tok_s"
    return fit.band.get(key, BAND) * math.hypot(spread(parts, fit, key), open_spread(run))


def open_spread(run: RunConfig) -> float:
    """Spread (natural logarithm) that a run's open points add to that of the fit."""
    variance = 0.0
    if run.workload.depth is None:
        variance += UNSTATED_DEPTH**2
    if run.unknown:
        variance += UNKNOWN_NAME**2
    if not run.model.certain:
        variance += GUESSED_SHAPE**2
    return math.sqrt(variance)


def _roofline(parts: Sequence[Part]) -> float:
    """Seconds at the datasheets' peaks: the busiest resource, nothing else."""
    busy: dict[str, float] = {}
    for p in parts:
        for resource, least_s in ((p.resource, p.peak_s), ("host arithmetic", p.arithmetic_s)):
            busy[resource] = busy.get(resource, 0.0) + least_s
    return max(busy.values()) or math.inf


def physical_limit(run: RunConfig, quantity: Quantity) -> float:
    """Tokens per second of one sequence that the datasheets allow, whatever the engine does.

    A sequence is never faster than alone, and a step yields at most all its drafts and one more.

    Raises:
        InputError: no device with a known bandwidth.
    """
    run = in_cache(run)
    work = dataclasses.replace(run.workload, concurrency=1, drafts=0)
    parts, amount = step_parts(dataclasses.replace(run, workload=work), quantity)
    most = 1 + run.workload.drafts if quantity == "decode_tok_s" else 1
    return most * amount / _roofline(parts)


def _limiting(parts: Sequence[Part], fit: Fit, run: RunConfig) -> str:
    busy: dict[str, float] = {}
    for p in parts:
        busy[p.resource] = busy.get(p.resource, 0.0) + part_seconds(p, fit)
    most = max(busy, key=lambda r: busy[r])
    return "cache bandwidth" if most == "memory bandwidth" and cache_note(run) else most


def _terms(parts: Sequence[Part], fit: Fit) -> tuple[Term, ...]:
    merged: dict[str, Term] = {}
    for p in parts:
        t = merged.get(p.name, Term(p.name, 0.0))
        merged[p.name] = Term(
            p.name, t.seconds + part_seconds(p, fit), t.bytes + p.bytes, t.flop + p.flop
        )
    return tuple(merged.values())


def _status(run: RunConfig, fit: Fit, quantity: Quantity) -> tuple[Status, str]:
    """Calibrated where runs of the same device class and engine family are in the fit."""
    if run.unknown:
        return "extrapolated", "; ".join(run.unknown)
    if not run.model.certain:
        return "extrapolated", "the model's shape is guessed from its parameters"
    own = config_columns(run)
    key = "decode_tok_s" if quantity == "decode_tok_s" else "prefill_tok_s"
    alike = [
        r
        for r in fit.runs
        if r.quantity == key and all(r.config.get(k) == own[k] for k in ("class", "family"))
    ]
    if not alike:
        return "extrapolated", f"no measured run of {own['family']} on {own['class']}"
    if own["offload"] == "ssd" and all(r.config.get("offload") != "ssd" for r in fit.runs):
        return "extrapolated", "no measured run reads experts from disk"
    if quantity == "decode_tok_s" and run.workload.drafts and not _drafts_measured(run, fit):
        return "extrapolated", f"no measured run of such engines on {own['class']} drafts"
    for column, factor, least, what in _REACH:
        most = max(_reach(r.config, column, key) for r in alike)
        if _reach(own, column, key) > factor * max(least, most):
            return "extrapolated", f"no measured run there has more than {most:,.0f} {what}"
    return ("extrapolated", fit.borrowed) if fit.borrowed else ("calibrated", "")


def _drafts_measured(run: RunConfig, fit: Fit) -> bool:
    """Whether the fit learned from drafting on such devices in such engines."""
    c = context_of(run, machine(run))
    learned = (name for name, _ in c.features("verify", "class+group"))
    return any("=" in name and name in fit.effects for name in learned)


def _reach(columns: Mapping[str, Any], column: str, key: str) -> float:
    """A column of a configuration; a prompt reaches as deep as its last token."""
    value = float(columns.get(column) or 0)
    if column == "depth" and key == "prefill_tok_s":
        value += float(columns.get("prompt") or 0)
    return value


def _provenance(run: RunConfig, fit: Fit) -> tuple[str, ...]:
    found = [f"sizes: {run.model.source}"] if run.model.source else []
    if run.weights_bytes:
        found.append("weight bytes: stated with the run")
    found += filter(None, [cache_note(run)])
    found.append(
        f"efficiencies: fit to {len(fit.runs)} measured figures, {fit.as_of}"
        if fit.runs
        else "efficiencies: priors alone, no fit file"
    )
    return tuple(found)


def _declined(quantity: Quantity, reason: str) -> Estimate:
    unit = "s" if quantity == "ttft_s" else "tok/s"
    return Estimate(quantity, unit, None, None, None, None, "", (), "declined", reason)


def config_columns(run: RunConfig) -> dict[str, Any]:
    """The configuration as plain columns, for the fit file and for finding the nearest run."""
    device = run.devices[0].device if run.devices else None
    work, place = run.workload, run.placement
    offload = "host" if place.host_expert_share or place.host_layer_share else ""
    return {
        "model": run.model.name,
        "quant": run.quant.name,
        "device": device.name if device else "",
        "class": device.device_class if device else "",
        "devices": run.device_count,
        "engine": run.engine.engine.name,
        "family": run.engine.engine.family or "other",
        "split": place.split,
        "offload": offload or ("ssd" if place.ssd_share else ""),
        "depth": work.depth or 0,
        "prompt": work.prompt_tokens,
        "concurrency": work.concurrency,
        "drafts": work.drafts,
        "micro_batch": work.micro_batch or 0,
        "kv": work.kv_type,
        "date": run.engine.date,
    }

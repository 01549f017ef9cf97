"""Predictions beside measurements: one entry per measured figure, and statistics by group.

`predicted`, `low` and `high` come from `hwmodel.predict.predict`, the estimator that plans use, in
the scope of the row (`per_user` or `aggregate`). A row's status is

* `calibrated`: the fit contains a run of this very configuration, or this very figure (`own_run`),
  so the agreement flatters; `held_out_predicted` then holds what a refit without the run's whole
  sweep predicts;
* `held_out`: the fit knows the device class and engine family, but saw neither;
* `extrapolated`: a name, the model's shape, or the device class with this engine is unknown;
* `declined`: no known hardware, or no known size of the weights.

Rows that may not enter an error statistic (`fit_ok`) are predicted and counted, not judged. A
measured figure beyond the physical limit is flagged and changes nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.calibrate import baseline_tok_s, errors_of
from bench.problem import per_user
from bench.resolve import resolve
from bench.runs import RunRecord
from hwmodel import names
from hwmodel.devices import is_own
from hwmodel.fit import Fit, FittedRun, load_fit
from hwmodel.predict import config_columns, physical_limit, predict
from hwmodel.probed import fit_for
from hwmodel.run import Estimate, Quantity, RunConfig
from refimpl.errors import RefimplError

COMPARED: tuple[Quantity, ...] = ("decode_tok_s", "prefill_tok_s")
NO_FIGURES = {"predicted": None, "low": None, "high": None}
# What one measurement has in common however it was published: prompt, batch and date may be left
# out or told otherwise.
_SAME_RUN = ("model", "quant", "device", "devices", "engine", "depth", "concurrency", "drafts")
_ROUNDED = 0.005  # relative difference of two figures of which one is rounded to three digits


def speed_text(tok_s: float) -> str:
    """Four digits, and of large numbers all before the point: `48.18`, `17940`."""
    return f"{tok_s:.0f}" if tok_s >= 1000 else f"{tok_s:.4g}"


def compare(records: Iterable[RunRecord], fit: Fit | None = None) -> dict[str, Any]:
    """The comparison of all rows: `rows` and `summary`, ready for JSON."""
    fit = load_fit() if fit is None else fit
    rows = [
        row
        for record in records
        for quantity in COMPARED
        if (row := compare_one(record, quantity, fit)) is not None
    ]
    return {"rows": rows, "summary": summarise(rows)}


def own_run(
    fit: Fit, quantity: Quantity, config: Mapping[str, Any], tok_s: float
) -> FittedRun | None:
    """The run of a fit that a figure is: of the same configuration, or the same figure published
    again, whose configuration may be told otherwise.

    Args:
        config: columns of `hwmodel.predict.config_columns`.
        tok_s: measured tokens per second of one sequence.

    Returns:
        Of several the one measured closest; None where the fit never saw it, or is of another
        device (`Fit.borrowed`).
    """
    if fit.borrowed:
        return None
    alike = [
        r
        for r in fit.runs
        if r.quantity == quantity and all(r.config.get(k) == config[k] for k in _SAME_RUN)
    ]
    same = [r for r in alike if _key(r.config) == _key(config)]
    same = same or [r for r in alike if math.isclose(r.measured, tok_s, rel_tol=_ROUNDED)]
    return min(same, key=lambda r: abs(math.log(r.measured / tok_s)), default=None)


def _key(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, str(v)) for k, v in config.items()))


def compare_one(record: RunRecord, quantity: Quantity, fit: Fit) -> dict[str, Any] | None:
    """One figure of a row beside its prediction, None where the row does not measure it."""
    measured = record.prefill_tok_s if quantity == "prefill_tok_s" else record.decode_tok_s
    if measured is None:
        return None
    row: dict[str, Any] = {
        "id": record.id,
        "quantity": quantity,
        "measured": measured,
        **NO_FIGURES,
        "status": "declined",
        "reason": "",
        "judged": record.may_fit_quantity(quantity),
        "beyond_limit": False,
        "device": known_name("device", record.device),
        "engine": known_name("engine", record.engine),
        "model": known_name("model", record.model),
        "quant": known_name("quant", record.quant),
        "depth": record.context_depth,
        "sweep": record.sweep,
        "baseline": None,
        "held_out_predicted": None,
    }
    try:
        run = resolve(record, quantity)
        # the shipped fit gives way to that of probed devices where the row is of one
        fit = fit_for(run) if fit is load_fit() else fit
    except RefimplError as error:
        return {**row, "reason": str(error)}
    estimate = predict(run, quantity, fit)
    if estimate.value is None:
        return {**row, "reason": estimate.reason}
    return {**row, **_figures(record, quantity, run, estimate, fit)}


def known_name(kind: names.Kind, text: str) -> str:
    """The canonical name, so that declined rows are counted with their kind; else the text.

    A device file of the user's goes by the name of the file.
    """
    if kind == "device" and is_own(text):
        return text.rpartition("/")[2].removesuffix(".toml")
    found = names.canonical(kind, text)
    return text if found is None else found.id


def _figures(
    record: RunRecord,
    quantity: Quantity,
    run: RunConfig,
    estimate: Estimate,
    fit: Fit,
) -> dict[str, Any]:
    aggregate = quantity == "decode_tok_s" and record.decode_scope == "aggregate"
    users = run.workload.concurrency if aggregate else 1
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    measured = record.prefill_tok_s if quantity == "prefill_tok_s" else record.decode_tok_s
    limit = physical_limit(run, quantity) * users
    beyond = record.drafts is not None and (measured or 0.0) > limit
    config = config_columns(run)
    tok_s = per_user(record, quantity)
    mine = None if tok_s is None else own_run(fit, quantity, config, tok_s)
    status, reasons = estimate.status, [estimate.reason] if estimate.reason else []
    if status == "calibrated" and mine is None:
        status = "held_out"
    if beyond:
        reasons.append(
            f"measured {speed_text(measured or 0.0)} tok/s is beyond the physical limit of "
            f"{speed_text(limit)} tok/s"
        )
    base = baseline_tok_s(run, quantity)
    return {
        "predicted": estimate.value * users,
        "low": estimate.low * users,
        "high": estimate.high * users,
        "status": status,
        "reason": "; ".join(reasons),
        "beyond_limit": beyond,
        "limiting": estimate.limiting,
        "device": config["device"],
        "engine": config["engine"],
        "model": config["model"],
        "quant": config["quant"],
        "baseline": None if base is None else base * users,
        "held_out_predicted": None if mine is None else mine.held_out * users,
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coverage and errors of the judged rows, over all and by quantity, device and engine.

    `coverage` is the share of judged rows with figures; `held_out` repeats errors and band with
    the predictions of refits without the row's sweep, where the fit was made from the row.
    """
    judged = [r for r in rows if r["judged"]]
    summary = {"rows": len(rows), "judged": len(judged), **_statistics(judged)}
    summary["statuses"] = {
        s: sum(1 for r in rows if r["status"] == s)
        for s in ("calibrated", "held_out", "extrapolated", "declined")
    }
    summary["beyond_limit"] = sum(1 for r in rows if r["beyond_limit"])
    for name in ("quantity", "device", "engine"):
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for r in judged:
            groups[str(r[name])].append(r)
        summary[f"by_{name}"] = {k: _with_quantities(v, name) for k, v in sorted(groups.items())}
    return summary


def _with_quantities(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, Any]:
    found = _statistics(rows)
    if by != "quantity":
        for q in COMPARED:
            picked = [r for r in rows if r["quantity"] == q]
            if picked:
                found[q] = _statistics(picked)
    return found


def _statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = [r for r in rows if r["predicted"] is not None]
    inside = [r["low"] <= r["measured"] <= r["high"] for r in shown]
    base = [r["baseline"] / r["measured"] for r in shown if r["baseline"] is not None]
    left = [(r["held_out_predicted"] or r["predicted"]) / r["measured"] for r in shown]
    left_inside = [
        r["low"] / r["predicted"] <= r["measured"] / (r["held_out_predicted"] or r["predicted"])
        <= r["high"] / r["predicted"]
        for r in shown
    ]  # fmt: skip
    return {
        "coverage": len(shown) / len(rows) if rows else None,
        **_named(errors_of(r["predicted"] / r["measured"] for r in shown)),
        "in_band": _share(inside),
        "held_out": {**_named(errors_of(left)), "in_band": _share(left_inside)},
        "baseline": _named(errors_of(base)),
    }


def _share(marks: Sequence[bool]) -> float | None:
    return sum(marks) / len(marks) if marks else None


def _named(errors: Mapping[str, float]) -> dict[str, float | None]:
    return {k: errors.get(k) for k in ("n", "median", "p90", "worst")}


def worst_rows(rows: Sequence[Mapping[str, Any]], count: int = 10) -> list[Mapping[str, Any]]:
    """The judged rows that a prediction misses by the largest factor."""

    def miss(r: Mapping[str, Any]) -> float:
        return abs(math.log((r["held_out_predicted"] or r["predicted"]) / r["measured"]))

    shown = [r for r in rows if r["judged"] and r["predicted"] is not None]
    return sorted(shown, key=miss, reverse=True)[:count]

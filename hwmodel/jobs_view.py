"""Costs and jobs as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwmodel.cli_support import table
from hwmodel.cost import API_MODEL, CostSheet, Terms, api_usd
from hwmodel.plan_view import band, figure, pair
from hwmodel.workload import Job, job_costs, load_profile, profile_names


def money(value: float | None) -> str:
    """Dollars with the digits that matter, `-` for unknown."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3.4 h`."""
    if seconds == 0:
        return "0 s"
    if seconds < 90:
        return f"{figure(seconds)} s"
    return f"{figure(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _head(candidate: Any) -> str:
    many = f"{candidate.count}x " if candidate.count > 1 else ""
    return (
        f"{candidate.run.model.title} on {many}{candidate.device.title}, "
        f"{candidate.engine.title}, {candidate.run.quant.name}"
    )


def cost_text(s: CostSheet) -> str:
    """The costs of a machine's tokens."""
    t = s.terms
    together = f", {s.sequences} sequences together {figure(s.output_tok_s)}"
    lines = [
        _head(s.candidate),
        "",
        f"decode   {pair(s.decode)} at {s.depth:,} tokens ({band(s.decode)})"
        + (together if s.sequences > 1 else ""),
        f"prefill  {pair(s.prefill)} ({band(s.prefill)})",
        "",
    ]
    header = [
        "",
        "USD per hour",
        f"per day of {t.hours_per_day:g} h",
        "per M output",
        "per M input",
    ]
    rows = [
        [c.way, *(money(v) for v in (c.usd_per_h, c.per_day, c.per_m_output, c.per_m_input))]
        for c in s.costs
    ]
    asked = _service(s)
    if asked is not None:
        rows.append(["vendor's service", "-", "-", *(money(usd) for usd in asked.values())])
    lines += [table(header, rows), "", *_terms_lines(s)]
    return "\n".join(lines)


def _terms_lines(s: CostSheet) -> list[str]:
    t, device = s.terms, s.candidate.device
    found = []
    if t.buy_usd is not None:
        found.append(
            f"bought: {t.buy_usd:,.0f} dollars, written off over {t.years:g} years of "
            f"{t.days_per_year:g} days"
        )
    days = t.break_even_days
    if days is not None:
        found.append(f"buying pays after {days:,.0f} such days instead of renting")
    elif t.buy_usd is not None and t.rent_usd_per_h is not None:
        found.append("buying never pays: its electricity costs more than the rent")
    if s.joules_per_output is not None and s.joules_per_input is not None and t.watts is not None:
        found.append(
            f"energy: {figure(s.joules_per_output)} J per output token, "
            f"{figure(s.joules_per_input)} J per input token, at {t.watts:,.0f} W (its limit)"
        )
    else:
        found.append(f"power of {device.name} is not known; --watts W adds electricity")
    if t.rent_usd_per_h is None:
        found.append(f"no rent is known for {device.name}; --rent USD adds it")
    found.append(f"speeds {s.decode.status}; electricity at {t.usd_per_kwh:g} dollars per kWh")
    return found


def cost_json(s: CostSheet) -> dict[str, Any]:
    """The same as one object."""
    t, c = s.terms, s.candidate
    return {
        "model": c.run.model.name, "device": c.device.name, "count": c.count,
        "engine": c.engine.name, "quant": c.run.quant.name, "depth": s.depth,
        "sequences": s.sequences, "decode_tok_s": s.decode.value, "decode_low": s.decode.low,
        "decode_high": s.decode.high, "prefill_tok_s": s.prefill.value,
        "status": s.decode.status, "joules_per_output": s.joules_per_output,
        "joules_per_input": s.joules_per_input, "break_even_days": t.break_even_days,
        "terms": {
            "buy_usd": t.buy_usd, "rent_usd_per_h": t.rent_usd_per_h, "watts": t.watts,
            "usd_per_kwh": t.usd_per_kwh, "years": t.years, "days_per_year": t.days_per_year,
            "hours_per_day": t.hours_per_day,
        },
        "costs": [
            {"way": x.way, "usd_per_h": x.usd_per_h, "usd_per_day": x.per_day,
             "usd_per_m_output": x.per_m_output, "usd_per_m_input": x.per_m_input}
            for x in s.costs
        ],
        "api": _service(s),
    }  # fmt: skip


def _service(s: CostSheet) -> dict[str, float] | None:
    """What the vendor's own service asks; None for models that it does not serve."""
    if s.candidate.run.model.name != API_MODEL:
        return None
    return {
        "usd_per_m_output": 1e6 * api_usd(0, 0, 1), "usd_per_m_input": 1e6 * api_usd(1, 0, 0),
    }  # fmt: skip


def profiles_text() -> str:
    """The shipped profiles."""
    rows = [[p["workload"], str(p["turns"]), p["title"]] for p in profiles_json()]
    return table(["workload", "turns", ""], rows)


def profiles_json() -> list[dict[str, Any]]:
    """The shipped profiles as plain values."""
    found = [load_profile(name) for name in profile_names()]
    return [{"workload": p.name, "turns": len(p.turns), "title": p.title} for p in found]


def jobs_text(jobs: Sequence[tuple[Job, Terms]]) -> str:
    """One job on one machine in full, or on several side by side."""
    profile = jobs[0][0].profile
    first = jobs[0][0]
    lines = [*filter(None, (profile.title, profile.about)), ""]
    counts = {p.name: p.tokens for p in first.phases if p.name != "waiting"}
    lines.append(
        "tokens: "
        + ", ".join(f"{n:,} {name}" for name, n in counts.items())
        + f", {first.cached_tokens:,} found in the cache; longest context {first.peak_tokens:,}"
    )
    header = ["machine", "in", "drafts", *(p.name for p in first.phases), "in all", "band"]
    header += ["bought $", "rented $", "service $", "status"]
    rows = []
    for job, terms in jobs:
        c, usd = job.candidate, job_costs(job, terms)
        rows.append(
            [
                f"{c.count}x {c.device.name}{'' if job.fits else ' (too small)'}",
                f"{c.engine.name} {c.run.quant.name}",
                str(job.drafts),
                *(duration(p.seconds) for p in job.phases),
                duration(job.seconds),
                f"{duration(job.low_s)} to {duration(job.high_s)}",
                *(money(usd[k]) for k in ("bought", "rented", "api")),
                job.status,
            ]
        )
    lines += ["", table(header, rows)]
    return "\n".join(lines)


def job_json(job: Job, terms: Terms) -> dict[str, Any]:
    """A job on a machine as one object."""
    c = job.candidate
    return {
        "workload": job.profile.name, "model": c.run.model.name, "device": c.device.name,
        "count": c.count,
        "engine": c.engine.name, "quant": c.run.quant.name, "drafts": job.drafts,
        "seconds": job.seconds, "low_s": job.low_s, "high_s": job.high_s, "fits": job.fits,
        "peak_tokens": job.peak_tokens, "cached_tokens": job.cached_tokens,
        "phases": [
            {"name": p.name, "tokens": p.tokens, "seconds": p.seconds} for p in job.phases
        ],
        "usd": job_costs(job, terms), "status": job.status,
    }  # fmt: skip

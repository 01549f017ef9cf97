"""All claims, each with its finding; as text, Markdown and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from hwmodel.claims import memory, price, speed
from hwmodel.claims.finding import Claim, Finding, load_claims
from hwmodel.errors import RequestError
from hwmodel.fit import load_fit

Checked = tuple[Claim, Finding]
WIDTH = 100


def check_claims(ids: Sequence[str] = ()) -> list[Checked]:
    """The claims asked for (none: all) with what the cost model finds.

    Raises:
        RequestError: no claim of that id.
    """
    tests = {**speed.TESTS, **memory.TESTS, **price.TESTS}
    claims = load_claims()
    known = {c.id for c in claims}
    wanted = [i.upper() for i in ids]
    for i in wanted:
        if i not in known:
            first, last = claims[0].id, claims[-1].id
            raise RequestError(f"claim '{i}' is not known; expected {first} to {last}")
    return [(c, tests[c.id]()) for c in claims if not wanted or c.id in wanted]


def claims_json(checked: Sequence[Checked]) -> dict[str, Any]:
    """One object with the list `claims`."""
    return {
        "claims": [
            {
                "id": c.id,
                "claim": c.text,
                "source": c.source,
                "quantity": c.quantity,
                "unit": c.unit,
                "computed": f.computed,
                "verdict": f.verdict,
                "why": f.why,
                "command": f.command,
                "extrapolated": f.extrapolated,
                "rests_on": list(f.rests_on),
                "values": dict(f.values),
            }
            for c, f in checked
        ]
    }


def claims_text(checked: Sequence[Checked]) -> str:
    """A few lines for each claim."""
    lines = []
    for c, f in checked:
        lines.append(f"{c.id}  {c.text}")
        for label, text in (
            ("computed", f.computed),
            ("verdict", f.verdict + ("  (rests on an extrapolation)" if f.extrapolated else "")),
            ("why", f.why),
            ("rests on", "; ".join(f.rests_on)),
            ("again", f.command),
        ):
            if text and text != "-":
                lines += _wrapped(label, text)
        lines.append("")
    return "\n".join([*lines, _summary(checked)])


def _wrapped(label: str, text: str) -> list[str]:
    found = textwrap.wrap(text, WIDTH - 15, break_on_hyphens=False)
    return [f"     {label if i == 0 else '':<9} {line}" for i, line in enumerate(found)]


def _kind(f: Finding) -> str:
    return "holds when" if f.verdict.startswith("holds when") else f.verdict


def _summary(checked: Sequence[Checked]) -> str:
    kinds = [_kind(f) for _, f in checked]
    counts = [
        f"{kinds.count(k)} {k}"
        for k in ("holds", "holds when", "contradicted", "not testable")
        if k in kinds
    ]
    resting = [c.id for c, f in checked if f.extrapolated]
    text = f"{len(checked)} claim{'' if len(checked) == 1 else 's'}: {', '.join(counts)}"
    return text + (f"; resting on an extrapolation: {', '.join(resting)}" if resting else "")


def claims_markdown(checked: Sequence[Checked]) -> str:
    """A report for the readers of the articles."""
    fit = load_fit()
    lines = [
        "# What was claimed about Step 3.5 Flash, and what a cost model computes",
        "",
        "Written by `hwmodel claims --markdown reports/claims.md`; every figure is computed in "
        f"that run, with efficiencies fitted to {len(fit.runs)} measured figures ({fit.as_of}). "
        "Figures in brackets are the band in which about nine of ten measured runs lay that the "
        "fit never saw.",
        "",
        f"{_summary(checked)}.",
        "",
        "| | claim | computed | verdict |",
        "|---|---|---|---|",
    ]
    for c, f in checked:
        mark = " *" if f.extrapolated else ""
        cells = (f"[{c.id}](#{c.id.lower()})", c.text, f.computed, f.verdict + mark)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += ["", "\\* the verdict rests on an estimate beyond the measured runs.", ""]
    for c, f in checked:
        lines += [f"### {c.id}", "", f"**{c.text}** ({c.source})", ""]
        if f.computed != "-":
            lines += [f"Computed: {f.computed}.", ""]
        lines += [f"Verdict: **{f.verdict}**. {f.why}", ""]
        if f.rests_on:
            lines += [f"Rests on: {'; '.join(f.rests_on)}.", ""]
        if f.command:
            lines += [f"Again: `{f.command}`", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

"""What is counted of a run, and the table of it."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts of one kind."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: int = 0
    sites: set[str] = field(default_factory=set)
    lines: set[str] = field(default_factory=set)
    kept: int = 0
    cpu_s: float = 0.0


def merged(results: list[dict[str, Tally]]) -> dict[str, Tally]:
    """The sum over processes, kinds in their order."""
    out: dict[str, Tally] = collections.defaultdict(Tally)
    for result in results:
        for kind, b in result.items():
            a = out[kind]
            for name in ("cases", "accepted", "refused", "failures", "kept", "cpu_s"):
                setattr(a, name, getattr(a, name) + getattr(b, name))
            a.sites |= b.sites
            a.lines |= b.lines
    return dict(out)


def shown(t: Tally) -> dict[str, Any]:
    return {
        "cases": t.cases,
        "accepted": t.accepted,
        "refused": t.refused,
        "failures": t.failures,
        "places_of_refusal": len(t.sites - {""}),
        "lines_seen": len(t.lines),
        "kept": t.kept,
        "cpu_s": round(t.cpu_s, 1),
    }


def report(tallies: dict[str, Tally], command: str, limits: str) -> str:
    """The table as Markdown, with the command that made it and the limits of a case."""
    head = ["kind", "cases", "accepted", "refused", "failures", "places of refusal", "lines seen",
            "kept as seeds", "CPU s"]  # fmt: skip
    rows = [[k, *shown(t).values()] for k, t in tallies.items()]
    sums = ["all", *(round(sum(row[i] for row in rows), 1) for i in range(1, len(head)))]
    lines = ["| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row) + " |"
             for row in (head, ["---"] * len(head), *rows, sums)]  # fmt: skip
    return "\n".join([
        "# Fuzzing of everything that reads a file",
        "",
        f"`{command}`",
        "",
        f"Limits of a case: {limits}.",
        "",
        "*accepted*: the file opened and everything was done with it (checkpoints: inspected, and "
        "run on both backends with drafts). *refused*: one printable line that says why. "
        "*failure*: anything else. *places of refusal*: different paths through the code that "
        "ended in a refusal.",
        "",
        *lines,
        "",
    ])  # fmt: skip

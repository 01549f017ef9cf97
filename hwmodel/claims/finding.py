"""What stands beside a claim: a computed value with its band, a verdict, and how to get it again.

The claims are rows of `hwmodel/data/claims.csv`. Of a row only its identity is used (`id`,
`source`, `claim`, `quantity`, `unit`); its columns of other people's verdicts are never read.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HOLDS, CONTRADICTED, NOT_TESTABLE = "holds", "contradicted", "not testable"


@dataclass(frozen=True)
class Claim:
    """One published statement; `quantity` as written there, in `unit`."""

    id: str
    source: str
    text: str
    quantity: str
    unit: str


@dataclass(frozen=True)
class Finding:
    """The cost model's answer to one claim.

    Attributes:
        computed: the value in words, with its band where it is an estimate.
        verdict: `holds`, `holds when ...`, `contradicted` or `not testable`.
        why: the reason in one or two sentences.
        command: prints the figures again.
        values: the figures by name, for programs.
        extrapolated: the verdict rests on an estimate beyond the measured runs.
        rests_on: data of a date on which the verdict depends: engine versions, prices, limits.
    """

    computed: str
    verdict: str
    why: str
    command: str
    values: Mapping[str, float | None]
    extrapolated: bool = False
    rests_on: tuple[str, ...] = ()


Test = Callable[[], Finding]


@lru_cache(maxsize=1)
def load_claims() -> tuple[Claim, ...]:
    """All published claims, in the order of the file."""
    path = Path(__file__).parents[1] / "data" / "claims.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            Claim(r["id"], r["source"], r["claim"], r["quantity"], r["unit"])
            for r in csv.DictReader(file)
        )


def when(condition: str) -> str:
    """`holds when <condition>`."""
    return f"{HOLDS} when {condition}"


def untestable(why: str) -> Finding:
    """A claim on which a cost model has nothing to say."""
    return Finding("-", NOT_TESTABLE, why, "", {})

"""The comparison of structure and totals as text and as a report."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.compare_view import percent
from bench.markdown import markdown
from bench.paired import INTERVAL
from bench.problem import FITTED
from bench.structure import LEFT_OUT, MIN_SWEEPS, Difference, Pair, difference, groups_of
from hwmodel.cli_support import table

NAMES = {"decode_tok_s": "decode", "prefill_tok_s": "prefill"}
HEADER = (
    "group", "figures", "sweeps", "median", "of totals", "mean", "of totals", "p90", "of totals",
    "mean's change", "interval", "structure is",
)  # fmt: skip


def structure_notes() -> Mapping[str, str]:
    """What a reading of the sources says where structure is not clearly better, by group."""
    path = Path(__file__).parent / "data" / "structure_notes.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return {r["group"]: r["note"] for r in csv.DictReader(file)}


def structure_text(pairs: Sequence[Pair]) -> str:
    """A table for each quantity and each thing left out."""
    parts = []
    for quantity in FITTED:
        for out in LEFT_OUT:
            rows = rows_of(pairs, quantity, out)
            if rows:
                parts += [f"{NAMES[quantity]}, whole {out}s left out; errors in %", "",
                          table(list(HEADER), [list(r) for r in rows]), ""]  # fmt: skip
    return "\n".join([*parts, summary(pairs)])


def rows_of(
    pairs: Sequence[Pair], quantity: str, out: str, families: bool = True
) -> list[tuple[str, ...]]:
    """One row for each group of figures of a quantity, with or without families of models."""
    mine = [p for p in pairs if p.quantity == quantity]
    names = {p.family for p in mine} if not families else set()
    groups = {name: group for name, group in groups_of(mine).items() if name not in names}
    return [_row(name, difference(group, out)) for name, group in groups.items()]


def _row(name: str, d: Difference) -> tuple[str, ...]:
    change, low, high = (f"{100 * v:+.1f}" for v in d.mean_change)
    errors = [percent(v) for both in (d.median, d.mean, d.p90) for v in both]
    return (name, str(d.n), str(d.sweeps), *errors, change, f"{low} to {high}", d.verdict)


def summary(pairs: Sequence[Pair]) -> str:
    """One sentence for each quantity, sweeps left out."""
    found = []
    for quantity in FITTED:
        mine = [p for p in pairs if p.quantity == quantity]
        if not mine:
            continue
        d = difference(mine, "sweep")
        change, low, high = (100 * v for v in d.mean_change)
        found.append(
            f"{NAMES[quantity]}: mean error {percent(d.mean[0])} % from structure, "
            f"{percent(d.mean[1])} % from totals, change {change:+.1f} points "
            f"({low:+.1f} to {high:+.1f}), median {percent(d.median[0])} against "
            f"{percent(d.median[1])} %"
        )
    return "; ".join(found)


def structure_markdown(pairs: Sequence[Pair]) -> str:
    """The report."""
    models = len({p.model for p in pairs})
    parts = [
        "# Does a model's structure predict its speed better than its totals?",
        f"{len(pairs)} published figures of {models} models other than Step, each predicted twice "
        "by fits that never saw it: with the model described by its structure (layers, heads, "
        "windows, experts, shared experts, latents, states, head), and by nothing but the total "
        "and active parameters of its model card. Rows, folds and procedure are the same, and the "
        "efficiencies are refitted for each description. Step's own rows are in both fits. "
        f"Interval: {100 * INTERVAL:.0f} % of a paired bootstrap over sweeps. *better* and "
        f"*worse*: the interval excludes 0; *few*: fewer than {MIN_SWEEPS} sweeps. Made by "
        "`bench calibrate --compare-structure reports/structure.md`.",
        f"**Sweeps left out: {summary(pairs)}.**",
    ]
    for quantity in FITTED:
        for out in LEFT_OUT:
            rows = rows_of(pairs, quantity, out, families=out == "sweep")
            if rows:
                parts.append(f"## {NAMES[quantity].capitalize()}, whole {out}s left out")
                parts += ["Errors |predicted / measured - 1| in %.", markdown(HEADER, rows)]
    reasons = _reasons(pairs)
    if reasons:
        parts += ["## Where structure does not help", *reasons]
    return "\n\n".join(parts) + "\n"


def _reasons(pairs: Sequence[Pair]) -> list[str]:
    """Notes on the groups whose mean error is not smaller, sweeps left out."""
    notes = structure_notes()
    found: dict[str, list[str]] = {}
    for quantity in FITTED:
        mine = [p for p in pairs if p.quantity == quantity]
        for name, group in groups_of(mine).items():
            if difference(group, "sweep").mean_change[0] >= 0 and name in notes:
                found.setdefault(name, []).append(NAMES[quantity])
    return [f"* **{name}** ({', '.join(where)}): {notes[name]}" for name, where in found.items()]

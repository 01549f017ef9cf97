"""A comparison and a calibration as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare import COMPARED, speed_text, worst_rows
from hwmodel.cli_support import counted, table

if TYPE_CHECKING:
    from hwmodel.fit import Fit

NAMES = {"decode_tok_s": "decode", "prefill_tok_s": "prefill"}


def percent(share: float | None) -> str:
    """`12.3`, empty where there is nothing."""
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def comparison_text(result: Mapping[str, Any]) -> str:
    """Errors in % by quantity, device and engine beside the baseline, and the worst rows."""
    summary = result["summary"]
    counts = ", ".join(f"{n} {status}" for status, n in summary["statuses"].items() if n)
    judged = "none counts in the errors below"
    if summary["judged"]:
        judged = (
            f"{summary['judged']} {'counts' if summary['judged'] == 1 else 'count'} in the errors "
            f"below, {percent(summary['coverage'])} % of them predicted"
        )
    parts = [f"{counted(summary['rows'], 'figure')} ({counts}); {judged}"]
    parts += _declined(result["rows"])
    parts += _impossible(result["rows"])
    if summary["judged"]:
        parts += ["", _errors_table(summary), "", *_worst(result["rows"])]
    else:
        parts += ["", *_unjudged(result["rows"])]
    return "\n".join(parts)


_REASONS = 3  # of declined rows, the most frequent ones


def _declined(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows have no prediction, the most frequent reasons with an example."""
    by_reason: dict[str, list[str]] = {}
    for r in rows:
        if r["status"] == "declined":
            by_reason.setdefault(r["reason"], []).append(r["id"])
    often = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    said = [f"declined: {ids[0]}{_more(ids)}: {reason}" for reason, ids in often[:_REASONS]]
    rest = sum(len(ids) for _, ids in often[_REASONS:])
    return said + ([f"declined: {rest} more, see --json"] if rest else [])


def _more(ids: Sequence[str]) -> str:
    return f" and {len(ids) - 1} more" if len(ids) > 1 else ""


_REFITS = "(predicted here by refits that never saw the run's sweep)"


def _impossible(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Figures beyond what the datasheet allows, the first ones with both numbers."""
    found = [r for r in rows if r["beyond_limit"]]
    said = [
        f"impossible: {r['id']}: {r['reason'].rpartition('; ')[2]} that the datasheet allows"
        for r in found[:_REASONS]
    ]
    rest = len(found) - len(said)
    return said + ([f"impossible: {rest} more, see --json"] if rest else [])


_HEADER = [
    "errors in %", "quantity", "rows", "predicted", "median", "p90", "worst", "in band",
    "held-out median", "p90", "baseline median", "p90",
]  # fmt: skip


def _errors_table(summary: Mapping[str, Any]) -> str:
    rows = [
        _errors_row("all", name, summary["by_quantity"][q])
        for q, name in NAMES.items()
        if q in summary["by_quantity"]
    ]
    for group in ("device", "engine"):
        for name, entry in summary[f"by_{group}"].items():
            for q in COMPARED:
                if q in entry:
                    rows.append(_errors_row(name, NAMES[q], entry[q]))
    return table(_HEADER, rows)


def _errors_row(name: str, quantity: str, e: Mapping[str, Any]) -> list[str]:
    held, base = e["held_out"], e["baseline"]
    return [
        name[:40] or "(not stated)", quantity, str(e["n"] or 0), percent(e["coverage"]),
        percent(e["median"]), percent(e["p90"]), percent(e["worst"]), percent(e["in_band"]),
        percent(held["median"]), percent(held["p90"]), percent(base["median"]),
        percent(base["p90"]),
    ]  # fmt: skip


def _worst(rows: list[Mapping[str, Any]]) -> list[str]:
    found = worst_rows(rows)
    refits = any(r["held_out_predicted"] for r in found)
    return [_rows_table("worst rows", found), *([_REFITS] if refits else [])] if found else []


_UNJUDGED = 10  # rows that are shown where none is judged


def _unjudged(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first rows of a file without any that counts, such as one of busy rounds."""
    shown = [r for r in rows if r["predicted"] is not None]
    more = len(shown) - _UNJUDGED
    return [
        *([_rows_table("not judged", shown[:_UNJUDGED])] if shown else []),
        *([f"{more} more, see --json"] if more > 0 else []),
    ]


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            str(r["id"]),
            NAMES[r["quantity"]],
            speed_text(r["measured"]),
            speed_text(r["held_out_predicted"] or r["predicted"]),
            f"{(r['held_out_predicted'] or r['predicted']) / r['measured']:.2f}",
            r["status"],
            f"{r['model']} {r['quant']} on {r['device']}, {r['engine']}"[:60],
        ]
        for r in rows
    ]
    header = [title, "quantity", "measured", "predicted", "ratio", "status", "what"]
    return table(header, cells)


def errors_text(fit: Fit) -> str:
    """Cross-validation errors in % by quantity, device and engine, beside the baseline."""
    rows = []
    for q, entry in fit.errors.items():
        rows.append(_cross_row("all", NAMES.get(q, q), entry))
        for group in ("by_device", "by_engine"):
            for name, part in entry.get(group, {}).items():
                rows.append(_cross_row(name, NAMES.get(q, q), part))
    return table(_CROSS_HEADER, rows)


_CROSS = ("leave_sweep_out", "leave_device_out", "leave_model_out", "baseline")
_CROSS_HEADER = [
    "errors in %", "quantity", "rows", "sweep out: median", "p90", "device out: median", "p90",
    "model out: median", "p90", "baseline: median", "p90",
]  # fmt: skip


def _cross_row(name: str, quantity: str, entry: Mapping[str, Any]) -> list[str]:
    cells = [name[:40], quantity, str(entry.get(_CROSS[0], {}).get("n", ""))]
    for kind in _CROSS:
        found = entry.get(kind, {})
        cells += [percent(found.get("median")), percent(found.get("p90"))]
    return cells

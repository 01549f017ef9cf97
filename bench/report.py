"""The validation report: one command turns runs, fit, loop and rounds into text, tables, pictures.

Nothing in it comes from the clock or the machine that writes it, so that the same data give the
same bytes. Parts whose data are missing say so.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.runs import RunRecord
from hwmodel.fit import Fit


@dataclass(frozen=True)
class Sources:
    """What the report is made of.

    Attributes:
        records, result, fit: the published runs, their comparison, and the fit.
        compare, loop, engine: folders of the comparison's pictures, of the local loop, and of the
            CPU engine's rounds.
    """

    records: Sequence[RunRecord]
    result: Mapping[str, Any]
    fit: Fit
    compare: Path
    loop: Path
    engine: Path


def row_notes() -> dict[tuple[str, str], str]:
    """What a reader of the source says of a row that is badly predicted, by id and quantity."""
    path = Path(__file__).parent / "data" / "row_notes.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return {(r["id"], r["quantity"]): r["note"] for r in csv.DictReader(file)}


def write_report(out: Path, loop: Path, engine: Path) -> list[Path]:
    """Write the report, and beside it `compare/` with pictures and the tables behind them.

    Raises:
        RunFileError: a file of rounds or of the loop is there and damaged.
        OSError: a file cannot be written.
    """
    from bench.compare import compare
    from bench.compare_files import write_comparison
    from bench.report_text import report_text
    from bench.runs import published_runs_path, read_runs
    from hwmodel.files import write_whole
    from hwmodel.fit import load_fit

    records, _ = read_runs(published_runs_path())
    fit = load_fit()
    found = Sources(records, compare(records, fit), fit, out.parent / "compare", loop, engine)
    written = write_comparison(found.compare, records, found.result, fit, "published_runs.csv")
    for name, text in tables(found).items():
        path = found.compare / name
        write_whole(path, text.encode())
        written.append(path)
    write_whole(out, report_text(found, lambda p: os.path.relpath(p, out.parent)).encode())
    return [*written, out]


def tables(found: Sources) -> dict[str, str]:
    """The values behind the pictures as CSV, by file name."""
    return {
        "rows.csv": rows_csv(found.result["rows"], found.records),
        "decode-depth.csv": depth_csv(found.records),
        "bytes-by-role.csv": roles_csv(found.records),
        "draft-gain.csv": gains_csv(found.records, found.fit),
        "errors.csv": errors_csv(found.result["summary"]),
    }


_ROW = (
    "id", "quantity", "device", "engine", "model", "quant", "depth", "measured", "predicted",
    "low", "high", "held_out_predicted", "baseline", "status", "judged", "beyond_limit", "sweep",
    "reason",
)  # fmt: skip


def rows_csv(rows: Sequence[Mapping[str, Any]], records: Sequence[RunRecord]) -> str:
    """Every compared figure with its source."""
    sources = {r.id: r.source_url for r in records}
    return _csv((*_ROW, "source"), ([*(r[k] for k in _ROW), sources[r["id"]]] for r in rows))


def depth_csv(records: Sequence[RunRecord]) -> str:
    """Curves and points of decode against depth."""
    import dataclasses

    from bench.plots import depth_panels
    from hwmodel.predict import predict

    lines: list[Sequence[Any]] = []
    for device, curves in depth_panels(records):
        for curve in curves:
            work = curve.run.workload
            for depth in curve.depths:
                at = dataclasses.replace(work, depth=depth)
                e = predict(dataclasses.replace(curve.run, workload=at), "decode_tok_s")
                lines.append((device, curve.label, depth, e.value, e.low, e.high, e.roofline, None))
            for depth_measured, value in curve.measured:
                row = (device, curve.label, depth_measured, None, None, None, None, value)
                lines.append(row)
    header = ("device", "run", "depth", "predicted", "low", "high", "datasheet_limit", "measured")
    return _csv(header, lines)


def roles_csv(records: Sequence[RunRecord]) -> str:
    """Bytes of one decoded token by role."""
    from bench.compare_plots import ROLES, role_bars

    names = [name for name, _ in ROLES]
    header = ("model", *(f"{n}_bytes" for n in names))
    return _csv(header, ((b.label, *(round(b.read[n]) for n in names)) for b in role_bars(records)))


def gains_csv(records: Sequence[RunRecord], fit: Fit) -> str:
    """Speed-ups of drafts, measured and predicted."""
    from bench.compare_plots import gains

    lines = [
        (g.title.replace("\n", ", "), drafts, value, g.predicted[drafts])
        for g in gains(records, fit)
        for drafts, values in g.measured.items()
        for value in values
    ]
    return _csv(("sweep", "drafts", "measured_speed_up", "predicted_speed_up"), lines)


def errors_csv(summary: Mapping[str, Any]) -> str:
    """Errors by quantity, device and engine: as fitted, held out, and of the baseline."""
    lines = []
    for group in ("quantity", "device", "engine"):
        for name, entry in summary[f"by_{group}"].items():
            parts = [(name, entry)] if group == "quantity" else _by_quantity(entry)
            for quantity, e in parts:
                held, base = e["held_out"], e["baseline"]
                lines.append((
                    group, name, quantity, e["n"], e["coverage"], e["median"], e["p90"],
                    e["worst"], e["in_band"], held["median"], held["p90"], held["worst"],
                    held["in_band"], base["median"], base["p90"],
                ))  # fmt: skip
    header = (
        "group", "name", "quantity", "n", "coverage", "median", "p90", "worst", "in_band",
        "held_out_median", "held_out_p90", "held_out_worst", "held_out_in_band",
        "baseline_median", "baseline_p90",
    )  # fmt: skip
    return _csv(header, lines)


def _by_quantity(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    from bench.compare import COMPARED

    return [(q, entry[q]) for q in COMPARED if q in entry]


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(v) for v in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

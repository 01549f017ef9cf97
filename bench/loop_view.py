"""The local loop as text, as a table of values, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench.loop_points import ENGINES
from bench.loop_run import kind_of
from hwmodel.cli_support import table
from hwmodel.plots import FONT, GREY, look, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (
    "slice decode", "slice drafts", "slice prefill", "embedded decode", "embedded drafts",
    "embedded prefill",
)  # fmt: skip
_COLUMNS = (
    "id", "probe", "engine", "model", "quantity", "prompt", "depth", "drafts", "measured",
    "predicted", "low", "high", "ratio", "basis", "rounds",
)  # fmt: skip


def predictions_text(made: Mapping[str, Any]) -> str:
    """Every point with its prediction and band; probe points with what was measured."""
    rows = [
        (
            r["id"],
            "probe" if r["probe"] else "",
            f"{r['predicted']:.1f}",
            f"{r['low']:.1f} to {r['high']:.1f}",
            f"{r['probe_measured']:.1f}" if r["probe_measured"] else "",
            r["limiting"],
        )
        for r in made["points"]
    ]
    header = ("point", "", "predicted tok/s", "band", "measured", "limited by")
    return table(header, rows)


def comparison_text(found: Mapping[str, Any]) -> str:
    """Points outside the probe, measured and predicted, and the errors by engine."""
    rows = [
        (r["id"], _speed(r["measured"]), _speed(r["predicted"]),
         f"{r['ratio']:.2f}" if r["ratio"] else "", r["basis"])
        for r in found["rows"] if not r["probe"]
    ]  # fmt: skip
    points = table(("outside the probe", "measured tok/s", "predicted", "ratio", "basis"), rows)
    return points + "\n\n" + table(*errors_table(found))


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def errors_table(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Errors in % of points outside the probe, by engine and kind."""
    rows = []
    for engine in ENGINES:
        e = found["errors"][engine]
        share = "" if e["in_band"] is None else f"{100 * e['in_band']:.0f}"
        rows.append((engine, "all", f"{e['measured']} of {e['listed']}", *_three(e), share))
        for kind in KINDS:
            if kind in e["by_kind"]:
                part = e["by_kind"][kind]
                rows.append((engine, kind, str(part["n"]), *_three(part), ""))
    header = ("errors in %", "outside the probe", "points", "median", "p90", "worst", "in band")
    return header, rows


def _three(e: Mapping[str, Any]) -> tuple[str, ...]:
    found = (e.get(k) for k in ("median", "p90", "worst"))
    return tuple("" if v is None else f"{100 * v:.1f}" for v in found)


def fit_table(made: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Errors of a host's efficiencies, by engine: in the fit, of points whose file it never saw,
    and of the published fit, which takes the probed speeds for peaks."""
    rows = []
    for engine, entry in made["engines"].items():
        for quantity, e in entry["errors"].items():
            for name, kind in (("in the fit", "fit"), ("its file left out", "leave_sweep_out"),
                               ("published fit", "published")):  # fmt: skip
                if e.get(kind, {}).get("n"):
                    rows.append((engine, quantity.split("_")[0], name, str(e[kind]["n"]),
                                 *_three(e[kind])))  # fmt: skip
    return ("errors in %", "quantity", "", "points", "median", "p90", "worst"), rows


def fit_text(made: Mapping[str, Any]) -> str:
    """`fit_table` for a terminal."""
    return table(*fit_table(made))


def comparison_csv(found: Mapping[str, Any]) -> str:
    """All points as CSV."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for r in found["rows"]:
        writer.writerow([_cell(r[k]) for k in _COLUMNS])
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def loop_figure(found: Mapping[str, Any]) -> Figure:
    """Predicted against measured on this host, a panel for each engine.

    Filled grey: the probe's points, which the fit saw; open: predicted before they were measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [r for r in found["rows"] if r["measured"]]
    low = min(min(r["measured"], r["predicted"]) for r in rows) / 1.4
    high = max(max(r["measured"], r["predicted"]) for r in rows) * 1.4
    with style():
        figure = Figure(figsize=(14.4, 8.3), layout="constrained")
        grid = figure.subplots(1, len(ENGINES), squeeze=False)
        for axes, engine in zip(grid.flat, ENGINES, strict=True):
            _guides(axes, low, high)
            for r in rows:
                if r["engine"] == engine:
                    _point(axes, r)
            _errors_note(axes, found["errors"][engine])
            axes.set_title(f"{engine} on this host", loc="left", fontsize=FONT + 2)
        handles: list[Any] = [
            Line2D([], [], color="black", linewidth=1.2, label="predicted = measured"),
            Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="±15 %"),
            Line2D([], [], marker="o", color=GREY, linestyle="none", markersize=7,
                   label="probe point (in the fit)"),
        ]  # fmt: skip
        for i, kind in enumerate(KINDS):
            if any(kind_of(r) == kind for r in rows):
                colour, marker = look(i)
                handles.append(
                    Line2D([], [], marker=marker, color=colour, markerfacecolor="none",
                           markeredgewidth=1.8, linestyle="none", markersize=9, label=kind)
                )  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=FONT)
        figure.suptitle(
            f"{found['host']}; predicted {when(found['predictions_made'])}, "
            f"measured from {when(found['first_measured'])} on",
            fontsize=FONT - 1, color=GREY, x=0.01, ha="left",
        )  # fmt: skip
        return figure


def when(stamp: str) -> str:
    """`2026-11-22 03:12 UTC` of an ISO time."""
    return f"{stamp[:10]} {stamp[11:16]} UTC"


def _guides(axes: Any, low: float, high: float) -> None:
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    line = np.array([low, high])
    axes.plot(line, line, color="black", linewidth=1.2)
    axes.fill_between(line, line * 0.85, line * 1.15, color="#eeeeee", zorder=0, linewidth=0)
    for factor in (0.85, 1.15):
        axes.plot(line, factor * line, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    axes.set_xlabel("measured, tokens/s", fontsize=FONT + 1)
    axes.set_ylabel("predicted, tokens/s", fontsize=FONT + 1)


def _point(axes: Any, row: Mapping[str, Any]) -> None:
    if row["probe"]:
        axes.plot(row["measured"], row["predicted"], marker="o", color=GREY, markersize=7,
                  linestyle="none", alpha=0.7)  # fmt: skip
        return
    colour, marker = look(KINDS.index(kind_of(row)))
    axes.plot(row["measured"], row["predicted"], marker=marker, color=colour, markersize=9,
              markerfacecolor="none", markeredgewidth=1.8, linestyle="none")  # fmt: skip


def _errors_note(axes: Any, e: Mapping[str, Any]) -> None:
    if not e["measured"]:
        return
    axes.text(
        0.97, 0.04,
        f"{e['measured']} points outside the probe\nmedian error {100 * e['median']:.0f} %\n"
        f"worst {100 * e['worst']:.0f} %",
        transform=axes.transAxes, ha="right", va="bottom", fontsize=FONT + 1,
    )  # fmt: skip

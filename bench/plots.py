"""The two main pictures of a comparison: predicted against measured, and decode against depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.resolve import resolve
from bench.runs import RunRecord
from hwmodel.plots import (
    FONT,
    GREY,
    DepthCurve,
    depth_grid,
    draw_depth,
    line_handles,
    look,
    style,
)
from refimpl.errors import RefimplError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_DEVICES = 8  # the rest share one grey marker
MIN_DEPTHS = 4  # a sweep with fewer depths makes no curve
TITLES = {"decode_tok_s": "Decode", "prefill_tok_s": "Prefill"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One panel: rows of (device, measured, predicted, extrapolated)."""

    quantity: str
    held_out: bool
    points: tuple[tuple[str, float, float, bool], ...]

    @property
    def title(self) -> str:
        """What the panel shows."""
        how = "held out: not in the fit" if self.held_out else "calibrated: in the fit"
        return f"{TITLES[self.quantity]}, {how}"


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """The panels that have points, decode before prefill, calibrated before held out.

    A row whose sweep a refit left out appears in both columns: as the fit predicts it, and as the
    refit that never saw it does.
    """
    found = []
    judged = [r for r in rows if r["judged"] and r["predicted"] is not None]
    for quantity in TITLES:
        mine = [r for r in judged if r["quantity"] == quantity]
        inside = [
            (str(r["device"]), r["measured"], r["predicted"], False)
            for r in mine
            if r["status"] == "calibrated"
        ]
        outside = [
            (
                str(r["device"]),
                r["measured"],
                r["held_out_predicted"] or r["predicted"],
                r["status"] == "extrapolated",
            )
            for r in mine
            if r["held_out_predicted"] or r["status"] != "calibrated"
        ]
        for held_out, points in ((False, inside), (True, outside)):
            if points:
                found.append(Panel(quantity, held_out, tuple(points)))
    return found


def scatter_figure(rows: Sequence[Row], source: str) -> Figure:
    """Predicted against measured, log-log, identity and ±20 %; filled calibrated, open held out."""
    from matplotlib.figure import Figure

    panels = panels_of(rows)
    named = _named_devices(panels)
    columns = 2 if len({p.held_out for p in panels}) == 2 else 1
    height = max(1, -(-len(panels) // columns))
    with style():
        figure = Figure(figsize=(7.2 * columns, 6.2 * height + 1.6), layout="constrained")
        if not panels:
            figure.text(0.5, 0.5, "no row that counts has a prediction", ha="center")
            return figure
        grid = figure.subplots(height, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_scatter(axes, panel, named)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        handles = _device_handles(named, panels)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(3 * columns, len(handles)),
            fontsize=FONT - 1, columnspacing=1.2, handletextpad=0.3,
        )  # fmt: skip
        name_sources(figure, source)
        return figure


def _named_devices(panels: Sequence[Panel]) -> dict[str, int]:
    count = Counter(device for p in panels for device, *_ in p.points)
    return {name: i for i, (name, _) in enumerate(count.most_common(NAMED_DEVICES))}


def _draw_scatter(axes: Axes, panel: Panel, named: Mapping[str, int]) -> None:
    import numpy as np

    values = [v for _, m, p, _ in panel.points for v in (m, p)]
    low, high = min(values) / 1.3, max(values) * 1.3
    line = np.array([low, high])
    axes.plot(line, line, color="black", linewidth=1.2)
    axes.fill_between(line, line * 0.8, line * 1.2, color="#eeeeee", zorder=0, linewidth=0)
    for factor in (1.2, 0.8):
        axes.plot(line, factor * line, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for device, measured, predicted, extrapolated in panel.points:
        colour, marker = look(named[device]) if device in named else (GREY, ".")
        axes.plot(
            measured, predicted, marker=marker, markersize=8 if marker != "." else 9,
            color=colour, markerfacecolor="none" if panel.held_out else colour,
            markeredgewidth=2.2 if extrapolated else 1.3, alpha=0.8, linestyle="none",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    _plain_ticks(axes)
    axes.set_aspect("equal")
    axes.set_xlabel("measured, tokens/s")
    axes.set_ylabel("predicted, tokens/s")
    axes.set_title(panel.title, loc="left", fontsize=FONT + 1)
    off = np.abs(np.array([p / m for _, m, p, _ in panel.points]) - 1)
    axes.text(
        0.97, 0.04,
        f"{len(off)} figures\nmedian error {100 * np.median(off):.0f} %\n"
        f"90th percentile {100 * np.quantile(off, 0.9):.0f} %",
        transform=axes.transAxes, ha="right", va="bottom", fontsize=FONT,
    )  # fmt: skip


_FEW_DECADES = 12  # span of an axis whose ticks at 1 and 3 would be too few


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    few = high / low < _FEW_DECADES
    for axis in (axes.xaxis, axes.yaxis):
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if few else (1.0, 3.0)
        axis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))


def _device_handles(named: Mapping[str, int], panels: Sequence[Panel]) -> list[Any]:
    from matplotlib.lines import Line2D

    found = [
        Line2D([], [], color="black", linewidth=1.2, label="predicted = measured"),
        Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="±20 %"),
    ]
    for name, index in named.items():
        colour, marker = look(index)
        found.append(
            Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=8, label=name)
        )
    if any(device not in named for p in panels for device, *_ in p.points):
        found.append(
            Line2D([], [], marker=".", color=GREY, linestyle="none", markersize=9,
                   label="other devices")
        )  # fmt: skip
    extrapolated = any(point[3] for p in panels for point in p.points)
    if extrapolated:
        found.append(
            Line2D([], [], marker="o", color="black", markerfacecolor="none", linestyle="none",
                   markeredgewidth=2.2, markersize=8, label="thick: extrapolated")
        )  # fmt: skip
    return found


def depth_curves(records: Sequence[RunRecord]) -> dict[str, list[DepthCurve]]:
    """Sweeps over at least four depths without drafts and for one sequence, by device and model."""
    sweeps: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for r in records:
        plain = r.drafts == 0 and (r.batch_concurrency or 1) == 1
        stated = r.decode_tok_s is not None and r.context_depth is not None
        if plain and stated and r.may_fit_quantity("decode_tok_s"):
            sweeps[(r.device, r.sweep or r.id, r.quant)].append(r)
    found: dict[str, list[DepthCurve]] = defaultdict(list)
    for rows in sweeps.values():
        depths = {r.context_depth for r in rows}
        if len(depths) < MIN_DEPTHS:
            continue
        try:
            run = resolve(rows[0], "decode_tok_s")
        except RefimplError:
            continue
        first = rows[0]
        many = f"{run.device_count}x " if run.device_count > 1 else ""
        where = f"{many}{run.devices[0].device.name}"
        found[where].append(
            DepthCurve(
                label=f"{first.model} {first.quant}, {first.source_date[:7]}",
                run=run,
                depths=depth_grid(int(max(r.context_depth or 0 for r in rows))),
                measured=tuple(
                    sorted((r.context_depth or 0.0, r.decode_tok_s or 0.0) for r in rows)
                ),
            )
        )
    return dict(found)


MAX_PANELS = 4
MAX_CURVES = 4


def depth_panels(records: Sequence[RunRecord]) -> list[tuple[str, list[DepthCurve]]]:
    """At most four devices, those with most sweeps of Step models first, four curves each.

    A device on which Step models were swept shows no other model.
    """

    def rank(curves: list[DepthCurve]) -> tuple[int, int]:
        step = sum(1 for c in curves if c.run.model.name.startswith("step"))
        return -step, -len(curves)

    found = sorted(depth_curves(records).items(), key=lambda item: rank(item[1]))
    chosen = []
    for name, curves in found[:MAX_PANELS]:
        step = [c for c in curves if c.run.model.name.startswith("step")]
        chosen.append((name, (step or curves)[:MAX_CURVES]))
    return chosen


def depth_figure(records: Sequence[RunRecord], source: str) -> Figure:
    """Decode against depth: measured points, prediction with its band, the datasheet's limit."""
    from matplotlib.figure import Figure

    panels = depth_panels(records)
    columns = 2 if len(panels) > 1 else 1
    height = max(1, -(-len(panels) // columns))
    with style():
        figure = Figure(figsize=(7.2 * columns, 5.9 * height + 0.8), layout="constrained")
        if not panels:
            figure.text(0.5, 0.5, "no sweep over four or more depths", ha="center")
            return figure
        grid = figure.subplots(height, columns, squeeze=False)
        for axes, (name, curves) in zip(grid.flat, panels, strict=False):
            draw_depth(axes, curves)
            share = min(c.run.placement.host_expert_share for c in curves)
            where = f", {100 * share:.0f} % of the experts in host memory" if share else ""
            axes.set_title(name + where, loc="left", fontsize=FONT + 1)
            axes.set_ylabel("decode, tokens/s")
            axes.legend(
                loc="upper left", bbox_to_anchor=(0, -0.15),
                fontsize=FONT - 2, borderaxespad=0, handletextpad=0.2, columnspacing=1.0,
            )  # fmt: skip
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.legend(handles=line_handles(), loc="outside lower center", ncols=3)
        name_sources(figure, source)
        return figure


def name_sources(figure: Figure, source: str) -> None:
    """Where the numbers of a figure come from, above it."""
    figure.suptitle(source, fontsize=FONT - 1, color=GREY, x=0.01, ha="left")

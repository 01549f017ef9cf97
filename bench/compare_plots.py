"""Further pictures of a comparison: bytes by role, the gain of drafts, and residuals by group."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.plots import name_sources
from bench.problem import per_user
from bench.resolve import resolve
from bench.runs import RunRecord
from hwmodel.fit import Fit, load_fit, seconds
from hwmodel.plots import COLOURS, FONT, GREY, MARKERS, look, style
from hwmodel.predict import step_parts
from hwmodel.probed import fit_for, in_cache
from hwmodel.run import RunConfig
from refimpl.errors import RefimplError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
GB = 1e9
ROLE_DEPTH = 65536  # tokens in the cache of the bars
MAX_BARS = 8
ROLES = (
    ("attention", "attention"), ("dense", "dense layers"), ("shared", "shared expert"),
    ("routed", "routed experts"), ("head", "output head"), ("other", "router, norms, embedding"),
    ("kv", "KV cache, f16"),
)  # fmt: skip
MAX_GROUPS = 14
MIN_GROUP = 3
MAX_GAIN_PANELS = 6


@dataclass(frozen=True)
class RoleBar:
    """Bytes that decoding one token reads, by role, of one model in one type."""

    label: str
    read: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.read.values())


def role_bars(records: Sequence[RunRecord], depth: int = ROLE_DEPTH) -> list[RoleBar]:
    """The types in which Step models were measured (all models where none was), most bytes first.

    Weights are counted from the inventory and the type's rule: every tensor once, of the routed
    experts the selected ones.
    """
    found: dict[tuple[str, str], RunConfig] = {}
    rows: Counter[tuple[str, str]] = Counter()
    for record in records:
        try:
            run = resolve(record)
        except RefimplError:
            continue
        if run.model.certain and not run.unknown:
            key = (run.model.title, run.quant.name)
            found.setdefault(key, run)
            rows[key] += 1
    step = {k: r for k, r in found.items() if r.model.is_step}
    chosen = [k for k, _ in rows.most_common() if k in (step or found)][:MAX_BARS]
    bars = [RoleBar(f"{k[0]} {k[1]}", read_bytes(found[k], depth)) for k in chosen]
    return sorted(bars, key=lambda b: -b.total)


def read_bytes(run: RunConfig, depth: int) -> dict[str, float]:
    """Bytes of one decoding step at a depth by the roles of `ROLES`."""
    from hwmodel.memory import kv_value_bytes
    from hwmodel.operations import step_counts

    counts = step_counts(run.model, run.quant, depth, 1)
    known = {name for name, _ in ROLES}
    read = {name: 0.0 for name, _ in ROLES}
    for role, size in counts.weight_bytes.items():
        read[role if role in known else "other"] += size
    read["kv"] = counts.cache_bytes(kv_value_bytes("f16"))
    return read


def roles_figure(records: Sequence[RunRecord]) -> Figure:
    """Stacked bars: what one decoded token reads, by role, with the KV cache at 64K."""
    from matplotlib.figure import Figure

    bars = role_bars(records)
    with style():
        figure = Figure(figsize=(13, 2.9 + 0.72 * len(bars)), layout="constrained")
        if not bars:
            figure.text(0.5, 0.5, "no row of a model whose tensors are known", ha="center")
            return figure
        axes = figure.add_subplot()
        for y, bar in enumerate(bars):
            left = 0.0
            for i, (role, _) in enumerate(ROLES):
                size = bar.read[role] / GB
                axes.barh(y, size, left=left, color=look(i)[0], height=0.66,
                          edgecolor="white", linewidth=0.8)  # fmt: skip
                left += size
            before = left - bar.read["kv"] / GB
            axes.text(left, y, f"  {before:.1f} + {bar.read['kv'] / GB:.1f} GB", va="center",
                      fontsize=FONT + 1)  # fmt: skip
        axes.set_yticks(range(len(bars)), [b.label for b in bars], fontsize=FONT + 1)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.17 * max(b.total for b in bars) / GB)
        axes.set_xlabel("GB read to decode one token: weights + KV cache at 64K tokens",
                        fontsize=FONT + 1)  # fmt: skip
        _role_legend(figure)
        name_sources(figure, "counted from the tensor table; no measurement in this picture")
        return figure


def _role_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=look(i)[0], label=text) for i, (_, text) in enumerate(ROLES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=FONT + 1)


@dataclass(frozen=True)
class Gain:
    """Speed-ups of drafts in one sweep: by drafts, measured ones and the predicted one."""

    title: str
    measured: Mapping[int, tuple[float, ...]]
    predicted: Mapping[int, float]


def gains(records: Sequence[RunRecord], fit: Fit) -> list[Gain]:
    """Sweeps that hold a run without drafts and runs with some, otherwise alike; largest first.

    Measured speed-ups are ratios within a sweep, so that its unstated conditions cancel.
    """
    sweeps: dict[str, list[RunRecord]] = defaultdict(list)
    for r in records:
        if r.sweep and per_user(r, "decode_tok_s"):
            sweeps[r.sweep].append(r)
    found = [g for rows in sweeps.values() if (g := _gain(rows, fit)) is not None]
    return sorted(found, key=lambda g: (-len(g.measured), -sum(map(len, g.measured.values()))))


def _gain(rows: Sequence[RunRecord], fit: Fit) -> Gain | None:
    base = next((r for r in rows if r.drafts == 0), None)
    plain = per_user(base, "decode_tok_s") if base else None
    if base is None or plain is None:
        return None
    measured: dict[int, list[float]] = defaultdict(list)
    predicted: dict[int, float] = {}
    try:
        alone = resolve(base)
        one = _tok_s(alone, fit)
        for r in rows:
            same = r.batch_concurrency == base.batch_concurrency
            with_drafts = per_user(r, "decode_tok_s")
            if not r.drafts or not same or with_drafts is None:
                continue
            run = resolve(r)
            if not run.model.mtp_layers:
                continue
            measured[r.drafts].append(with_drafts / plain)
            predicted[r.drafts] = _tok_s(run, fit) / one
    except RefimplError:
        return None
    if not measured:
        return None
    depth = f", {round(base.context_depth / 1024)}K" if base.context_depth else ""
    limit = base.sweep.rpartition("-")[2]
    if not depth and limit.isdigit():
        depth = f", up to {int(limit) // 1024}K"
    return Gain(
        f"{base.model} {alone.quant.name}{depth}\n{alone.devices[0].device.name}, "
        f"{alone.engine.engine.name}",
        {k: tuple(v) for k, v in sorted(measured.items())},
        dict(sorted(predicted.items())),
    )


def _tok_s(run: RunConfig, fit: Fit) -> float:
    run = in_cache(run)
    fit = fit_for(run) if fit is load_fit() else fit  # as `bench.compare` chooses
    parts, amount = step_parts(run, "decode_tok_s")
    return amount / seconds(parts, fit)


def gains_figure(records: Sequence[RunRecord], fit: Fit, source: str) -> Figure:
    """Speed-up over no drafts against drafts per step, one panel for each sweep."""
    from matplotlib.figure import Figure

    found = gains(records, fit)[:MAX_GAIN_PANELS]
    columns = min(3, max(1, len(found)))
    height = max(1, -(-len(found) // columns))
    with style():
        figure = Figure(figsize=(4.9 * columns, 4.6 * height + 1.3), layout="constrained")
        if not found:
            figure.text(0.5, 0.5, "no sweep with and without drafts", ha="center")
            return figure
        grid = figure.subplots(height, columns, squeeze=False, sharey=True)
        for axes, gain in zip(grid.flat, found, strict=False):
            _draw_gain(axes, gain)
        for axes in list(grid.flat)[len(found) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("speed-up over no drafts", fontsize=FONT + 1)
        figure.legend(
            handles=_gain_handles(), loc="outside lower center", ncols=3, fontsize=FONT + 1
        )
        name_sources(figure, f"{source}; speed-ups are in the fit, as ratios within a sweep")
        return figure


def _draw_gain(axes: Axes, gain: Gain) -> None:
    axes.axhline(1.0, color="black", linewidth=1.2)
    drafts = [0, *gain.predicted]
    axes.plot(drafts, [1.0, *gain.predicted.values()], color=COLOURS[0], linewidth=2.2,
              marker=MARKERS[1], markersize=8)  # fmt: skip
    for n, values in gain.measured.items():
        axes.plot([n] * len(values), values, linestyle="none", marker=MARKERS[0], markersize=11,
                  markerfacecolor="none", markeredgewidth=2.2, color=COLOURS[1])  # fmt: skip
    axes.set_xticks(range(4))
    axes.set_xlim(-0.3, 3.3)
    axes.set_xlabel("drafts per step", fontsize=FONT + 1)
    axes.set_title(gain.title, loc="left", fontsize=FONT)


def _gain_handles() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=COLOURS[1], marker=MARKERS[0], markerfacecolor="none", markersize=11,
               markeredgewidth=2.2, linestyle="none", label="measured"),
        Line2D([], [], color=COLOURS[0], marker=MARKERS[1], markersize=8, linewidth=2.2,
               label="predicted"),
        Line2D([], [], color="black", linewidth=1.2, label="no drafts"),
    ]  # fmt: skip


def residual_groups(rows: Sequence[Row], column: str) -> list[tuple[str, list[Row]]]:
    """Judged rows with a prediction by a column, most rows first; small groups together."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r["judged"] and r["predicted"] is not None:
            groups[str(r[column])].append(r)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = [g for g in ordered[:MAX_GROUPS] if len(g[1]) >= MIN_GROUP]
    names = {name for name, _ in shown}
    rest = [r for name, own in ordered if name not in names for r in own]
    return shown + ([("others", rest)] if rest else [])


def residuals_figure(rows: Sequence[Row], source: str) -> Figure:
    """Predicted over measured by device and by engine: filled as fitted, open held out."""
    from matplotlib.figure import Figure

    panels = [(n, residual_groups(rows, n)) for n in ("device", "engine")]
    most = max((len(groups) for _, groups in panels), default=0)
    with style():
        figure = Figure(figsize=(14.4, 2.6 + 0.72 * max(1, most)), layout="constrained")
        if not most:
            figure.text(0.5, 0.5, "no row that counts has a prediction", ha="center")
            return figure
        for axes, (column, groups) in zip(figure.subplots(1, 2), panels, strict=True):
            _draw_residuals(axes, groups)
            axes.set_title(f"by {column}", loc="left", fontsize=FONT + 2)
        figure.legend(
            handles=_residual_handles(), loc="outside lower center", ncols=3, fontsize=FONT + 1
        )
        name_sources(figure, source)
        return figure


_RANGE = (0.33, 3.0)


def _draw_residuals(axes: Axes, groups: Sequence[tuple[str, list[Row]]]) -> None:
    from matplotlib.ticker import NullLocator

    axes.axvspan(0.8, 1.2, color="#eeeeee", zorder=0, linewidth=0)
    axes.axvline(1.0, color="black", linewidth=1.2)
    for y, (_, rows) in enumerate(groups):
        inside = [r["predicted"] / r["measured"] for r in rows if r["status"] == "calibrated"]
        outside = [
            (r["held_out_predicted"] or r["predicted"]) / r["measured"]
            for r in rows
            if r["held_out_predicted"] or r["status"] != "calibrated"
        ]
        _strip(axes, y - 0.2, inside, COLOURS[0], filled=True)
        _strip(axes, y + 0.2, outside, COLOURS[1], filled=False)
    names = [f"{name} ({len(rows)})" for name, rows in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=FONT)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.set_xscale("log")
    axes.set_xlim(*_RANGE)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.4)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("predicted / measured", fontsize=FONT + 1)


def _strip(axes: Axes, y: float, ratios: Sequence[float], colour: str, filled: bool) -> None:
    """Points, their quartiles as a bar and their median as a stroke; far ones at the edge."""
    import numpy as np

    if not ratios:
        return
    shown = np.clip(ratios, _RANGE[0] * 1.03, _RANGE[1] / 1.03)
    # a fixed scatter, so that the picture is the same each time
    offset = 0.22 * (np.modf(np.arange(len(ratios)) * (math.sqrt(5) - 1) / 2)[0] - 0.5)
    axes.plot(
        shown, y + offset, linestyle="none", marker=MARKERS[0], markersize=4.5, color=colour,
        markerfacecolor=colour if filled else "none", alpha=0.55, markeredgewidth=1.0,
    )  # fmt: skip
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    if len(ratios) > 3:
        axes.plot([low, high], [y, y], color=colour, linewidth=7, alpha=0.35,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot([middle] * 2, [y - 0.17, y + 0.17], color=colour, linewidth=3)


def _residual_handles() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=COLOURS[0], marker=MARKERS[0], linestyle="none", markersize=6,
               label="calibrated: in the fit"),
        Line2D([], [], color=COLOURS[1], marker=MARKERS[0], markerfacecolor="none",
               linestyle="none", markersize=6, label="held out: its sweep not in the fit"),
        Line2D([], [], color=GREY, linewidth=3, label="median"),
        Patch(color=GREY, alpha=0.35, label="middle half"),
        Patch(color="#eeeeee", label="±20 %"),
        Line2D([], [], color="black", linewidth=1.2, label="predicted = measured"),
    ]  # fmt: skip

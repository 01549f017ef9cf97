"""The pictures of the cost model: roofline, depth, memory, first token, drafts, cost, frontiers.

Each function makes one figure from estimates of the one estimator; `hwmodel.plots` has the style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodel.candidate import Candidate
from hwmodel.cost import cost_sheet, terms_of
from hwmodel.errors import RequestError
from hwmodel.plan import Plan
from hwmodel.plots import (
    FONT,
    GREY,
    DepthCurve,
    depth_grid,
    draw_depth,
    line_handles,
    look,
    save_one,
    style,
)
from hwmodel.predict import predict
from hwmodel.roofline import PhasePoint, roofs, step_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hwmodel.frontier import Offer, RackPoint

GB = 1e9
MEMORY_PARTS = (
    ("weights", "weights_bytes"), ("KV cache", "kv_bytes"), ("buffers", "compute_bytes"),
    ("MTP layers", "mtp_bytes"),
)  # fmt: skip
PROMPTS = (128, 512, 2048, 8192, 32768, 131072)
ACCEPTANCES = tuple(i / 20 for i in range(21))


def _blank(title: str, subtitle: str, size: tuple[float, float] = (9, 6.2)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    figure.suptitle(subtitle, fontsize=FONT - 3, color=GREY, x=0.01, ha="left")
    return figure, axes


def _label(plan: Plan) -> str:
    c = plan.chosen
    return f"{c.count}x {c.device.name}, {c.run.quant.name}, {c.engine.title}"


def _source() -> str:
    from hwmodel.fit import load_fit

    fit = load_fit()
    return f"predicted; fit to {len(fit.runs)} published measurements, {fit.as_of}"


def depth_picture(plans: Sequence[Plan]) -> Figure:
    """Decode speed against context depth, with band and datasheet limit."""
    with style():
        figure, axes = _blank("Decode against depth", _source())
        curves = [
            DepthCurve(_label(p), p.chosen.at(drafts=0), depth_grid(max(1, p.max_context)))
            for p in plans
        ]
        draw_depth(axes, curves)
        axes.set_ylabel("decode, tokens/s per sequence")
        _legend(figure, axes, plans, lines=True)
        return figure


def _legend(figure: Figure, axes: Axes, plans: Sequence[Plan], lines: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], color=look(i)[0], linewidth=2.5, label=_label(p))
        for i, p in enumerate(plans)
    ]
    if lines:
        axes.legend(handles=line_handles(), fontsize=FONT - 2, loc="upper right")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT - 2)


def memory_picture(plans: Sequence[Plan]) -> Figure:
    """Memory by component for each machine, with its limit."""
    with style():
        figure, axes = _blank("Memory", _memory_note(plans), (9, 1.9 + 0.8 * len(plans)))
        names = [_label(p) for p in plans]
        for row, plan in enumerate(plans):
            left = 0.0
            m = plan.memory
            for i, (part, attribute) in enumerate(MEMORY_PARTS):
                value = getattr(m, attribute) / GB
                axes.barh(row, value, left=left, color=look(i)[0], height=0.55,
                          label=part if row == 0 else None)  # fmt: skip
                left += value
            limit = m.usable_bytes / GB
            raised = (m.usable_bytes + m.raised_margin_bytes - m.margin_bytes) / GB
            axes.plot([limit] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2.5)
            if raised > limit * 1.001:
                axes.plot([raised] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2,
                          linestyle=(0, (3, 2)))  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GB; line: usable, dashed: with a raised limit")
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=len(MEMORY_PARTS), fontsize=FONT - 2)
        return figure


def _memory_note(plans: Sequence[Plan]) -> str:
    return f"computed from the tensor table; {plans[0].request.context:,} tokens of context"


def ttft_picture(plans: Sequence[Plan]) -> Figure:
    """Time to first token against the length of the prompt, with band."""
    with style():
        figure, axes = _blank("Time to first token", _source())
        for i, plan in enumerate(plans):
            sizes = [n for n in PROMPTS if n <= plan.max_context]
            found = [
                predict(plan.chosen.at(depth=0, prompt_tokens=n, drafts=0), "ttft_s") for n in sizes
            ]
            _banded(axes, sizes, found, i)
        _plain_log(axes, "y")
        axes.set_xscale("log", base=2)
        axes.set_xticks(PROMPTS, [_k(n) for n in PROMPTS])
        axes.xaxis.minorticks_off()
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("seconds to the first token")
        axes.grid(which="major")
        _legend(figure, axes, plans)
        return figure


def _k(n: int) -> str:
    return str(n) if n < 1024 else f"{n // 1024}K"


def _banded(axes: Axes, x: Sequence[float], found: Sequence[Any], index: int) -> None:
    colour, marker = look(index)
    axes.fill_between(x, [e.low or 0 for e in found], [e.high or 0 for e in found],
                      color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    axes.plot(x, [e.value or 0 for e in found], color=colour, marker=marker, linewidth=2)


def mtp_picture(plans: Sequence[Plan]) -> Figure:
    """Gain of one to three drafts against the chance that a draft is accepted."""
    from matplotlib.figure import Figure

    usable = [p for p in plans if p.chosen.engine.max_drafts and p.chosen.run.model.mtp_layers]
    if not usable:
        raise RequestError("none of these machines drafts with this model")
    columns = min(2, len(usable))
    rows = -(-len(usable) // columns)
    with style():
        figure = Figure(figsize=(5.6 * columns, 4.6 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, plan in zip(grid.flat, usable, strict=False):
            _gains(axes, plan)
        for axes in list(grid.flat)[len(usable) :]:
            axes.set_visible(False)
        depth = usable[0].request.context // 4
        figure.suptitle(
            f"Gain of drafts, {depth:,} tokens of context; {_source()}",
            fontsize=FONT - 3, color=GREY, x=0.01, ha="left",
        )  # fmt: skip
        return figure


def _gains(axes: Axes, plan: Plan) -> None:
    c = plan.chosen
    depth = plan.request.context // 4
    plain = predict(c.at(depth=depth, drafts=0), "decode_tok_s").value or 1.0
    for i, drafts in enumerate(range(1, c.engine.max_drafts + 1)):
        gains = []
        for chance in ACCEPTANCES:
            run = c.at(depth=depth, drafts=drafts, acceptance=(chance,) * drafts)
            gains.append((predict(run, "decode_tok_s").value or 0.0) / plain)
        colour, _ = look(i)
        axes.plot(
            ACCEPTANCES,
            gains,
            color=colour,
            linewidth=2.2,
            label=f"{drafts} draft{'s' if drafts > 1 else ''}",
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_title(_label(plan), loc="left", fontsize=FONT - 1)
    axes.set_xlabel("chance that each draft is accepted")
    axes.set_ylabel("times as fast as without")
    axes.set_xlim(0, 1)
    axes.legend(fontsize=FONT - 2, loc="upper left")


def cost_picture(plans: Sequence[Plan]) -> Figure:
    """Dollars per million output tokens against speed: bought and, where known, rented."""
    with style():
        figure, axes = _blank("Cost against speed", _cost_note(plans))
        for i, plan in enumerate(plans):
            sheet = cost_sheet(
                plan.chosen, terms_of(plan.chosen), plan.request.context // 4, plan.best_drafts
            )
            colour, marker = look(i)
            for cost in sheet.costs:
                if cost.way == "electricity":
                    continue
                hollow = "none" if cost.way == "rented" else colour
                axes.plot([sheet.output_tok_s], [cost.per_m_output], marker=marker, color=colour,
                          markerfacecolor=hollow, markersize=11, markeredgewidth=2,
                          linestyle="none")  # fmt: skip
        _plain_log(axes, "x", "y")
        axes.margins(0.1)
        axes.set_xlabel("output tokens/s of the machine")
        axes.set_ylabel("dollars per million output tokens")
        _cost_legend(axes, plans)
        return figure


def _cost_legend(axes: Axes, plans: Sequence[Plan]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], color=look(i)[0], marker=look(i)[1], linestyle="none", markersize=9,
               label=_label(p))
        for i, p in enumerate(plans)
    ]  # fmt: skip
    handles.append(
        Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="none",
               markersize=9, markeredgewidth=2, label="hollow: rented, filled: bought")
    )  # fmt: skip
    axes.legend(handles=handles, fontsize=FONT - 2, loc="best")


def _cost_note(plans: Sequence[Plan]) -> str:
    t = terms_of(plans[0].chosen)
    return (
        f"one sequence; bought: {t.years:g} years of {t.days_per_year:g} days of "
        f"{t.hours_per_day:g} h, electricity included"
    )


def roofline_picture(candidate: Candidate) -> Figure:
    """Phases of the model under the roofs of a machine."""
    import numpy as np

    points = step_points(candidate)
    bandwidth, peaks = roofs(candidate)
    with style():
        c = candidate
        figure, axes = _blank(
            f"Roofline: {c.run.model.title} on {c.count}x {c.device.title}",
            f"{c.run.quant.name} in {c.engine.title}; {_source()}", (9.5, 6.6),
        )  # fmt: skip
        low = min(p.intensity for p in points) / 3
        high = max(*(p.intensity for p in points), 2 * max(peaks.values()) / bandwidth) * 2
        x = np.geomspace(low, high, 200)
        for i, (dtype, peak) in enumerate(peaks.items()):
            line = (0, (5, 3)) if i else "-"
            axes.plot(x, np.minimum(x * bandwidth, peak) / 1e12, color="black", linewidth=2,
                      linestyle=line, label=f"{dtype} peak {peak / 1e12:,.0f} TFLOP/s, "
                      f"memory {bandwidth / 1e9:,.0f} GB/s")  # fmt: skip
        for i, p in enumerate(points):
            _phase(axes, p, i)
        _plain_log(axes, "x", "y")
        axes.set_xlabel("operations per byte read (weights and KV cache)")
        axes.set_ylabel("TFLOP/s")
        axes.legend(fontsize=FONT - 3, loc="lower right")
        return figure


def _phase(axes: Axes, p: PhasePoint, index: int) -> None:
    colour, marker = look(index)
    axes.plot([p.intensity], [p.flop_per_s / 1e12], color=colour, marker=marker, markersize=10,
              linestyle="none", label=f"{p.name}: {100 * p.share:.0f} % of the roof")  # fmt: skip
    axes.plot([p.intensity] * 2, [p.flop_per_s / 1e12, p.roof_flop_per_s / 1e12], color=colour,
              linewidth=1, linestyle=":")  # fmt: skip


def draw_frontier(found: Sequence[Offer] | Sequence[RackPoint], path: str) -> None:
    """A frontier into one file.

    Raises:
        RequestError: the file's name ends neither in .png nor in .svg.
    """
    from hwmodel.frontier import Offer

    check_name(path)
    offers = [o for o in found if isinstance(o, Offer)]
    points = [p for p in found if not isinstance(p, Offer)]
    save_one(_offers_figure(offers) if offers else _rack_figure(points), Path(path))


def _offers_figure(offers: Sequence[Offer]) -> Figure:
    with style():
        figure, axes = _blank(
            f"Price, speed and quality, {offers[0].candidate.context:,} tokens",
            f"machines that none beats in all three; {_source()}", (10, 6.6),
        )  # fmt: skip
        types = list(dict.fromkeys(o.candidate.run.quant.name for o in offers))
        for i, quant in enumerate(types):
            mine = [o for o in offers if o.candidate.run.quant.name == quant]
            colour, marker = look(i)
            loss = mine[0].candidate.quality.perplexity_increase
            shown = "unknown" if loss is None else f"+{100 * loss:.1f} %"
            axes.plot([o.price_usd for o in mine], [o.tok_s for o in mine], color=colour,
                      marker=marker, markersize=10, linestyle="none",
                      label=f"{quant} (perplexity {shown})")  # fmt: skip
        # points close together share one label, with the types' colours telling them apart
        named: list[Offer] = []
        for o in sorted(offers, key=lambda o: -o.tok_s):
            if any(_close(o, other) for other in named):
                continue
            named.append(o)
            axes.annotate(f"{o.candidate.count}x {o.candidate.device.name}", (o.price_usd, o.tok_s),
                          textcoords="offset points", xytext=(8, 4), fontsize=FONT - 4)  # fmt: skip
        _plain_log(axes, "x", "y")
        low, high = min(o.price_usd for o in offers), max(o.price_usd for o in offers)
        axes.set_xlim(low / 1.3, high * 2.2)
        axes.set_xlabel("dollars for the whole machine")
        axes.set_ylabel("decode, tokens/s")
        axes.legend(fontsize=FONT - 3, loc="upper left")
        return figure


def _close(a: Offer, b: Offer) -> bool:
    same = a.candidate.device.name == b.candidate.device.name
    near = abs(a.price_usd / b.price_usd - 1) < 0.02
    return (same and near and a.candidate.count == b.candidate.count) or (
        abs(a.price_usd / b.price_usd - 1) < 0.1 and abs(a.tok_s / b.tok_s - 1) < 0.06
    )


def _rack_figure(points: Sequence[RackPoint]) -> Figure:
    first = points[0].candidate
    with style():
        figure, axes = _blank(
            f"{first.run.model.title} on {first.device.title}, {first.context:,} tokens per user",
            f"best of group sizes, splits and batches; {_source()}", (10, 6.2),
        )  # fmt: skip
        counts = sorted({p.candidate.count for p in points})
        x = [p.tokens_per_usd / 1e6 for p in points]
        axes.plot(x, [p.user_tok_s for p in points], color=GREY, linewidth=1.2, zorder=1)
        for i, count in enumerate(counts):
            mine = [p for p in points if p.candidate.count == count]
            colour, marker = look(i)
            axes.plot([p.tokens_per_usd / 1e6 for p in mine], [p.user_tok_s for p in mine],
                      color=colour, marker=marker, markersize=10, linestyle="none",
                      label=f"groups of {count}")  # fmt: skip
        for p in points:
            axes.annotate(_users(p),
                          (p.tokens_per_usd / 1e6, p.user_tok_s), textcoords="offset points",
                          xytext=(9, 5), fontsize=FONT - 4)  # fmt: skip
        _plain_log(axes, "x")
        axes.set_xlabel("million output tokens per dollar")
        axes.set_ylabel("tokens/s of each user")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        axes.legend(fontsize=FONT - 2, loc="best")
        return figure


def _users(p: RackPoint) -> str:
    n = p.serving.batch
    return f"{n} user{'s' if n > 1 else ''}, {p.candidate.run.placement.split}"


def _plain_log(axes: Axes, *names: str) -> None:
    """Logarithmic axes whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        axis.set_minor_locator(NullLocator())


def check_name(path: str) -> None:
    """Refuse a file that no picture can be written to.

    Raises:
        RequestError: the name ends neither in .png nor in .svg, or its folder is missing.
    """
    if not path.endswith((".png", ".svg")):
        raise RequestError(f"the picture is {path!r}, expected a name that ends in .png or .svg")
    if not Path(path).resolve().parent.is_dir():
        raise RequestError(f"the folder of {path!r} does not exist")


PICTURES: dict[str, Callable[[Sequence[Plan]], Figure]] = {
    "depth": depth_picture,
    "memory": memory_picture,
    "ttft": ttft_picture,
    "mtp": mtp_picture,
    "cost": cost_picture,
    "roofline": lambda plans: roofline_picture(plans[0].chosen),
}

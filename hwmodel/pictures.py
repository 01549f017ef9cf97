"""The pictures of the cost model: roofline, depth, memory, first token, drafts, cost.

Each function makes one figure from estimates of the one estimator; `hwmodel.plots` has the style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hwmodel.candidate import Candidate
from hwmodel.cost import cost_sheet, terms_of
from hwmodel.errors import RequestError
from hwmodel.plan import Plan
from hwmodel.plots import (
    FONT,
    GREY,
    DepthCurve,
    blank,
    depth_grid,
    draw_depth,
    fit_note,
    line_handles,
    look,
    plain_log,
    style,
)
from hwmodel.predict import predict
from hwmodel.roofline import PhasePoint, roofs, step_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


GB = 1e9
MEMORY_PARTS = (
    ("weights", "weights_bytes"), ("KV cache", "kv_bytes"), ("buffers", "compute_bytes"),
    ("MTP layers", "mtp_bytes"),
)  # fmt: skip
PROMPTS = (128, 512, 2048, 8192, 32768, 131072)
ACCEPTANCES = tuple(i / 20 for i in range(21))


def _label(plan: Plan) -> str:
    c = plan.chosen
    return f"{c.count}x {c.device.name}, {c.run.quant.name}, {c.engine.title}"


def depth_picture(plans: Sequence[Plan]) -> Figure:
    """Decode speed against context depth, with band and datasheet limit."""
    with style():
        figure, axes = blank("Decode against depth", fit_note())
        curves = [
            DepthCurve(_label(p), p.chosen.at(drafts=0), depth_grid(max(1, p.max_context)))
            for p in plans
        ]
        draw_depth(axes, curves)
        if len(plans) > 1:  # machines differ by factors
            deepest = [
                predict(p.chosen.at(depth=max(1, p.max_context), drafts=0), "decode_tok_s")
                for p in plans
            ]
            lowest = min(e.low or 1.0 for e in deepest)
            axes.set_ylim(bottom=0.8 * lowest)
            plain_log(axes, "y")
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
        axes.legend(handles=line_handles(), fontsize=FONT - 2, loc="lower left")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT - 2)


def memory_picture(plans: Sequence[Plan]) -> Figure:
    """Memory by component for each machine, with its limit."""
    with style():
        figure, axes = blank("Memory", _memory_note(plans), (9, 1.9 + 0.8 * len(plans)))
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
            _limit(axes, row, limit, "usable", linewidth=2.5)
            if raised > limit * 1.001:
                _limit(axes, row, raised, "usable after its limit is raised", linewidth=2,
                       linestyle=(0, (3, 2)))  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GB")
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=FONT - 2)
        return figure


def _limit(axes: Axes, row: int, value: float, name: str, **line: Any) -> None:
    """A line across one machine's bar, named once in the legend."""
    named = {text.get_label() for text in axes.lines}
    axes.plot([value] * 2, [row - 0.42, row + 0.42], color="black",
              label=None if name in named else name, **line)  # fmt: skip


def _memory_note(plans: Sequence[Plan]) -> str:
    return f"computed from the tensor table; {plans[0].request.context:,} tokens of context"


def ttft_picture(plans: Sequence[Plan]) -> Figure:
    """Time to first token against the length of the prompt, with band."""
    with style():
        figure, axes = blank("Time to first token", fit_note())
        for i, plan in enumerate(plans):
            sizes = [n for n in PROMPTS if n <= plan.max_context]
            found = [
                predict(plan.chosen.at(depth=0, prompt_tokens=n, drafts=0), "ttft_s") for n in sizes
            ]
            _banded(axes, sizes, found, i)
        plain_log(axes, "y")
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
    columns = min(2, len(usable))  # more would be too small at half the width
    rows = -(-len(usable) // columns)
    with style():
        figure = Figure(figsize=(5.4 * columns, 3.9 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for i, (axes, plan) in enumerate(zip(grid.flat, usable, strict=False)):
            _gains(axes, plan)
            if i % columns == 0:
                axes.set_ylabel("times as fast as without")
            if i + columns >= len(usable):
                axes.set_xlabel("chance that each draft is accepted")
            if not i:
                axes.legend(fontsize=FONT - 2, loc="upper left")
        for axes in list(grid.flat)[len(usable) :]:
            axes.set_visible(False)
        depth = usable[0].request.context // 4
        figure.suptitle(
            f"Gain of drafts, {depth:,} tokens of context; {fit_note()}",
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
    axes.set_xlim(0, 1)


def cost_picture(plans: Sequence[Plan]) -> Figure:
    """Dollars per million output tokens against speed: bought and, where known, rented.

    Raises:
        RequestError: no price of any of the machines is known.
    """
    if not any(map(_has_price, plans)):
        names = ", ".join(p.chosen.device.name for p in plans)
        raise RequestError(f"no price is known for {names}; 'hwmodel cost --buy USD' takes one")
    with style():
        figure, axes = blank("Cost against speed", _cost_note(plans))
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
        plain_log(axes, "x", "y")
        axes.margins(0.1)
        axes.set_xlabel("output tokens/s of the machine")
        axes.set_ylabel("dollars per million output tokens")
        _cost_legend(figure, plans)
        return figure


def _cost_legend(figure: Figure, plans: Sequence[Plan]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], color=look(i)[0], marker=look(i)[1], linestyle="none", markersize=9,
               label=_label(p) + ("" if _has_price(p) else " (no price is known)"))
        for i, p in enumerate(plans)
    ]  # fmt: skip
    handles.append(
        Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="none",
               markersize=9, markeredgewidth=2, label="hollow: rented, filled: bought")
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT - 2)


def _has_price(plan: Plan) -> bool:
    terms = terms_of(plan.chosen)
    return terms.buy_usd is not None or terms.rent_usd_per_h is not None


def _cost_note(plans: Sequence[Plan]) -> str:
    t = terms_of(plans[0].chosen)
    return (
        f"one sequence; bought: {t.years:g} years of {t.days_per_year:g} days of "
        f"{t.hours_per_day:g} h, electricity included\n{fit_note()}"
    )


def roofline_picture(candidate: Candidate) -> Figure:
    """Phases of the model under the roofs of a machine."""
    import numpy as np

    points = step_points(candidate)
    bandwidth, peaks = roofs(candidate)
    with style():
        c = candidate
        figure, axes = blank(
            f"Roofline: {c.run.model.title} on {c.count}x {c.device.title}",
            f"{c.run.quant.name} in {c.engine.title}; {fit_note()}", (9.5, 6.6),
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
        plain_log(axes, "x", "y")
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


PICTURES: dict[str, Callable[[Sequence[Plan]], Figure]] = {
    "depth": depth_picture,
    "memory": memory_picture,
    "ttft": ttft_picture,
    "mtp": mtp_picture,
    "cost": cost_picture,
    "roofline": lambda plans: roofline_picture(plans[0].chosen),
}

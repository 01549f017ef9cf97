"""Frontiers drawn: price, speed and quality of machines; a rack's speed against its cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hwmodel.frontier import Offer, RackPoint
from hwmodel.plots import (
    FONT,
    GREY,
    blank,
    check_name,
    fit_note,
    label_points,
    look,
    plain_log,
    save_one,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_frontier(found: Sequence[Offer] | Sequence[RackPoint], path: str) -> None:
    """A frontier into one file.

    Raises:
        RequestError: the file's name ends neither in .png nor in .svg.
    """
    check_name(path)
    offers = [o for o in found if isinstance(o, Offer)]
    points = [p for p in found if not isinstance(p, Offer)]
    save_one(_offers_figure(offers) if offers else _rack_figure(points), Path(path))


def _offers_figure(offers: Sequence[Offer]) -> Figure:
    with style():
        figure, axes = blank(
            f"Price, speed and quality, {offers[0].candidate.context:,} tokens",
            f"machines that none beats in all three; {fit_note()}", (10, 7.2),
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
        plain_log(axes, "x", "y")
        low, high = min(o.price_usd for o in offers), max(o.price_usd for o in offers)
        axes.set_xlim(low / 1.3, high * 2.2)
        axes.set_xlabel("dollars for the whole machine")
        axes.set_ylabel("decode, tokens/s")
        figure.legend(fontsize=FONT - 3, loc="outside lower center", ncols=3)
        label_points(
            figure,
            axes,
            [(o.price_usd, o.tok_s) for o in offers],
            [f"{o.candidate.count}x {o.candidate.device.name}" for o in offers],
        )
        return figure


def _rack_figure(points: Sequence[RackPoint]) -> Figure:
    first = points[0].candidate
    with style():
        figure, axes = blank(
            f"{first.run.model.title} on {first.device.title}, {first.context:,} tokens per user",
            f"best of group sizes, splits and batches; {fit_note()}", (10, 6.2),
        )  # fmt: skip
        kinds = sorted({(p.candidate.count, p.attention_groups) for p in points})
        x = [p.tokens_per_usd / 1e6 for p in points]
        axes.plot(x, [p.user_tok_s for p in points], color=GREY, linewidth=1.2, zorder=1)
        for i, (count, groups) in enumerate(kinds):
            mine = [p for p in points if (p.candidate.count, p.attention_groups) == (count, groups)]
            colour, marker = look(i)
            label = f"groups of {count}" if count > 1 else "single devices"
            label += f", attention {groups}x{count // groups}" if groups > 1 else ""
            axes.plot([p.tokens_per_usd / 1e6 for p in mine], [p.user_tok_s for p in mine],
                      color=colour, marker=marker, markersize=10, linestyle="none",
                      label=label)  # fmt: skip
        plain_log(axes, "x")
        axes.set_xlabel("million output tokens per dollar")
        axes.set_ylabel("tokens/s of each user")
        axes.set_ylim(0, 1.1 * max(p.user_tok_s for p in points))  # room for the top label
        axes.margins(x=0.15)
        axes.legend(fontsize=FONT - 2, loc="upper right")
        label_points(figure, axes, list(zip(x, [p.user_tok_s for p in points], strict=True)),
                     [_users(p) for p in points])  # fmt: skip
        return figure


def _users(p: RackPoint) -> str:
    n = p.serving.batch
    return f"{n} user{'s' if n > 1 else ''}"

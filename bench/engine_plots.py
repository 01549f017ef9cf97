"""Pictures of the report on the CPU engine: by type, depth, threads, drafts, micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.engine_cases import (
    DEPTHS,
    DRAFTS,
    EMBEDDED,
    ENGINE,
    KV_TYPES,
    LLAMA_DEPTHS,
    MICRO_BATCHES,
    MTP_TYPES,
    TYPES,
    depth_case,
)
from bench.engine_figures import SHARES, Figures
from bench.interleave import Ratio
from hwmodel.plots import COLOURS, FONT, GREY, look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LLAMA = "llama.cpp default"
Series = Sequence[tuple[float, Ratio]]


def figures_of(f: Figures, source: str) -> Mapping[str, Figure]:
    """Every picture that there is data for, by file name; `source` is written on each."""
    drawers: dict[str, Callable[[Figures, str], Figure | None]] = {
        "by-type": _by_type,
        "depth": _depth,
        "threads": _threads,
        "drafts": _drafts,
        "micro-batch": _micro_batch,
    }
    with style():
        made = {name: draw(f, source) for name, draw in drawers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _new(source: str, panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    width = 6.4 if panels < 3 else 4.8
    figure = Figure(figsize=(width * panels, 4.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    figure.suptitle(source, fontsize=FONT - 4, color=GREY, x=0.01, ha="left")
    return figure, list(axes.flat)


def _by_type(f: Figures, source: str) -> Figure | None:
    """Decode and prefill by type for all arms, and the share of the bandwidth."""
    kinds = [k for k in TYPES if f.newest(f"decode-{k}") or f.newest(f"prefill-{k}")]
    if not kinds:
        return None
    figure, axes = _new(source, 3)
    labels = (ENGINE, LLAMA, "llama.cpp no-repack")
    for panel, what in zip(axes, ("decode", "prefill"), strict=False):
        for i, label in enumerate(labels):
            values = [f.speed(f"{what}-{k}", label) for k in kinds]
            _bars(panel, values, i, len(labels), label)
        panel.set_ylabel(f"{what}, tokens/s")
    for i, label in enumerate(labels):
        shares = [_scaled(f.share(f"decode-{k}", label)) for k in kinds]
        _bars(axes[2], shares, i, len(labels), label)
    for at, kind in enumerate(kinds):
        axes[2].plot([at - 0.42, at + 0.42], [100 * SHARES[kind]] * 2, color="black", linewidth=1.5,
                     linestyle="--", label="demanded share" if at == 0 else None)  # fmt: skip
    axes[2].set_ylabel("decode: share of read bandwidth, %")
    axes[2].set_ylim(0, 100)
    for panel, title in zip(
        axes, ("Decode, 64 tokens", "Prefill, 512 tokens", "Share of bandwidth"), strict=True
    ):
        panel.set_xticks(range(len(kinds)), [k.upper() for k in kinds])
        panel.set_title(title, loc="left", fontsize=FONT + 1)
        panel.grid(axis="x", visible=False)
        panel.set_axisbelow(True)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _scaled(value: Ratio | None) -> Ratio | None:
    if value is None:
        return None
    return Ratio(100 * value.value, 100 * value.low, 100 * value.high, value.rounds, value.coverage)


_HATCHES = ("", "//", "..")


def _bars(axes: Axes, values: Sequence[Ratio | None], index: int, of: int, label: str) -> None:
    width = 0.8 / of
    for at, value in enumerate(values):
        if value is None:
            continue
        x = at + (index - (of - 1) / 2) * width
        error = [[value.value - value.low], [value.high - value.value]]
        axes.bar(
            x, value.value, width * 0.94, yerr=error, capsize=3, color=COLOURS[index],
            hatch=_HATCHES[index % 3], edgecolor="white", ecolor="black",
            label=label if at == next(i for i, v in enumerate(values) if v) else None,
        )  # fmt: skip
        axes.annotate(
            f"{value.value:.0f}", (x, value.high), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=FONT - 2,
        )  # fmt: skip


def _line(axes: Axes, series: Series, index: int, label: str, dashed: bool = False) -> None:
    if not series:
        return
    colour, marker = look(index)
    xs = [x for x, _ in series]
    ys = [r.value for _, r in series]
    errors = [[r.value - r.low for _, r in series], [r.high - r.value for _, r in series]]
    axes.errorbar(
        xs, ys, yerr=errors, color=colour, marker=marker, markersize=7, capsize=3, label=label,
        linestyle="--" if dashed else "-", linewidth=1.6,
    )  # fmt: skip


def _series(f: Figures, case: str, labels: Sequence[tuple[float, str]]) -> Series:
    found = [(x, f.speed(case, label)) for x, label in labels]
    return [(x, r) for x, r in found if r is not None]


def _depth(f: Figures, source: str) -> Figure | None:
    """Tokens/s and milliseconds a token against depth."""
    if not any(f.newest(depth_case(kv)) for kv in KV_TYPES):
        return None
    figure, (left, right) = _new(source, 2)
    lines: list[tuple[str, Series]] = [
        (f"{ENGINE}, {kv} KV", _series(f, depth_case(kv), [(d, f"{ENGINE} d{d}") for d in DEPTHS]))
        for kv in KV_TYPES
    ]
    other = _series(f, "depth-llama", [(d, f"{LLAMA} d{d}") for d in LLAMA_DEPTHS])
    lines.append((f"{LLAMA}, f16 KV", other))
    for i, (label, series) in enumerate(lines):
        _line(left, series, i, label, dashed=label.startswith("llama"))
        _line(right, [(x, _inverse(r)) for x, r in series], i, label, label.startswith("llama"))
    left.set_xscale("symlog", linthresh=1024)
    _depth_ticks(left)
    left.set_ylim(0)
    left.set(xlabel="context depth, tokens (logarithmic from 1,024)", ylabel="decode, tokens/s")
    right.set(
        xlabel="context depth, thousand tokens", ylabel="time of one token, ms", ylim=(0, None)
    )
    right.xaxis.set_major_formatter(lambda v, _: f"{v / 1000:,.0f}")
    left.set_title("Q4_K_S slice: speed", loc="left", fontsize=FONT + 1)
    right.set_title("the same as time, linear axes", loc="left", fontsize=FONT + 1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _depth_ticks(axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xticks(DEPTHS, ["0", *(f"{round(d / 1024)}K" for d in DEPTHS[1:])])
    axes.xaxis.set_minor_locator(NullLocator())


def _inverse(r: Ratio) -> Ratio:
    return Ratio(1e3 / r.value, 1e3 / r.high, 1e3 / r.low, r.rounds, r.coverage)


def _threads(f: Figures, source: str) -> Figure | None:
    """Decode against threads, both engines."""
    kinds = [k for k in ("q4_0", "q4_k_s") if f.newest(f"threads-{k}")]
    if not kinds:
        return None
    figure, axes = _new(source, len(kinds))
    for panel, kind in zip(axes, kinds, strict=True):
        case = f"threads-{kind}"
        labels = {label for r in f.newest(case) for label in r.arms}
        for i, engine in enumerate((ENGINE, LLAMA)):
            mine = sorted(
                (float(label.rpartition(" t")[2]), label)
                for label in labels
                if label.startswith(engine + " t")
            )
            _line(panel, _series(f, case, mine), i, engine, dashed=i > 0)
            panel.set_xticks([x for x, _ in mine], [f"{x:.0f}" for x, _ in mine])
        panel.set(xlabel="threads", ylabel="decode, tokens/s", ylim=(0, None))
        panel.set_title(kind.upper(), loc="left", fontsize=FONT + 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _drafts(f: Figures, source: str) -> Figure | None:
    """Speed over no drafts against drafts a step, with what bytes allow."""
    models = [m for m in (*(f"{k}-mtp3" for k in MTP_TYPES), EMBEDDED) if f.newest(f"drafts-{m}")]
    if not models:
        return None
    figure, axes = _new(source, len(models))
    ticks = [*range(4), 4.2]
    for panel, model in zip(axes, models, strict=True):
        found = [(x, f.drafts(model, m)) for x, m in zip(ticks, DRAFTS, strict=True)]
        fixed = [(x, r) for x, r in found[:4] if r is not None]
        _line(panel, fixed, 0, "so many drafts in every step")
        _line(
            panel, [(x, r) for x, r in found[4:] if r is not None], 1, "as many as pay off (auto)"
        )
        rates = f.rates(model)
        bounds = [(k, b) for k in range(4) if (b := f.draft_bound(model, k, rates)) is not None]
        if model != EMBEDDED:
            panel.plot(
                [k for k, _ in bounds], [b for _, b in bounds], color=GREY, linestyle=":",
                linewidth=1.8, label="bound given by bytes",
            )  # fmt: skip
        panel.axhline(1, color="black", linewidth=0.9)
        panel.set_xticks(ticks, [*"0123", "auto"])
        top = max([1.0, *(b for _, b in bounds), *(r.high for _, r in found if r is not None)])
        panel.set(xlabel="drafts in a step", ylabel="speed over no drafts", ylim=(0, 1.1 * top))
        shown = "/".join(f"{p:.2f}".lstrip("0") for p in rates)
        kind = "real" if model == EMBEDDED else "simulated"
        name = "embedded model" if model == EMBEDDED else model.partition("-")[0].upper()
        panel.set_title(f"{name}\n{kind} acceptance {shown}", loc="left", fontsize=FONT)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _micro_batch(f: Figures, source: str) -> Figure | None:
    """Prefill against rows that run through the model at once."""
    case = "micro-batch-q4_0"
    series = _series(f, case, [(n, f"ub {n}") for n in MICRO_BATCHES])
    if not series:
        return None
    figure, (axes,) = _new(source, 1)
    _line(axes, series, 0, ENGINE)
    best = f.best_llama("prefill-q4_0")
    other = f.speed("prefill-q4_0", best) if best else None
    if other is not None:
        axes.axhline(other.value, color=COLOURS[1], linestyle="--", label=f"{best} (its 512)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(MICRO_BATCHES, [str(n) for n in MICRO_BATCHES])
    axes.set(xlabel="rows at once (micro-batch)", ylabel="prefill of 512, tokens/s", ylim=(0, None))
    axes.set_title("Q4_0 slice", loc="left", fontsize=FONT + 1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure

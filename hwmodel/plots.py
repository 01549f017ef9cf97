"""Pictures of the cost model: one style, and decode speed against context depth.

Figures are made without pyplot, so nothing global changes and no display is needed. Colours are
those of Okabe and Ito, which people with any colour vision tell apart; each also has a marker.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodel.errors import RequestError
from hwmodel.files import check_writable, write_whole
from hwmodel.predict import predict
from hwmodel.run import RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hwmodel.plan import Plan

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
FONT = 13  # points; legible when a figure is shown at half its width
GREY = "#666666"
STYLE: dict[str, Any] = {
    "font.size": FONT,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "hwmodel",
}


def style() -> Any:
    """The style as a context manager."""
    import matplotlib

    return matplotlib.rc_context(rc=STYLE)  # type: ignore[arg-type]


def look(index: int) -> tuple[str, str]:
    """Colour and marker of the n-th series; the pair repeats only after 63."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


@dataclass(frozen=True)
class DepthCurve:
    """Decode against depth of one configuration: prediction, band, limit, and measurements.

    `measured` holds (depth in tokens, tokens/s) pairs.
    """

    label: str
    run: RunConfig
    depths: tuple[int, ...]
    measured: tuple[tuple[float, float], ...] = ()


def depth_grid(most: int) -> tuple[int, ...]:
    """Depths from 0 to `most`, four to an octave from 512 on."""
    grid = {0, most}
    step = 0
    while (depth := round(512 * 2 ** (step / 4))) < most:
        grid.add(depth)
        step += 1
    return tuple(sorted(grid))


def draw_depth(axes: Axes, curves: Sequence[DepthCurve], roofline: bool = True) -> None:
    """Curves into one panel; the datasheet's limit of each is dashed above it."""
    import dataclasses

    for i, curve in enumerate(curves):
        colour, marker = look(i)
        found = []
        for depth in curve.depths:
            work = dataclasses.replace(curve.run.workload, depth=depth)
            found.append(predict(dataclasses.replace(curve.run, workload=work), "decode_tok_s"))
        shown = [(d, e) for d, e in zip(curve.depths, found, strict=True) if e.value is not None]
        x = [d for d, _ in shown]
        axes.fill_between(
            x, [e.low or 0.0 for _, e in shown], [e.high or 0.0 for _, e in shown],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
        axes.plot(x, [e.value or 0.0 for _, e in shown], color=colour, linewidth=2)
        if roofline:
            limits = [e.roofline or 0.0 for _, e in shown]
            axes.plot(x, limits, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.plot(
            [d for d, _ in curve.measured], [v for _, v in curve.measured], linestyle="none",
            marker=marker, color=colour, markersize=7, markeredgecolor="white",
            label=curve.label,
        )  # fmt: skip
    style_depth_axis(axes)


def style_depth_axis(axes: Axes) -> None:
    """Depth on a scale that is linear to 1K and logarithmic beyond, labelled in K tokens."""
    axes.set_xscale("symlog", base=2, linthresh=1024, linscale=0.5)
    ticks = [0, 1024, 4096, 16384, 65536, 262144]
    axes.set_xticks(ticks, ["0", "1K", "4K", "16K", "64K", "256K"], minor=False)
    axes.minorticks_off()
    axes.set_xlim(-200, 300_000)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the KV cache")


def draw_plan(plan: Plan, path: str) -> None:
    """Decode against depth of a plan, up to the longest context that fits, into one file.

    Raises:
        RequestError, OSError: no picture can be written there.
    """
    check_name(path)
    chosen = plan.chosen
    many = f"{chosen.count}x " if chosen.count > 1 else ""
    label = f"{chosen.run.quant.name} in {chosen.engine.title}"
    curve = DepthCurve(label, chosen.at(drafts=0), depth_grid(max(1, plan.max_context)))
    figure = depth_figure(
        [curve], f"{chosen.run.model.title} on {many}{chosen.device.title}", label
    )
    save_one(figure, Path(path))


def depth_figure(curves: Sequence[DepthCurve], title: str, source: str) -> Figure:
    """One panel of decode against depth, with what the lines mean and what was predicted."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        axes = figure.add_subplot()
        draw_depth(axes, curves)
        axes.set_ylabel("decode, tokens/s per sequence")
        axes.set_title(title, loc="left")
        axes.legend(handles=line_handles(), loc="best", fontsize=FONT - 2)
        figure.suptitle(source, fontsize=FONT - 3, color=GREY, x=0.01, ha="left")
        return figure


def line_handles() -> list[Any]:
    """Legend entries for what solid, shaded and dashed mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=GREY, linewidth=2, label="predicted"),
        Patch(color=GREY, alpha=0.25, label="its band"),
        Line2D([], [], color=GREY, linestyle=(0, (5, 3)), label="datasheet limit"),
    ]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg into a folder (made if need be); gives both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        save_one(figure, path)
    return paths


def save_one(figure: Figure, path: Path) -> None:
    """Write one picture, in the format that the file's name says."""
    data = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with style():
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(data, format=kind, dpi=110, metadata=metadata)
    write_whole(path, data.getvalue())


def blank(title: str, subtitle: str, size: tuple[float, float] = (9, 6.2)) -> tuple[Figure, Axes]:
    """A figure with one panel, its title and a small line above it; `size` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    figure.suptitle(subtitle, fontsize=FONT - 3, color=GREY, x=0.01, ha="left")
    return figure, axes


def fit_note() -> str:
    """What the predictions of a picture rest on."""
    from hwmodel.fit import load_fit

    fit = load_fit()
    return f"predicted; fit to {len(fit.runs)} published measurements, {fit.as_of}"


def plain_log(axes: Axes, *names: str) -> None:
    """Logarithmic axes whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        axis.set_minor_locator(NullLocator())


# Where a label may lie beside its point, in points, and which side of it is fixed; best first.
_PLACES = (
    ((9, 4), "left", "bottom"), ((9, -4), "left", "top"),
    ((-9, 4), "right", "bottom"), ((-9, -4), "right", "top"),
    ((0, 9), "center", "bottom"), ((0, -9), "center", "top"),
    ((9, 14), "left", "bottom"), ((9, -14), "left", "top"),
    ((-9, 14), "right", "bottom"), ((-9, -14), "right", "top"),
)  # fmt: skip


def label_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]
) -> None:
    """A label beside each point (in data coordinates), none on another or on a point.

    Call it when limits, scales and legends are set: places are chosen in pixels. Where there is no
    free place, the one with the fewest collisions is taken.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout
    size = 0.09 * figure.dpi  # about half a marker, in pixels
    inside = axes.get_window_extent()
    taken = [
        Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size)
        for x, y in axes.transData.transform(list(points))
    ]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for point, text in zip(points, labels, strict=True):
        label = axes.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize=FONT - 4
        )
        found: list[tuple[int, int]] = []
        boxes = []
        for i, (offset, side, edge) in enumerate(_PLACES):
            label.set(position=offset, ha=side, va=edge)
            box = label.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y1 > inside.y1
            found.append((sum(box.overlaps(b) for b in taken) + outside, i))
            boxes.append(box)
        offset, side, edge = _PLACES[min(found)[1]]
        label.set(position=offset, ha=side, va=edge)
        taken.append(boxes[min(found)[1]])


def check_name(path: str) -> None:
    """Refuse a file that no picture can be written to.

    Raises:
        RequestError: the name ends neither in .png nor in .svg, or its folder is missing.
        OSError: the folder may not be written to, or what has that name is no file.
    """
    if not path.endswith((".png", ".svg")):
        raise RequestError(f"the picture is {path!r}, expected a name that ends in .png or .svg")
    if not Path(path).resolve().parent.is_dir():
        raise RequestError(f"the folder of {path!r} does not exist")
    check_writable(Path(path))

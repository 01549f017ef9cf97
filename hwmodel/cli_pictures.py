"""`hwmodel roofline` and `hwmodel plot`."""

from __future__ import annotations

from typing import Any

import click

KINDS = ("depth", "memory", "ttft", "mtp", "cost", "roofline")


def _plan(device: str, model: str, ram: float | None, given: dict[str, Any]) -> Any:
    from hwmodel.catalogue import find_model
    from hwmodel.plan import make_plan
    from hwmodel.request import make_request

    return make_plan(make_request(device, find_model(model), ram_gb=ram, **given))


@click.command()
@click.option("--device", required=True, metavar="NAME|FILE", help="See 'hwmodel devices list'.")
@click.option("--count", type=int, metavar="N", help="N devices. [default: as few as serve]")
@click.option("--quant", metavar="TYPE|FILE", help="Only this type, or a checkpoint's sizes.")
@click.option("--engine", metavar="NAME", help="Only this engine.")
@click.option("--context", metavar="N",
              help="Deepest decode. [default: 32768, or the model's all]")  # fmt: skip
@click.option("--model", default="step-3.5-flash", metavar="NAME|FILE", help="Another model.")
@click.option("--plot", metavar="FILE", help="Draw it into a .png or .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def roofline(device: str, model: str, plot: str | None, as_json: bool, **given: Any) -> None:
    """Each phase of the model under the machine's roofs: operations per byte, and what is reached.

    \b
    Example:
      hwmodel roofline --device m4max --plot roofline.png
    """
    from pathlib import Path

    from hwmodel.cli_support import note, print_json
    from hwmodel.roofline import roofs, step_points

    if plot is not None:
        from hwmodel.plots import check_name

        check_name(plot)
    candidate = _plan(device, model, None, given).chosen
    points = step_points(candidate)
    bandwidth, peaks = roofs(candidate)
    if as_json:
        print_json(
            {
                "bandwidth_bytes_per_s": bandwidth,
                "flop_per_s": peaks,
                "points": [{**p.__dict__, "share": p.share} for p in points],
            }
        )
    else:
        click.echo(_roofline_text(candidate, points, bandwidth, peaks))
    if plot is not None:
        from hwmodel.pictures import roofline_picture
        from hwmodel.plots import save_one

        save_one(roofline_picture(candidate), Path(plot))
        note(f"wrote {plot}")


def _roofline_text(c: Any, points: Any, bandwidth: float, peaks: dict[str, float]) -> str:
    """What the candidate is, its roofs, and a row for each phase."""
    from hwmodel.cli_support import table
    from hwmodel.plan_view import figure

    header = ["phase", "FLOP per byte", "TFLOP/s", "roof TFLOP/s", "% of it", "ms", "limited by"]
    rows = [
        [
            p.name,
            f"{p.intensity:.1f}",
            f"{p.flop_per_s / 1e12:.3g}",
            f"{p.roof_flop_per_s / 1e12:.3g}",
            f"{100 * p.share:.0f}",
            figure(1e3 * p.seconds),
            p.limiting,
        ]
        for p in points
    ]
    shown = ", ".join(f"{d} {v / 1e12:,.0f} TFLOP/s" for d, v in peaks.items())
    return (
        f"{c.run.model.title} on {c.count}x {c.device.title}, {c.run.quant.name}\n"
        f"roofs: memory {bandwidth / 1e9:,.0f} GB/s, {shown}\n\n{table(header, rows)}"
    )


@click.command()
@click.argument("kind", type=click.Choice([*KINDS, "all"]))
@click.option(
    "--device", "devices", multiple=True, required=True, metavar="NAME|FILE",
    help="May be given several times.",
)  # fmt: skip
@click.option("--out", required=True, metavar="FILE|DIR", help="A .png or .svg; a folder for all.")
@click.option("--count", type=int, metavar="N", help="N of each device.")
@click.option("--quant", metavar="TYPE|FILE", help="Only this type, or a checkpoint's sizes.")
@click.option("--engine", metavar="NAME", help="Only this engine.")
@click.option("--ram", type=float, metavar="GB", help="Let experts live in host memory.")
@click.option("--context", metavar="N", help="Tokens to hold. [default: 32768, or the model's all]")
@click.option("--model", default="step-3.5-flash", metavar="NAME|FILE", help="Another model.")
@click.option("--json", "as_json", is_flag=True, help="Print the names of the files as JSON.")
def plot(
    kind: str, devices: tuple[str, ...], out: str, ram: float | None, model: str, as_json: bool,
    **given: Any,
) -> None:  # fmt: skip
    """Draw machines side by side: decode against depth, memory, first token, drafts, cost, roofs.

    \b
    Examples:
      hwmodel plot depth --device m4max --device dgx-spark --out depth.png
      hwmodel plot all --device m4max --device dgx-spark --device h100 --out pictures
    """
    from pathlib import Path

    from hwmodel.cli_support import note, print_json
    from hwmodel.devices import load_device
    from hwmodel.errors import RequestError
    from hwmodel.pictures import PICTURES
    from hwmodel.plots import check_name, save, save_one

    if kind != "all":
        check_name(out)
    elif Path(out).exists() and not Path(out).is_dir():
        raise RequestError(f"--out is {out!r}, a file; expected a folder for all pictures")
    plans = []
    for name in devices:
        host = None if load_device(name).unified else ram
        plans.append(_plan(name, model, host, given))
    written = []
    if kind == "all":
        for name, draw in PICTURES.items():
            try:
                figure = draw(plans)
            except RequestError as error:  # such as drafts of a model that has none
                note(f"no {name}: {error}")
            else:
                written += save(figure, Path(out), name)
    else:
        written.append(Path(out))
        save_one(PICTURES[kind](plans), written[0])
    for path in written:
        note(f"wrote {path}")
    if as_json:
        print_json({"written": [str(path) for path in written]})

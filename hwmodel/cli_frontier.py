"""`hwmodel frontier`."""

from __future__ import annotations

from typing import Any

import click

BUY = (
    "m4max", "m3-ultra", "dgx-spark", "ryzen-ai-max-395", "rtx3090", "rtx4090", "rtx5090",
    "rtx-pro-6000", "h100",
)  # fmt: skip
# Options of one of the two questions; beside the other they would change nothing.
_RACK_ALONE, _BUYING_ALONE = ("most", "engine", "rent"), ("budget", "ram")


@click.command()
@click.option(
    "--device", "devices", multiple=True, metavar="NAME",
    help="May be given several times. [default: nine common ones]",
)  # fmt: skip
@click.option("--rack", metavar="NAME", help="Many users on up to --most of this device instead.")
@click.option("--most", type=int, metavar="N", help="At most N devices (--rack). [default: 64]")
@click.option("--budget", type=float, metavar="USD", help="Machines that cost no more.")
@click.option("--context", metavar="N", help="Tokens to hold. [default: 32768, or the model's all]")
@click.option("--quant", metavar="TYPE", help="Only this type.")
@click.option("--engine", metavar="NAME", help="Only this engine (--rack).")
@click.option("--ram", type=float, metavar="GB", help="Host memory for experts beside cards.")
@click.option("--rent", type=float, metavar="USD", help="Rent of one device and hour (--rack).")
@click.option("--model", default="step-3.5-flash", metavar="NAME|FILE", help="Another model.")
@click.option("--plot", metavar="FILE", help="Draw it into a .png or .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def frontier(
    devices: tuple[str, ...], rack: str | None, model: str, context: str | None, plot: str | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Machines that none beats in price, speed and quality; or a rack's speed against its cost.

    \b
    Examples:
      hwmodel frontier --budget 12000
      hwmodel frontier --rack h100 --context 8K --quant fp8
    """
    from hwmodel.catalogue import find_model
    from hwmodel.cli_support import note, print_json
    from hwmodel.frontier import buying
    from hwmodel.frontier import rack as rack_of
    from hwmodel.frontier_view import offers_json, offers_text, rack_json, rack_text
    from hwmodel.plots import check_name

    if plot is not None:
        check_name(plot)
    _check_options(rack, {**given, "device": devices or None})
    shape = find_model(model)
    found: Any
    shown: Any
    if rack is not None:
        keys = ("engine", "quant", "most", "rent")
        wanted = {k: given[k] for k in keys if given[k] is not None}
        shown = rack_of(rack, shape, context, **wanted)
        found, text = rack_json(shown), rack_text(shown)
    else:
        wishes = (given["budget"], given["quant"], given["ram"])
        shown = buying(devices or BUY, shape, context, *wishes)
        found, text = offers_json(shown), offers_text(shown)
    if as_json:
        print_json(found)
    else:
        click.echo(text)
    if plot is not None:
        from hwmodel.frontier_pictures import draw_frontier

        draw_frontier(shown if rack is None else shown.points, plot)
        note(f"wrote {plot}")


def _check_options(rack: str | None, given: dict[str, Any]) -> None:
    from hwmodel.errors import RequestError

    idle = _RACK_ALONE if rack is None else ("device", *_BUYING_ALONE)
    for name in idle:
        if given[name] is not None:
            if rack is None:
                raise RequestError(f"--{name} belongs to --rack NAME, which is not given")
            raise RequestError(f"--{name} does not go with --rack; leave one of them out")

"""The command `hwmodel`: parses and prints; everything else is imported when it is used."""

from __future__ import annotations

from typing import Any

import click

from hwmodel.cli_support import SETTINGS, CommandGroup


@click.group(
    cls=CommandGroup,
    lazy={
        "devices": "hwmodel.cli_devices:devices",
        "engines": "hwmodel.cli_devices:engines",
        "compare": "hwmodel.cli_tables:compare",
        "sweep": "hwmodel.cli_tables:sweep",
        "explain": "hwmodel.cli_tables:explain",
        "plot": "hwmodel.cli_pictures:plot",
        "rivals": "hwmodel.cli_rivals:rivals",
        "roofline": "hwmodel.cli_pictures:roofline",
        "claims": "hwmodel.cli_claims:claims",
        "cost": "hwmodel.cli_jobs:cost",
        "frontier": "hwmodel.cli_frontier:frontier",
        "workload": "hwmodel.cli_jobs:workload",
    },
    context_settings=SETTINGS,
)
@click.version_option(package_name="step-flash-reference", prog_name="hwmodel")
def main() -> None:
    """What Step 3.5 Flash needs and how fast it runs: memory, speed, flags, and how sure.

    \b
    Example:
      hwmodel plan --device m4max
    """


@main.command()
@click.option("--device", required=True, metavar="NAME|FILE", help="See 'hwmodel devices list'.")
@click.option(
    "--model",
    default="step-3.5-flash",
    metavar="NAME|FILE",
    show_default=True,
    help="Another model: a name, its config.json, or a GGUF file of Step's architecture.",
)
@click.option(
    "--context",
    metavar="N",
    help="Tokens that one sequence may hold, such as 8192 or 128K. [default: 32768, or all that "
    "the model has]",
)
@click.option(
    "--min-decode",
    type=float,
    metavar="X",
    help="At least X tokens/s for each sequence when its context is full.",
)
@click.option("--max-price", type=float, metavar="USD", help="All devices together cost no more.")
@click.option(
    "--quant",
    metavar="TYPE|FILE",
    help="Only this type, such as Q4_K_S, FP8 or BF16, or the sizes of a GGUF file or folder.",
)
@click.option("--engine", metavar="NAME", help="Only this engine: llama.cpp, mlx, sglang, vllm.")
@click.option(
    "--count", type=int, metavar="N", help="N devices. [default: as few as serve, 1 to 8]"
)
@click.option(
    "--split",
    type=click.Choice(["layer", "tensor", "expert"]),
    help="How several devices share the model. [default: what is fastest]",
)
@click.option(
    "--ram",
    type=float,
    metavar="GB",
    help="Let experts live in so much host memory and, beyond it, on disk.",
)
@click.option("--host", metavar="NAME", help="Whose memory --ram is. [default: desktop-ddr5]")
@click.option(
    "--concurrency",
    type=int,
    default=1,
    metavar="N",
    show_default=True,
    help="Sequences decoded together.",
)
@click.option(
    "--stats",
    metavar="FILE",
    help="Acceptance of drafts and distinct experts as counted by 'refimpl stats --json'.",
)
@click.option("--plot", metavar="FILE", help="Draw decode against depth into a .png or .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def plan(
    ctx: click.Context,
    model: str,
    ram: float | None,
    plot: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Will it fit, how fast, with which command, and how sure.

    Exit code 0: it fits (if need be with the setting that is named); 1: it does not, or is slower
    or dearer than asked, and the closest is shown; 2: bad input.

    \b
    Examples:
      hwmodel plan --device m4max
      hwmodel plan --device rtx4090 --count 1 --ram 128
      hwmodel plan --device h100 --count 4 --quant fp8 --context 128K --json
      hwmodel plan --device h200 --count 8 --model deepseek-v3.2
    """
    from hwmodel.catalogue import find_model
    from hwmodel.cli_support import note, print_json
    from hwmodel.plan import make_plan
    from hwmodel.plan_json import plan_json
    from hwmodel.plan_view import plan_text
    from hwmodel.request import make_request

    if plot is not None:
        from hwmodel.plots import check_name

        check_name(plot)
    if given["quant"] is None and model.endswith(".gguf"):
        given["quant"] = model
    answer = make_plan(make_request(model=find_model(model), ram_gb=ram, **given))
    if as_json:
        print_json(plan_json(answer))
    else:
        click.echo(plan_text(answer))
    if plot is not None:
        from hwmodel.plots import draw_plan

        draw_plan(answer, plot)
        note(f"wrote {plot}")
    ctx.exit(0 if answer.holds else 1)

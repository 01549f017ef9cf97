"""`hwmodel compare`, `hwmodel sweep` and `hwmodel explain`."""

from __future__ import annotations

from typing import Any

import click

from hwmodel.cli_support import print_json, table

SWEEP_DEPTHS = (0, 2048, 8192, 32768, 131072)
_MODEL = click.option(
    "--model", default="step-3.5-flash", metavar="NAME|FILE", help="Another model."
)


@click.command()
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@click.option("--context", metavar="N", help="Tokens to hold. [default: 32768, or the model's all]")
@click.option("--quant", metavar="TYPE|FILE", help="Only this type, or a checkpoint's sizes.")
@click.option("--engine", metavar="NAME", help="Only this engine.")
@click.option("--count", type=int, metavar="N", help="N of each device.")
@_MODEL
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(devices: tuple[str, ...], model: str, as_json: bool, **given: Any) -> None:
    """Devices side by side, each with the plan that suits it.

    \b
    Example:
      hwmodel compare m4max dgx-spark rtx-pro-6000 ryzen-ai-max-395
    """
    from hwmodel.catalogue import find_model
    from hwmodel.plan_view import figure
    from hwmodel.request import make_request
    from hwmodel.tables import compare_devices, compare_row

    shape = find_model(model)
    plans = compare_devices([make_request(name, shape, **given) for name in devices])
    found = [compare_row(p) for p in plans]
    if as_json:
        print_json(found)
        return
    rows = [
        [
            f"{r['count']}x {r['device']}",
            _verdict(r),
            r["quant"],
            r["engine"],
            f"{r['max_context']:,}",
            figure(r["decode_short_tok_s"] or 0.0),
            figure(r["decode_full_tok_s"] or 0.0),
            figure(r["ttft_s"] or 0.0),
            f"{r['price_usd']:,.0f}" if r["price_usd"] else "",
            r["status"],
        ]
        for r in found
    ]
    full, prompt = found[0]["full_depth"], found[0]["prompt_tokens"]
    header = ["device", "fits", "quant", "engine", "max context", "tok/s short"]
    header += [f"tok/s at {full:,}", f"s to first of {prompt:,}", "devices $", "status"]
    click.echo(table(header, rows))


def _verdict(row: dict[str, Any]) -> str:
    if row["fits"]:
        return "yes"
    return "after setting" if row["holds"] else "no (nearest shown)"


def _numbers(text: str, option: str, model: Any) -> list[int]:
    from hwmodel.errors import RequestError
    from hwmodel.request import parse_context

    found = []
    for part in text.split(","):
        if part.strip() == "0":
            found.append(0)
            continue
        try:
            found.append(parse_context(part, model))
        except RequestError as error:
            raise RequestError(str(error).replace("--context", option)) from error
    return found


@click.command()
@click.option(
    "--device",
    "devices",
    multiple=True,
    required=True,
    metavar="NAME",
    help="May be given several times.",
)
@click.option(
    "--quant",
    "quants",
    multiple=True,
    metavar="TYPE|FILE",
    help="A type or a checkpoint's sizes; may be given several times.",
)
@click.option("--engine", metavar="NAME", help="Only this engine.")
@click.option("--count", type=int, metavar="N", help="N of each device.")
@click.option(
    "--depths",
    metavar="N,N,...",
    help="Tokens in the cache; prefill is given for prompts of these lengths. [default: 0, 2K, "
    "8K, 32K, 128K as far as the model goes]",
)
@click.option(
    "--drafts", default="0", metavar="N,N,...", show_default=True, help="Drafts per step."
)
@click.option(
    "--concurrency",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Sequences decoded together.",
)
@_MODEL
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of CSV.")
def sweep(
    devices: tuple[str, ...], quants: tuple[str, ...], depths: str | None, drafts: str,
    model: str, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Memory and speed over depths, quant types and devices, as tidy CSV on stdout.

    \b
    Example:
      hwmodel sweep --device m4max --device dgx-spark --depths 0,8K,64K
    """
    from hwmodel.catalogue import find_model
    from hwmodel.errors import RequestError
    from hwmodel.request import make_request
    from hwmodel.tables import SWEEP_COLUMNS, sweep_rows

    shape = find_model(model)
    where = [n for n in SWEEP_DEPTHS if n <= shape.max_context]
    if depths is not None:
        where = _numbers(depths, "--depths", shape)
    words = [d.strip() for d in drafts.split(",")]
    if not all(w in ("0", "1", "2", "3") for w in words):
        raise RequestError(f"--drafts is {drafts!r}, expected numbers from 0 to 3 such as 0,1,2")
    steps = [int(w) for w in words]
    found = []
    for device in devices:
        for quant in quants or (None,):
            request = make_request(device, shape, quant=quant, **given)
            found += list(sweep_rows(request, where, steps))
    if as_json:
        print_json(found)
        return
    click.echo(",".join(SWEEP_COLUMNS))
    for row in found:
        click.echo(",".join(_cell(row[c]) for c in SWEEP_COLUMNS))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if "," in text else text


@click.command()
@click.argument("figure", type=click.Choice(["memory", "decode", "prefill", "ttft"]))
@click.option("--device", required=True, metavar="NAME|FILE", help="See 'hwmodel devices list'.")
@click.option(
    "--depth",
    metavar="N",
    help="Tokens in the cache (decode, memory) or in the prompt (prefill, ttft). [default: 8192, "
    "or all that the model has]",
)
@click.option("--quant", metavar="TYPE|FILE", help="Only this type, or a checkpoint's sizes.")
@click.option("--engine", metavar="NAME", help="Only this engine.")
@click.option("--count", type=int, metavar="N", help="N devices.")
@click.option("--ram", type=float, metavar="GB", help="Let experts live in host memory.")
@click.option(
    "--drafts",
    type=click.IntRange(0, 3),
    default=0,
    show_default=True,
    metavar="N",
    help="Drafts per step.",
)
@click.option(
    "--concurrency",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Sequences decoded together.",
)
@_MODEL
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def explain(
    figure: Any, device: str, depth: str | None, ram: float | None, drafts: int, model: str,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Take a figure apart: its terms, the counts behind them, the sources of every number.

    \b
    Example:
      hwmodel explain decode --device m4max --depth 8192
    """
    from hwmodel.catalogue import find_model
    from hwmodel.errors import RequestError
    from hwmodel.explain import explain as take_apart
    from hwmodel.explain import explanation_json
    from hwmodel.explain_view import explanation_text
    from hwmodel.request import make_request
    from hwmodel.search import choose, closest

    shape = find_model(model)
    tokens = min(8192, shape.max_context)
    if depth is not None:
        tokens = _numbers(depth, "--depth", shape)[0]
    request = make_request(device, shape, context=max(1, tokens), ram_gb=ram, **given)
    candidate = choose(request) or closest(request)
    if candidate is None:
        raise RequestError(f"nothing that {request.device.name} offers holds the model")
    found = take_apart(candidate, figure, tokens, drafts)
    if as_json:
        print_json(explanation_json(found))
    else:
        click.echo(explanation_text(found))

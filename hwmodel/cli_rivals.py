"""`hwmodel rivals`."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.option(
    "--sliding",
    type=click.Choice(["window", "full"]),
    default="window",
    show_default=True,
    help="What caches of sliding layers hold.",
)
@click.option(
    "--links",
    type=click.Choice(["domain", "network"]),
    default="network",
    show_default=True,
    help="How machines exchange: over their network, or as inside one (hidden).",
)
@click.option(
    "--attention",
    type=click.Choice(["split", "machine", "card"]),
    default="card",
    show_default=True,
    help="What a sequence's attention is spread over, on more than 8 cards.",
)
@click.option("--device", metavar="NAME|FILE", help="The card. [default: h100]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def rivals(sliding: str, links: str, attention: str, device: str | None, as_json: bool) -> None:
    """The vendor's relative decoding cost at 128K on Hopper, recomputed under stated assumptions.

    Cost is device time per token, at the largest batch that keeps the stated speed. The vendor
    estimated its figures too, and says neither which Hopper card nor where attention lies.

    \b
    Examples:
      hwmodel rivals
      hwmodel rivals --device h200 --attention machine
      hwmodel rivals --sliding full
    """
    from hwmodel.cli_support import print_json, table
    from hwmodel.plan_view import figure
    from hwmodel.rivals import compare_rivals

    found = compare_rivals(sliding, links, device, attention)
    if as_json:
        print_json(_json(found))
        return
    header = ["model", "cards", "drafts", "stated tok/s", "alone tok/s", "batch", "kept back by"]
    header += ["cost stated", "cost computed", "status"]
    rows = []
    for r in found.rivals:
        point = r.found
        rows.append(
            [
                r.title,
                str(r.devices),
                str(r.drafts),
                figure(r.stated_tok_s),
                figure(r.alone.tok_s),
                str(point.batch) if point else "-",
                point.limited_by if point else "does not run so",
                f"{r.stated_relative:.1f}",
                f"{r.relative:.1f}" if r.relative else "-",
                point.decode.status if point else "-",
            ]
        )
    click.echo(f"decode at {found.depth:,} tokens; {'; '.join(found.assumptions)}\n")
    click.echo(table(header, rows))
    click.echo(f"\nstated: {found.source}")


def _json(found: Any) -> dict[str, Any]:
    return {
        "depth": found.depth,
        "assumptions": list(found.assumptions),
        "source": found.source,
        "rivals": [
            {
                "model": r.title,
                "devices": r.devices,
                "drafts": r.drafts,
                "stated_tok_s": r.stated_tok_s,
                "alone_tok_s": r.alone.tok_s,
                "batch": r.found.batch if r.found else None,
                "tok_s": r.found.tok_s if r.found else None,
                "limited_by": r.found.limited_by if r.found else None,
                "device_s_per_token": r.found.device_s_per_token if r.found else None,
                "stated_relative_cost": r.stated_relative,
                "relative_cost": r.relative,
                "status": r.found.decode.status if r.found else "declined",
            }
            for r in found.rivals
        ],
    }

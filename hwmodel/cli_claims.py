"""`hwmodel claims`."""

from __future__ import annotations

import click


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option("--markdown", metavar="FILE|-", help="Write a report of them; '-' prints it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def claims(ids: tuple[str, ...], markdown: str | None, as_json: bool) -> None:
    """What articles and the model card claim, each beside what the cost model computes.

    The exit code is 0 whatever the verdicts.

    \b
    Examples:
      hwmodel claims C14 C16
      hwmodel claims --markdown reports/claims.md
    """
    from pathlib import Path

    from hwmodel.claims.check import check_claims, claims_json, claims_markdown, claims_text
    from hwmodel.cli_support import note, print_json
    from hwmodel.errors import RequestError
    from hwmodel.files import write_whole

    if markdown == "-" and as_json:
        raise RequestError("--markdown - and --json would both print; leave one of them out")
    found = check_claims(ids)
    if markdown == "-":
        click.echo(claims_markdown(found), nl=False)
    elif markdown is not None:
        write_whole(Path(markdown), claims_markdown(found).encode())
        note(f"wrote {markdown}")
    if as_json:
        print_json(claims_json(found))
    elif markdown is None:
        click.echo(claims_text(found))

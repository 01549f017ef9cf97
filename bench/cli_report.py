"""`bench report`."""

from __future__ import annotations

from pathlib import Path

import click

from hwmodel.cli_support import note, print_json


@click.command()
@click.option("--out", default="reports/validation.md", show_default=True, metavar="FILE",
              help="The report; its pictures and tables go into compare/ beside it.")  # fmt: skip
@click.option("--loop", metavar="DIR", help="Folder of the local loop. [default: loop beside it]")
@click.option(
    "--engine", metavar="DIR", help="Rounds of the CPU engine. [default: cpu_engine beside it]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def report(out: str, loop: str | None, engine: str | None, as_json: bool) -> None:
    """Write the validation report: text, pictures, and the tables behind them.

    From the published runs, the shipped fit, and what is measured under reports/; the same data
    give the same bytes.

    \b
    Example:
      bench report --out reports/validation.md
    """
    from bench.report import write_report

    path = Path(out)
    beside = path.parent
    written = write_report(
        path,
        Path(loop) if loop else beside / "loop",
        Path(engine) if engine else beside / "cpu_engine",
    )
    if as_json:
        import json

        comparison = next(p for p in written if p.name == "comparison.json")
        print_json(json.loads(comparison.read_text(encoding="utf-8"))["summary"])
    for file in written:
        note(f"wrote {file}")

"""`bench import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.runs import RunRecord

_MOST_DRAFTS = 64


def _drafts(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """`none` or a number of drafts, as the column of the CSV has it."""
    if value not in ("", "none") and not (value.isdecimal() and int(value) <= _MOST_DRAFTS):
        raise click.BadParameter(f"{value!r}, expected none or 0 to {_MOST_DRAFTS}", ctx, param)
    return value


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--out", metavar="FILE", help="The tidy CSV to write. [default: stdout]")
@click.option("--append", is_flag=True, help="Keep the runs that --out already holds.")
@click.option("--model", default="", metavar="NAME", help="Where the file does not say it.")
@click.option("--quant", default="", metavar="TYPE", help="Type of the weights.")
@click.option("--device", default="", metavar="NAME", help="What it ran on.")
@click.option(
    "--count", "n_devices", type=click.IntRange(1, 100_000), metavar="N", help="How many of them."
)
@click.option("--engine", default="", metavar="NAME", help="What ran it.")
@click.option("--engine-version", default="", metavar="TEXT", help="Its version or build.")
@click.option("--backend", default="", metavar="NAME", help="cuda, metal, cpu, ...")
@click.option("--mtp", default="", callback=_drafts, metavar="N", help="Drafts per step.")
@click.option("--source", "source_url", default="", metavar="URL", help="Where it is published.")
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON instead of CSV.")
def import_command(
    files: tuple[str, ...], out: str | None, append: bool, as_json: bool, **stated: Any
) -> None:
    """Bring runs of other tools into the tidy CSV that `bench compare --runs` reads.

    Known by content: llama-bench (table, CSV, JSON, JSON lines), llama-batched-bench (table, JSON
    lines), 'vllm bench serve' JSON, SGLang bench_serving JSON lines, the tidy CSV. Fields that no
    column takes are kept.

    \b
    Examples:
      llama-bench -m model.gguf -o json | bench import - --device m4max --out my-machine.csv
      bench compare --runs my-machine.csv --out pictures
    """
    from pathlib import Path

    from bench.importers.read import added, import_runs, renumbered
    from bench.importers.table import Stated
    from bench.runs import read_runs, write_runs
    from hwmodel.cli_support import counted, note, print_json
    from hwmodel.errors import RunFileError
    from hwmodel.files import check_writable, write_whole

    if append and not out:
        raise RunFileError("--append needs --out FILE")
    if out:
        if any(Path(f).exists() and Path(out).exists() and Path(f).samefile(out) for f in files):
            raise RunFileError(f"--out {out} is a file to import; choose another name")
        check_writable(Path(out))
    found: list[RunRecord] = []
    for name in files:
        imported = import_runs(name, Stated(**stated))
        note(f"{name}: {imported.format}, {counted(len(imported.records), 'run')}")
        for problem in imported.problems:
            note(problem)
        found += imported.records
    if append and out and Path(out).exists():
        old = read_runs(out)[0]
        new = added(old, found)
        if len(new) < len(found):
            note(f"{counted(len(found) - len(new), 'run')} in {out} already")
        found = old + new
    records = renumbered(found)
    if out:
        write_whole(Path(out), write_runs(records).encode())
        note(f"wrote {out}: {counted(len(records), 'run')}")
    if as_json:
        print_json([r.row() for r in records])
    elif not out:
        click.echo(write_runs(records), nl=False)

"""`bench probe`: this host as a device file."""

from __future__ import annotations

from pathlib import Path

import click

from hwmodel.cli_support import note, print_json


@click.command()
@click.option("--threads", type=click.IntRange(1, 256), metavar="N",
              help="Most threads to measure with. [default: physical cores]")  # fmt: skip
@click.option("--disk", default=".", show_default=True, metavar="DIR",
              help="Folder on the disk to measure, best that of the models.")  # fmt: skip
@click.option("--no-disk", is_flag=True, help="Leave the disk out.")
@click.option("--out", metavar="FILE",
              help="The device file. [default: local.toml in your device folder]")  # fmt: skip
@click.option("--force", is_flag=True, help="Write the file though the machine is busy.")
@click.option("--json", "as_json", is_flag=True, help="Print every sample as JSON.")
@click.pass_context
def probe(
    ctx: click.Context, threads: int | None, disk: str, no_disk: bool, out: str | None,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure this host into the device file that --device local reads.

    Read bandwidth for 1 to N threads beyond every cache, and of all within the last cache, matrix
    products by type, start and barrier of threads, the disk in order and expert by expert, cold
    and warm; medians with quartiles, in less than a minute. A busy machine is told so, and no file
    is written (exit code 1) unless --force is given.

    \b
    Examples:
      bench probe
      bench probe --disk /models --out my-box.toml
      hwmodel plan --device local
    """
    from bench.probe import probe_host
    from bench.probe_file import write_device
    from hwmodel.devices import user_folder
    from hwmodel.errors import RequestError
    from refimpl.cli_support import progress_bar
    from refimpl.engine.threads import default_threads

    folder = None if no_disk else Path(disk)
    if folder is not None and not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; --disk names one on the disk to measure")
    path = Path(out) if out else user_folder() / "local.toml"
    with progress_bar("measuring") as move:
        found = probe_host(threads or default_threads(), folder, note, move)
    for remark in found.remarks:
        note(remark)
    if as_json:
        print_json({
            "threads": found.threads, "seconds": found.seconds, "state": found.state,
            "doubts": found.doubts, "remarks": found.remarks,
            "figures": {f.key: f.json() for f in found.figures},
        })  # fmt: skip
    else:
        click.echo(_table(found.figures))
    for doubt in found.doubts:
        note(f"busy: {doubt}")
    if found.doubts and not force:
        note("no device file was written: stop other programs and probe again, or give --force")
        ctx.exit(1)
    write_device(found, path)
    name = "local" if out is None else path
    note(f"wrote {path} ({found.seconds:.0f} s); try: hwmodel plan --device {name}")


def _table(figures: object) -> str:
    from bench.probe import Figure, line
    from hwmodel.cli_support import table

    rows = []
    for f in figures:  # type: ignore[attr-defined]
        assert isinstance(f, Figure)
        name, _, rest = line(f).partition(": ")
        value, _, spread = rest.partition(" (")
        rows.append((name, value, spread.rstrip(")"), f"{f.spread:.1%}", f.note))
    return table(("what", "median", "quartiles", "spread", "how"), rows)

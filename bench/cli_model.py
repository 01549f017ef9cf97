"""`bench calibrate` and `bench compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hwmodel.cli_support import note, print_json

if TYPE_CHECKING:
    from bench.runs import RunRecord
    from hwmodel.fit import Fit


_DEFAULT_OUT = "reports/compare"


@click.command()
@click.option(
    "--runs", multiple=True, metavar="FILE",
    help="CSV of runs, '-' for stdin, 'published' for the shipped ones; may be given several "
    "times. [default: published]",
)  # fmt: skip
@click.option("--device", metavar="NAME", help="Only rows of this device.")
@click.option("--model", metavar="NAME", help="Only rows of this model.")
@click.option("--fit", "fit_file", metavar="FILE", help="Fit to predict with. [default: shipped]")
@click.option("--json", "json_out", metavar="FILE|-", help="Write the comparison as one object.")
@click.option("--out", metavar="DIR", help="Write the table and the plots into this folder.")
def compare(
    runs: tuple[str, ...], device: str | None, model: str | None, fit_file: str | None,
    json_out: str | None, out: str | None,
) -> None:  # fmt: skip
    """Predicted beside measured: coverage and errors by device and engine, and five plots.

    Without any option the published runs are compared and drawn into reports/compare; with some,
    plots are drawn where --out says. Exit code 0 whenever the comparison could be made, however
    far off it is.

    \b
    Examples:
      bench compare
      bench compare --device m4max
      bench compare --runs published --runs my-runs.csv --out pictures
      bench compare --runs my-runs.csv --json - | less
    """
    from bench.compare import compare as beside
    from bench.compare_view import comparison_text

    names = runs or (_PUBLISHED,)
    if not (runs or device or model or fit_file or json_out):
        out = out or _DEFAULT_OUT
    _check_outputs(json_out, out)
    records = _read(names, device, model)
    fit = _fit(fit_file)
    result = beside(records, fit)
    if json_out == "-":
        print_json(result)
    else:
        click.echo(comparison_text(result))
        if json_out:
            _write(Path(json_out), result)
    if out:
        from bench.compare_files import write_comparison

        for path in write_comparison(Path(out), records, result, fit, _source_names(names)):
            note(f"wrote {path}")


def _check_outputs(json_out: str | None, out: str | None) -> None:
    from hwmodel.errors import RequestError
    from hwmodel.files import check_writable

    if json_out and json_out != "-":
        check_writable(Path(json_out))
    if out and Path(out).exists() and not Path(out).is_dir():
        raise RequestError(f"--out is {out!r}, a file; expected a folder for table and plots")


_PUBLISHED = "published"


def _source_names(names: tuple[str, ...]) -> str:
    shown = {_PUBLISHED: "published_runs.csv", "-": "standard input"}
    return ", ".join(shown.get(n, Path(n).name) for n in names)


def _read(names: tuple[str, ...], device: str | None, model: str | None) -> list[RunRecord]:
    from bench.compare import known_name
    from bench.runs import published_runs_path, read_runs
    from hwmodel import names as registry
    from hwmodel.devices import is_own
    from hwmodel.errors import RunFileError, UnknownNameError

    records: list[RunRecord] = []
    wishes: tuple[tuple[registry.Kind, str | None], ...] = (("device", device), ("model", model))
    for file in names:
        found, problems = read_runs(published_runs_path() if file == _PUBLISHED else file)
        records += found
        for problem in problems:
            note(problem)
    for kind, wanted in wishes:
        if wanted is None:
            continue
        name = known_name(kind, wanted)
        if registry.canonical(kind, name) is None and not (kind == "device" and is_own(wanted)):
            raise UnknownNameError(kind, wanted, registry.suggest(kind, wanted))
        records = [r for r in records if known_name(kind, getattr(r, kind)) == name]
        if not records:
            shown = _source_names(names)
            raise RunFileError(f"no row of {shown} is of the {kind} {name}")
    return records


def _fit(path: str | None) -> Fit:
    from hwmodel.fit import load_fit

    return load_fit(Path(path)) if path else load_fit()


def _write(path: Path, value: Any) -> None:
    from hwmodel.files import write_whole

    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _compare_structure(records: list[RunRecord], file: str, as_json: bool) -> None:
    from bench.structure import compare_structure, structure_json
    from bench.structure_view import structure_markdown, structure_text, summary
    from hwmodel.files import check_writable, write_whole

    if file != "-":
        check_writable(Path(file))
    pairs = compare_structure(records)
    if as_json:
        print_json(structure_json(pairs))
    elif file == "-":
        click.echo(structure_text(pairs))
    else:
        click.echo(summary(pairs))
    if file != "-":
        write_whole(Path(file), structure_markdown(pairs).encode())
        note(f"wrote {file}")


def _date(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    import re

    if value is not None and not re.fullmatch(r"\d{4}-(0\d|1[0-2])(-[0-3]\d)?", value):
        raise click.BadParameter(f"'{value}' is no date such as 2026-11-22", ctx, param)
    return value


@click.command()
@click.option(
    "--runs", metavar="FILE", help="CSV of runs, '-' for stdin. [default: published runs]"
)
@click.option("--out", metavar="FILE", help="Where the fit goes. [default: the shipped fit]")
@click.option(
    "--as-of",
    metavar="DATE",
    callback=_date,
    help="Date of the runs, 2026-11 or 2026-11-22, kept in the file. [default: today]",
)
@click.option("--force", is_flag=True, help="Replace a better fit.")
@click.option(
    "--compare-structure", "structure", metavar="FILE|-",
    help="Write no fit: compare errors of other models described by structure and by totals "
    "alone, as Markdown into FILE ('-': as text).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def calibrate(
    runs: str | None, out: str | None, as_of: str | None, force: bool, structure: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit the cost model to measured runs, with errors on runs that the fit never saw.

    Sweeps, devices and models are left out whole; a fit that is worse than the one it would
    replace is refused (exit code 1) unless --force is given.

    \b
    Examples:
      bench calibrate --runs my-runs.csv --out my-fit.json
      bench calibrate --compare-structure reports/structure.md
    """
    import datetime

    from bench.calibrate import calibrate as fit_to
    from bench.calibrate import worse
    from bench.compare_view import errors_text
    from hwmodel.files import check_writable
    from hwmodel.fit import load_fit, published_path, to_json

    records = _read((runs or _PUBLISHED,), None, None)
    if structure is not None:
        _compare_structure(records, structure, as_json)
        return
    path = Path(out) if out else published_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    fit = fit_to(records, as_of or datetime.date.today().isoformat())
    if as_json:
        print_json(fit.errors)
    else:
        click.echo(errors_text(fit))
    if path.is_file() and not force:
        problem = worse(fit, load_fit(path))
        if problem:
            note(f"{path} is kept: {problem}; --force replaces it")
            click.get_current_context().exit(1)
    _write(path, to_json(fit))
    note(f"wrote {path}")

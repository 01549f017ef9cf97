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


@click.command()
@click.option(
    "--runs", metavar="FILE", help="CSV of runs, '-' for stdin. [default: published runs]"
)
@click.option("--device", metavar="NAME", help="Only rows of this device.")
@click.option("--model", metavar="NAME", help="Only rows of this model.")
@click.option("--fit", "fit_file", metavar="FILE", help="Fit to predict with. [default: shipped]")
@click.option("--json", "json_out", metavar="FILE|-", help="Write the comparison as one object.")
@click.option("--out", metavar="DIR", help="Write the table and the two plots into this folder.")
def compare(
    runs: str | None, device: str | None, model: str | None, fit_file: str | None,
    json_out: str | None, out: str | None,
) -> None:  # fmt: skip
    """Predicted beside measured: coverage and errors by device and engine, and two plots.

    Exit code 0 whenever the comparison could be made, however far off it is.

    \b
    Examples:
      bench compare --device m4max
      bench compare --runs my-runs.csv --json - | less
      bench compare --out reports/compare
    """
    from bench.compare import compare as beside
    from bench.compare_view import comparison_text
    from bench.runs import published_runs_path

    path = runs or str(published_runs_path())
    records = _read(path, device, model)
    fit = _fit(fit_file)
    result = beside(records, fit)
    if json_out == "-":
        print_json(result)
    else:
        click.echo(comparison_text(result))
        if json_out:
            _write(Path(json_out), result)
    if out:
        _draw(Path(out), records, result, fit, "published_runs.csv" if not runs else path)


def _read(path: str, device: str | None, model: str | None) -> list[RunRecord]:
    from bench.runs import read_runs
    from hwmodel import names
    from hwmodel.errors import RunFileError, UnknownNameError

    records, problems = read_runs(path)
    for problem in problems:
        note(problem)
    for kind, wanted in (("device", device), ("model", model)):
        if wanted is None:
            continue
        name = names.canonical(kind, wanted)  # type: ignore[arg-type]
        if name is None:
            raise UnknownNameError(kind, wanted, names.suggest(kind, wanted))  # type: ignore[arg-type]
        records = [r for r in records if _is(kind, getattr(r, kind), name.id)]
        if not records:
            raise RunFileError(f"no row of {path} is of the {kind} {name.id}")
    return records


def _is(kind: Any, text: str, wanted: str) -> bool:
    from hwmodel import names

    found = names.canonical(kind, text)
    return found is not None and found.id == wanted


def _fit(path: str | None) -> Fit:
    from hwmodel.fit import load_fit

    return load_fit(Path(path)) if path else load_fit()


def _write(path: Path, value: Any) -> None:
    from hwmodel.files import write_whole

    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _draw(
    folder: Path, records: list[RunRecord], result: dict[str, Any], fit: Fit, name: str
) -> None:
    from bench.compare_view import comparison_text
    from bench.plots import depth_figure, scatter_figure
    from hwmodel.files import write_whole
    from hwmodel.plots import save

    basis = f"fit of {fit.as_of or 'unknown date'} to {len(fit.runs)} figures"
    source = f"measured: {Path(name).name}; predicted: hwmodel, {basis if fit.runs else 'priors'}"
    written = save(scatter_figure(result["rows"], source), folder, "predicted-measured")
    written += save(depth_figure(records, source), folder, "decode-depth")
    text = folder / "table.txt"
    write_whole(text, (comparison_text(result) + "\n").encode())
    _write(folder / "comparison.json", result)
    for path in [*written, text, folder / "comparison.json"]:
        note(f"wrote {path}")


@click.command()
@click.option(
    "--runs", metavar="FILE", help="CSV of runs, '-' for stdin. [default: published runs]"
)
@click.option("--out", metavar="FILE", help="Where the fit goes. [default: the shipped fit]")
@click.option(
    "--as-of", metavar="DATE", help="Date of the runs, kept in the file. [default: today]"
)
@click.option("--force", is_flag=True, help="Replace a better fit.")
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def calibrate(
    runs: str | None, out: str | None, as_of: str | None, force: bool, as_json: bool
) -> None:
    """Fit the cost model to measured runs, with errors on runs that the fit never saw.

    Sweeps, devices and models are left out whole; a fit that is worse than the one it would
    replace is refused (exit code 1) unless --force is given.

    \b
    Example:
      bench calibrate --runs my-runs.csv --out my-fit.json
    """
    import datetime

    from bench.calibrate import calibrate as fit_to
    from bench.calibrate import worse
    from bench.compare_view import errors_text
    from bench.runs import published_runs_path
    from hwmodel.fit import load_fit, published_path, to_json

    records = _read(runs or str(published_runs_path()), None, None)
    fit = fit_to(records, as_of or datetime.date.today().isoformat())
    if as_json:
        print_json(fit.errors)
    else:
        click.echo(errors_text(fit))
    path = Path(out) if out else published_path()
    if path.is_file() and not force:
        problem = worse(fit, load_fit(path))
        if problem:
            note(f"{path} is kept: {problem}; --force replaces it")
            click.get_current_context().exit(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, to_json(fit))
    note(f"wrote {path}")

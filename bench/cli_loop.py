"""`bench loop`: predict this host from a few measurements, measure the rest, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bench.cli_engine import patience_option
from hwmodel.cli_support import CommandGroup, note, print_json

_data = click.option(
    "--data", default="reports/loop", show_default=True, metavar="DIR", help="Folder of its files."
)
_models = click.option(
    "--models", default="checkpoints/slices", show_default=True, metavar="DIR",
    help="Folder of the models; those that are missing are written there (17 GB in all).",
)  # fmt: skip
_threads = click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N",
    help="Threads of all engines [default: physical cores].",
)  # fmt: skip
_probe = click.option("--probe", is_flag=True, help="The probe's points, not those outside it.")
_only = click.option(
    "--only", multiple=True, metavar="CASE",
    help="Only points of this model (q4_0, mini-q8_0), or what takes long of it ('q4_0 deep').",
)  # fmt: skip


@click.group(cls=CommandGroup)
def loop() -> None:
    """Predict this host from a few measurements, commit that, measure the rest, compare.

    \b
    Example, from nothing to the comparison:
      bench probe
      bench loop prepare
      bench loop probe
      bench loop measure --probe
      bench loop predict
      git add reports/loop && git commit -m 'Predictions for this host'
      bench loop measure
      bench loop compare
      bench loop fit
    """


@loop.command()
@_models
@_threads
@_only
def prepare(models: str, threads: int | None, only: tuple[str, ...]) -> None:
    """Write the models that are missing and compile the kernels; list the points.

    What takes long and is not measured: do it before the machine is quiet.

    \b
    Example:
      bench loop prepare --models slices
    """
    from bench.engine_run import warm_up
    from bench.loop_points import make
    from hwmodel.cli_support import table

    for name in make(Path(models), _names(only)):
        note(f"wrote {Path(models) / name}")
    found = [c for probe in (True, False) for c in _cases(models, threads, only, probe)]
    for line in warm_up(found, Path()):
        note(line)
    rows = [(c.name, e.label) for c in found for e in c.entries]
    click.echo(table(("case", "point"), rows))


@loop.command()
@_data
@_threads
@click.option(
    "--device-file", metavar="FILE",
    help="Written by bench probe. [default: local.toml in your device folder]",
)  # fmt: skip
def probe(data: str, threads: int | None, device_file: str | None) -> None:
    """Keep the device file of 'bench probe' with the loop, and measure the last cache.

    \b
    Example:
      bench probe && bench loop probe
    """
    from bench.loop_run import PROBE, write_probe
    from hwmodel.devices import user_folder
    from hwmodel.errors import RequestError
    from refimpl.engine.threads import default_threads

    path = Path(device_file) if device_file else user_folder() / "local.toml"
    if not path.is_file():
        raise RequestError(f"{path}: no such file; write it with 'bench probe', or name another")
    found = write_probe(Path(data), path, threads or default_threads())
    click.echo(f"last cache: {found['cache_bytes_per_s'] / 1e9:.1f} GB/s")
    note(f"wrote {Path(data) / PROBE}")


@loop.command()
@_data
@_models
@_threads
@_probe
@_only
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Rounds of each case; they are added to those that are there.")  # fmt: skip
@click.option("--llama-bench", metavar="PATH",
              help="llama-bench [default: on the PATH, else llama-cpp-python].")  # fmt: skip
@click.option("--no-llama", is_flag=True, help="Leave llama.cpp out.")
@patience_option
def measure(
    data: str, models: str, threads: int | None, probe: bool, only: tuple[str, ...], rounds: int,
    llama_bench: str | None, no_llama: bool, patience: float | None,
) -> None:  # fmt: skip
    """Measure points in interleaved rounds, the engines by turns, memory probed beside each.

    Points outside the probe are measured only once predictions are written. Each finished round
    is kept at once; further calls go on from there. Where others use the memory too, --patience
    waits for moments in which they do not, and measures again what was disturbed.

    \b
    Examples:
      bench loop measure --probe --rounds 3
      bench loop measure --patience 60
      bench loop measure --only q4_k_s --rounds 2
    """
    from bench.cli_engine import _llama
    from bench.engine_run import measure_cases
    from bench.loop_points import make
    from bench.loop_run import PREDICTIONS, probed_bandwidth
    from hwmodel.errors import RequestError
    from refimpl.engine.threads import default_threads

    if not probe and not (Path(data) / PREDICTIONS).is_file():
        raise RequestError(f"{data} holds no predictions yet; write them first: bench loop predict")
    found = _cases(models, threads, only, probe)
    runners = {} if no_llama else {"default": _llama(llama_bench, None)["default"]}
    for name in make(Path(models), _names(only)):
        note(f"wrote {Path(models) / name}")
    best = 0.0 if patience is None else probed_bandwidth(Path(data))
    measure_cases(
        found, Path(), Path(data), threads or default_threads(), rounds, runners, note, patience,
        best,
    )  # fmt: skip


@loop.command()
@_data
@_models
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def predict(data: str, models: str, as_json: bool) -> None:
    """Fit this host to the probe's points and write the predictions of all others.

    \b
    Example:
      bench loop predict && git add reports/loop && git commit -m 'Predictions for this host'
    """
    from bench.engine_run import all_rounds
    from bench.loop_run import PREDICTIONS, write_predictions
    from bench.loop_view import predictions_text

    made = write_predictions(Path(data), Path(models), all_rounds(Path(data)))
    if as_json:
        print_json(made)
    else:
        click.echo(predictions_text(made))
    note(f"wrote {Path(data) / PREDICTIONS}; commit it before anything else is measured")


@loop.command()
@_data
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(data: str, as_json: bool) -> None:
    """Predictions as they were written beside what was measured, with errors by engine.

    \b
    Example:
      bench loop compare
    """
    from bench.engine_run import all_rounds
    from bench.loop_run import COMPARISON, compare_loop, write
    from bench.loop_view import comparison_csv, comparison_text, loop_figure
    from hwmodel.files import write_whole
    from hwmodel.plots import save

    folder = Path(data)
    found = compare_loop(folder, all_rounds(folder))
    if as_json:
        print_json(found)
    else:
        click.echo(comparison_text(found))
    write(folder / COMPARISON, found)
    write_whole(folder / "comparison.csv", comparison_csv(found).encode())
    for path in [folder / COMPARISON, folder / "comparison.csv",
                 *save(loop_figure(found), folder, "loop")]:  # fmt: skip
        note(f"wrote {path}")


@loop.command()
@_data
@_models
@click.option("--out", metavar="FILE",
              help="File to write. [default: local.fit.json in your device folder]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def fit(data: str, models: str, out: str | None, as_json: bool) -> None:
    """Fit this host's efficiencies to all of the loop's points, for 'hwmodel plan'.

    Shares of the probed speeds, by engine, with the error of points whose file the fit never saw.
    'hwmodel plan --device local' uses them from then on.

    \b
    Example:
      bench loop fit
      hwmodel plan --device local
    """
    from bench.engine_run import all_rounds
    from bench.loop_fit import fit_loop
    from bench.loop_run import write
    from bench.loop_view import fit_text
    from hwmodel.devices import user_folder

    path = Path(out) if out else user_folder() / "local.fit.json"
    made = fit_loop(Path(data), Path(models), all_rounds(Path(data)))
    if as_json:
        print_json({engine: entry["errors"] for engine, entry in made["engines"].items()})
    else:
        click.echo(fit_text(made))
    write(path, made)
    note(f"wrote {path}")


def _names(only: tuple[str, ...]) -> list[str]:
    """Models of the points asked for.

    Raises:
        RequestError: no point has such a model.
    """
    from bench.loop_points import points
    from hwmodel.errors import RequestError

    known = list(dict.fromkeys(p.model for p in points()))
    models = {name.removesuffix(" deep") for name in only}
    for name in models:
        if name not in known:
            raise RequestError(f"no points of a model '{name}'; expected {', '.join(known)}")
    return [m for m in known if not only or m in models]


def _cases(models: str, threads: int | None, only: tuple[str, ...], probe: bool) -> list[Any]:
    """Cases asked for.

    Raises:
        RequestError: one of them is none of these points.
    """
    from bench.loop_points import cases
    from hwmodel.errors import RequestError
    from refimpl.engine.threads import default_threads

    _names(only)
    found = {
        c.name.partition(" ")[2]: c
        for c in cases(Path(models), threads or default_threads(), probe)
    }
    for name in only:
        if name not in found:
            where = "in" if probe else "outside"
            raise RequestError(f"no case '{name}' {where} the probe; expected {', '.join(found)}")
    return [c for name, c in found.items() if not only or name in only]

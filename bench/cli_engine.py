"""`bench engine`: measure the CPU engine against llama.cpp, and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hwmodel.cli_support import CommandGroup, note
from refimpl.cli_support import Real

if TYPE_CHECKING:
    from bench.runners.base import Runner

_FOLDER = "reports/cpu_engine"


@click.group(cls=CommandGroup)
def engine() -> None:
    """The CPU engine against llama.cpp: measure in short calls, then write the report.

    \b
    Examples:
      bench engine prepare --models slices
      bench engine measure --models slices --only decode --rounds 3
      bench engine report
    """


_models = click.option(
    "--models", default="checkpoints/slices", show_default=True, metavar="DIR",
    help="Folder of the slices; those that are missing are written there (17 GB in all).",
)  # fmt: skip
_only = click.option(
    "--only", multiple=True, metavar="CASE",
    help="Only this case, or those that begin so; may be given several times.",
)  # fmt: skip
_data = click.option(
    "--data", default=_FOLDER, show_default=True, metavar="DIR", help="Folder of the raw samples."
)
patience_option = click.option(
    "--patience", type=Real(min=0), metavar="SECONDS",
    help="Measure only while memory reads at 90 % of its best, wait for that so long at a time, "
         "keep processors awake meanwhile (Linux), and stop a case at --rounds such rounds, "
         "earlier ones included.",
)  # fmt: skip
_threads = click.option(
    "--threads", type=int, metavar="N", help="Threads of all engines [default: physical cores]."
)


@engine.command()
@_models
@_only
@click.option("--json", "as_json", is_flag=True, help="Print the cases as JSON.")
def prepare(models: str, only: tuple[str, ...], as_json: bool) -> None:
    """Write missing slices, read them into memory, compile the kernels; list the cases.

    What takes long and is not measured: do it before the machine is quiet.

    \b
    Example:
      bench engine prepare --models slices --only decode
    """
    from bench.engine_cases import chosen, make_models
    from bench.engine_run import warm_up
    from hwmodel.cli_support import print_json, table
    from refimpl.engine.threads import default_threads

    found = chosen(only, default_threads())
    for name in make_models(Path(models), [c.model for c in found]):
        note(f"wrote {Path(models) / name}")
    for line in warm_up(found, Path(models)):
        note(line)
    if as_json:
        print_json([{"case": c.name, "model": c.model, "question": c.question,
                     "arms": [e.label for e in c.entries]} for c in found])  # fmt: skip
        return
    rows = [(c.name, c.model, c.question, str(len(c.entries))) for c in found]
    click.echo(table(("case", "model", "question", "arms"), rows))


@engine.command()
@_models
@_only
@_data
@_threads
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Rounds of each case; they are added to those that are there.")  # fmt: skip
@click.option("--llama-bench", metavar="PATH",
              help="llama-bench [default: on the PATH, else llama-cpp-python].")  # fmt: skip
@click.option("--llama-bench-no-amx", metavar="PATH",
              help="A second build of it, with AMX compiled out.")  # fmt: skip
@click.option("--no-llama", is_flag=True, help="Leave llama.cpp out.")
@patience_option
@click.option("--json", "as_json", is_flag=True, help="Print the medians of the new rounds.")
def measure(
    models: str, only: tuple[str, ...], data: str, threads: int | None, rounds: int,
    llama_bench: str | None, llama_bench_no_amx: str | None, no_llama: bool,
    patience: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure cases in interleaved rounds (A B A B), the memory's speed before and after each.

    Each finished round is added to rounds.jsonl at once: Ctrl-C loses the unfinished one only, and
    further calls go on from there. Where others use the memory too, --patience waits for moments
    in which they do not.

    \b
    Examples:
      bench engine measure --only decode-q4_0 --rounds 3
      bench engine measure --only decode --rounds 5 --patience 60
      bench engine measure --only verify --no-llama
    """
    from bench.engine_cases import chosen, make_models
    from bench.engine_run import measure_cases, medians
    from hwmodel.cli_support import print_json
    from refimpl.engine.threads import default_threads

    count = threads or default_threads()
    found = chosen(only, count)
    llama = {} if no_llama else _llama(llama_bench, llama_bench_no_amx)
    for name in make_models(Path(models), [c.model for c in found]):
        note(f"wrote {Path(models) / name}")
    made = measure_cases(
        found, Path(models), Path(data), count, rounds, llama, note, patience
    )  # fmt: skip
    if as_json:
        print_json(medians(made))


def _llama(program: str | None, no_amx: str | None) -> dict[str, Runner]:
    from bench.runners.llamacpp import (
        VARIANTS,
        LlamaBenchRunner,
        LlamaCppPythonRunner,
        find_llama_bench,
    )

    found = find_llama_bench(program)
    runners: dict[str, Runner]
    if found is None:
        note("note: no llama-bench on the PATH; llama-cpp-python runs its default variant only")
        runners = {"default": LlamaCppPythonRunner()}
    else:
        runners = {v: LlamaBenchRunner(found, v) for v in VARIANTS}
    if no_amx:
        path = find_llama_bench(no_amx)
        assert path is not None
        runners["no-amx"] = LlamaBenchRunner(path, label="no-amx")
    return runners


@engine.command()
@click.option("--model", default="checkpoints/slices/residency.gguf", show_default=True,
              metavar="PATH", help="The slice; written if it is missing (7.3 GB).")  # fmt: skip
@click.option("--experts", type=click.IntRange(min=32), default=192, show_default=True, metavar="N",
              help="Experts of a slice that is written.")  # fmt: skip
@click.option("--limit", type=Real(min=0, min_open=True), default=5.0,
              show_default=True, metavar="GB", help="Memory that a process may use.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Rounds; they are added to those that are there.")  # fmt: skip
@click.option("--only", multiple=True, metavar="WAY", help="Only this way; several times for more.")
@_data
@click.option("--llama-bench", metavar="PATH", help="llama-bench [default: on the PATH].")
@click.option("--json", "as_json", is_flag=True, help="Print the new samples as JSON.")
def residency(
    model: str, experts: int, limit: float, rounds: int, only: tuple[str, ...], data: str,
    llama_bench: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Decode a model that is larger than the memory it may use (Linux; makes control groups).

    Ways: 'experts on demand' (the engine's), 'page faults', 'willneed', 'page faults, no
    readahead', 'llama.cpp mmap'.

    \b
    Examples:
      bench engine residency --limit 5 --rounds 3
      bench engine residency --only 'experts on demand' --only 'page faults'
    """
    from dataclasses import asdict

    from bench.residency import DEFAULT_ARMS, LLAMA_ARM, add_rounds, make_model
    from bench.residency_report import FILE
    from bench.runners.llamacpp import find_llama_bench
    from hwmodel.cli_support import print_json

    path = Path(model)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_model(path, experts)
        note(f"wrote {path}")
    llama = find_llama_bench(llama_bench)
    arms = list(only or DEFAULT_ARMS)
    if llama is None and not only:
        note("note: no llama-bench on the PATH; llama.cpp is left out")
        arms.remove(LLAMA_ARM)
    made = add_rounds(path, round(limit * 1e9), arms, rounds, llama, Path(data) / FILE, note)
    if as_json:
        print_json([asdict(s) for s in made])


@engine.command()
@_data
@click.option("--out", default="reports/cpu_engine.md", show_default=True, metavar="FILE",
              help="The report; its plots go beside the raw samples.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the table's rows as JSON.")
def report(data: str, out: str, as_json: bool) -> None:
    """Write the report and its plots from the raw samples.

    \b
    Example:
      bench engine report --data reports/cpu_engine
    """
    from bench.cpu_engine import write_report
    from hwmodel.cli_support import print_json, table

    rows, written = write_report(Path(data), Path(out))
    if as_json:
        print_json(rows)
    else:
        cells: list[Any] = [tuple(str(v) for v in r.values()) for r in rows]
        click.echo(table(tuple(rows[0]) if rows else ("row",), cells))
    for path in written:
        note(f"wrote {path}")

"""`bench run`: drive real engines and write rows that others can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hwmodel.cli_support import counted, note, print_json
from refimpl.cli_support import NumberList, Real

_NOT_ALL = 1
_NUMBERS = NumberList(int, 0, 10**7)


@click.command()
@click.option("-e", "--engine", "engines", multiple=True, metavar="NAME|URL",
              help="refimpl, refimpl-reference, llama.cpp (llama.cpp:no-repack), or an OpenAI-"
              "compatible endpoint's address; may be repeated. [default: refimpl]")  # fmt: skip
@click.option("-m", "--model", metavar="FILE", help="Checkpoint; 'mini' is the embedded model.")
@click.option("-p", "--prompt", "prompts", type=_NUMBERS, default="512", show_default=True,
              metavar="N,N", help="Tokens of prompts.")  # fmt: skip
@click.option("-n", "--gen", "gens", type=_NUMBERS, default="128", show_default=True,
              metavar="N,N", help="Tokens to generate.")  # fmt: skip
@click.option("-d", "--depth", "depths", type=_NUMBERS, default="0", show_default=True,
              metavar="N,N", help="Tokens already in the context.")  # fmt: skip
@click.option("--concurrency", type=_NUMBERS, default="1", show_default=True, metavar="N,N",
              help="Requests at the same time, endpoints only.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1, 10_000), default=4, show_default=True,
              metavar="N", help="Requests of a measurement, endpoints only.")  # fmt: skip
@click.option("--timeout", type=Real(0.1, 86_400), default=300.0, show_default=True,
              metavar="S", help="Longest silence of an endpoint, seconds.")  # fmt: skip
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds its key.")
@click.option("--served-model", default="", metavar="NAME",
              help="Model to ask an endpoint for. [default: the first it lists]")  # fmt: skip
@click.option("--mtp", default="", metavar="N", help="Drafts of refimpl's loop: 0 to 3, auto.")
@click.option("--kv-type", metavar="TYPE", help="KV cache type. [default: the engine's]")
@click.option(
    "--micro-batch", type=click.IntRange(min=1), metavar="N", help="Prefill rows at once."
)
@click.option("--threads", type=click.IntRange(1, 256), metavar="N",
              help="Threads of all engines. [default: physical cores]")  # fmt: skip
@click.option("-r", "--repetitions", type=click.IntRange(1, 1000), default=3, show_default=True,
              metavar="N", help="Samples of a test in a round.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Interleaved rounds; they are added to those that are there.")  # fmt: skip
@click.option("--llama-bench", metavar="PATH", help="llama-bench. [default: on the PATH]")
@click.option("--name", "model_name", default="", metavar="NAME", help="Model's name in the rows.")
@click.option("--quant", default="", metavar="TYPE", help="Quant in the rows.")
@click.option("--device", default="", metavar="NAME",
              help="Device in the rows. [default: local, but for endpoints elsewhere]")  # fmt: skip
@click.option("--out", default="bench-run.csv", show_default=True, metavar="FILE",
              help="Tidy CSV; rounds with every sample go beside it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def run(
    engines: tuple[str, ...], model: str | None, prompts: tuple[int, ...], gens: tuple[int, ...],
    depths: tuple[int, ...], concurrency: tuple[int, ...], requests: int, timeout: float,
    api_key_env: str | None, served_model: str, mtp: str, kv_type: str | None,
    micro_batch: int | None, threads: int | None, repetitions: int, rounds: int,
    llama_bench: str | None, model_name: str, quant: str, device: str, out: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure engines side by side on this machine, or an endpoint anywhere.

    Engines of a file run in interleaved rounds (A B A B) between probes of the memory; endpoints
    are asked real text and streamed: time to first token, time per output token, acceptance. Every
    finished round is kept; Ctrl-C loses the one under way only. The CSV can be sent to others
    and compared.

    Exit code 0: everything was measured, 1: some of it could not be, 2: nothing, or bad input.

    \b
    Examples:
      bench run -m mini --engine refimpl --engine llama.cpp --out my-machine.csv
      bench run --engine http://localhost:8080 --concurrency 1,4 --quant Q4_K_S
      bench compare --runs my-machine.csv
    """
    from bench.importers.table import Stated
    from bench.run import Files, Job, api_key, cases, measure
    from bench.run_rows import write_rows
    from bench.runners.base import Runner
    from bench.runners.endpoint import EndpointRunner
    from bench.runners.stream import Client
    from hwmodel.errors import RequestError
    from refimpl.engine.threads import default_threads

    files, count = Files(Path(out)), threads or default_threads()
    files.check()
    if min(concurrency) < 1 or (not any(prompts) and not any(gens)):
        raise RequestError("nothing to measure: concurrency, and prompt or gen, are 1 or more")
    key = api_key(api_key_env)

    def endpoint(url: str, users: int) -> Runner:
        client = Client(url, key, timeout)
        return EndpointRunner(client, served_model, users, requests, files.keep_request)

    path = None if model is None else Path(model)
    job = Job(path, prompts, gens, depths, concurrency, requests, repetitions, count, kv_type,
              micro_batch, mtp)  # fmt: skip
    todo = cases(job, engines or ("refimpl",), llama_bench, endpoint)
    stated = Stated(model=model_name, quant=quant, device=device)
    try:
        missing = measure(todo, rounds, files, count, note)
    finally:
        if files.rounds.exists():
            rows = write_rows(files, stated, path)
            note(f"wrote {files.out} ({counted(len(rows), 'row')}) and {files.rounds}")
    if as_json:
        print_json([r.row() for r in rows])
    else:
        click.echo(_table(rows))
    _note_unnamed(rows)
    if missing:
        note(f"not measured: {', '.join(missing)}")
        click.get_current_context().exit(_NOT_ALL)


def _note_unnamed(rows: list[Any]) -> None:
    """Say what rows lack to be compared."""
    for column in ("device", "quant"):
        unnamed = sum(not getattr(r, column) for r in rows)
        if unnamed:
            name = "names" if unnamed == 1 else "name"
            note(
                f"{counted(unnamed, 'row')} {name} no {column}: give --{column}, so that they "
                "can be compared"
            )


def _table(rows: list[Any]) -> str:
    from bench.run_rows import SAYS
    from hwmodel.cli_support import table

    def model(r: Any) -> str:
        says = r.extra.get(SAYS, "")
        return f"{r.model} ({says})" if says else str(r.model)

    def shown(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    header = ("engine", "model", "users", "prompt", "depth", "generated", "prefill tok/s",
              "decode tok/s", "TTFT ms", "how")  # fmt: skip
    return table(header, [
        (r.engine, model(r), shown(r.batch_concurrency, 0), shown(r.prompt_tokens, 0),
         shown(r.context_depth, 0), shown(r.gen_tokens, 0), shown(r.prefill_tok_s),
         shown(r.decode_tok_s), shown(r.ttft_ms), r.notes)
        for r in rows
    ])  # fmt: skip

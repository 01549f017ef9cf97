"""The command `refimpl bench`: parse and print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from refimpl.cli_engine import memory_bytes, memory_option, note_residency
from refimpl.cli_support import NumberList, note, read_text

if TYPE_CHECKING:
    from refimpl.benchmark.plan import BenchTest, Settings


def _list(*flags: str, default: str, help: str) -> Any:
    return click.option(
        *flags, type=NumberList(int), default=default, show_default=True, metavar="N,..", help=help
    )


@click.command(short_help="Speed of prefill and decoding, as llama-bench has it.")
@click.option("-m", "--model", default="mini", metavar="PATH|mini", show_default=True,
              help="GGUF file, Hugging Face folder, or the embedded model.")  # fmt: skip
@_list("-p", "--n-prompt", default="512", help="Prompt lengths (pp); 0 for none.")
@_list("-n", "--n-gen", default="128", help="Tokens to generate (tg); 0 for none.")
@_list("-d", "--n-depth", default="0", help="Tokens in the cache before the clock starts.")
@_list("--rows", default="1", help="Tokens of a decoding step: 1, or 2 to 4 as in verification.")
@click.option("-r", "--repetitions", type=int, default=5, show_default=True, metavar="N",
              help="Timed repetitions of each test, after a warm-up.")  # fmt: skip
@click.option("-t", "--threads", type=int, metavar="N", help="Threads [default: physical cores].")
@click.option("-ub", "--micro-batch", type=int, metavar="N",
              help="Rows that run through the model at once in a prefill.")  # fmt: skip
@click.option("--kv-type", type=click.Choice(["f16", "f32", "q8_0"]),
              help="How keys and values are kept [default: f16].")  # fmt: skip
@click.option("--exact", is_flag=True, help="No quantised activations, f32 keys and values.")
@memory_option
@click.option("--mtp", "drafts", metavar="0|1|2|3|auto,..",
              help="Time the whole draft-and-verify loop with so many drafts.")  # fmt: skip
@click.option("--simulate-acceptance", "acceptance", type=NumberList(float),
              metavar="P1,P2,P3", help="Accept the i-th draft with chance Pi instead of judging "
              "it; results are labelled.")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, metavar="FILE",
              help="Text that --mtp continues; several are run one after the other "
              "[default: for mini its twenty prompts, else random tokens].")  # fmt: skip
@click.option("--synthetic-kv", is_flag=True,
              help="Fill the depth with random values, not by a prefill; labelled.")  # fmt: skip
@click.option("--backend", type=click.Choice(["engine", "reference"]), default="engine",
              show_default=True, help="What runs the model.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, metavar="S",
              help="Seed of the random tokens.")  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md",
              show_default=True, help="Form of the results.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
def bench(model: str, output: str, as_json: bool, **given: Any) -> None:
    """Speed of prefill (pp) and decoding (tg), as llama-bench measures them.

    Random tokens; a depth is reached before the clock starts; mean and standard deviation over
    the repetitions. json, jsonl and csv hold every sample and use llama-bench's field names.
    With --mtp the loop of 'refimpl generate' is timed, with sampling, drafting and rollbacks;
    of several numbers of drafts the generations take turns.

    REFIMPL_SIMD (avx512, avx2, portable) forces an instruction set, REFIMPL_AMX (on, off, emulate)
    decides on AMX in prefill.

    \b
    Examples:
      refimpl bench -p 512 -n 128 -d 0,4096
      refimpl bench -m slice.gguf -p 0 -n 64 --rows 1,2,4 -o json
      refimpl bench -m slice.gguf -p 0 -n 64 --mtp 0,3,auto --simulate-acceptance .88,.77,.69
    """
    from refimpl.benchmark.record import Printer, record
    from refimpl.benchmark.run import open_bench

    settings, tests = _plan(model, given)
    printer = Printer("json" if as_json else output)
    if settings.acceptance:
        note("note: accepted drafts are simulated; the text is random")
    with open_bench(model, settings, note) as opened:
        note_residency(opened.backend)
        opened.check(tests)
        records: list[dict[str, Any]] = []
        for result in opened.run_all(tests):
            if not records and (head := printer.head()):  # no empty table if the first test fails
                click.echo(head)
            records.append(record(opened, result))
            last = output == "json" or as_json
            click.echo(printer.item(records[-1]), nl=not last or len(records) == len(tests))
        if tail := printer.tail(records):
            click.echo(tail)


def _plan(model: str, given: dict[str, Any]) -> tuple[Settings, list[BenchTest]]:
    from refimpl.benchmark.plan import Settings, all_tests

    drafts = tuple(d.strip() for d in (given["drafts"] or "").split(",") if d.strip())
    settings = Settings(
        backend=given["backend"],
        threads=given["threads"],
        kv_type=given["kv_type"],
        exact=given["exact"],
        micro_batch=given["micro_batch"],
        memory_bytes=memory_bytes(given["memory"]),
        repetitions=given["repetitions"],
        acceptance=given["acceptance"] or (),
        synthetic_kv=given["synthetic_kv"],
        prompts=_texts(model, given) if drafts else (),
        seed=given["seed"],
    )
    tests = all_tests(given["n_prompt"], given["n_gen"], given["n_depth"], given["rows"], drafts)
    settings.check(tests)
    return settings, tests


def _texts(model: str, given: dict[str, Any]) -> tuple[str, ...]:
    from refimpl.backends import EMBEDDED
    from refimpl.errors import InputError

    if given["acceptance"] and given["prompts"]:
        raise InputError("with simulated acceptance the text is random: give no --prompt")
    if given["prompts"]:
        return tuple(read_text(path, "the prompt") for path in given["prompts"])
    if given["acceptance"]:
        return ()
    if model != EMBEDDED:
        note("note: drafts after random tokens are hardly ever accepted; --prompt gives a text")
        return ()
    from refimpl.mini.prompts import load

    return tuple(p.text for p in load())

"""The command `refimpl golden diagnose`: parse and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refimpl.cli_support import note, progress_bar, read_text

if TYPE_CHECKING:
    from refimpl.golden.diagnose import Diagnosis

DIFFERS = 1


@click.command(short_help="Name the mistake behind another program's numbers.")
@click.argument("candidate", required=False)
@click.option("--model", metavar="PATH|mini", help="The checkpoint that CANDIDATE was made from.")
@click.option(
    "--tokens",
    metavar="FILE",
    help="Prompt as a JSON list of token ids, where CANDIDATE does not state it.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bf16"]),
    help="Arithmetic of the candidate: how much rounding is expected "
    "[default: what a golden file states, else what its arrays show].",
)
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Arithmetic of the reference.",
)
@click.option("--threads", type=int, metavar="N", help="Threads. [default: physical cores]")
@click.option("--list", "listing", is_flag=True, help="List the known mistakes with sources.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def diagnose(
    ctx: click.Context,
    candidate: str | None,
    model: str | None,
    tokens: str | None,
    precision: str | None,
    dtype: str,
    threads: int | None,
    listing: bool,
    as_json: bool,
) -> None:
    """Say in a sentence which known mistake explains CANDIDATE's numbers.

    CANDIDATE holds what another implementation computed from the same checkpoint: a golden file
    (the more arrays, the surer the answer; with `hidden` every layer is judged on its own), an
    .npy or .npz array of logits, JSON lines with logits (MaxText) or top log probabilities
    (OpenAI's form, vLLM's, llama.cpp's server), or the tensors that llama-eval-callback prints.

    Exit code 0: no known mistake, 1: a mistake or a departure, 2: it cannot be read.

    \b
    Examples:
      refimpl golden diagnose theirs.npz --model Step-3.5-Flash
      refimpl golden diagnose answer.jsonl --tokens ids.json --model step.gguf --precision bf16
      refimpl golden diagnose --list
    """
    if listing:
        _list(as_json)
        return
    if candidate is None or model is None:
        raise click.UsageError("give a CANDIDATE and --model PATH, or --list", ctx)
    import contextlib

    from refimpl.backends import limited_threads, model_path
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.golden.candidate import read_candidate
    from refimpl.golden.diagnose import diagnose as run
    from refimpl.golden.files import read_tokens
    from refimpl.text.tokenizer import tokenizer_of

    ids = None
    if tokens is not None:
        ids = read_tokens(read_text(tokens, "the list of ids"), tokens)
    path = model_path(model)
    with limited_threads(threads), contextlib.closing(open_checkpoint(path)) as source:
        for warning in source.warnings:
            note(f"note: {warning}")
        tokenizer = tokenizer_of(path, source.metadata or None)
        shown = read_candidate(Path(candidate), source.config, ids, tokenizer)
        for told in shown.notes:
            note(f"note: {told}")
        with progress_bar("variants") as move:
            found = run(source, shown, dtype, precision, progress=move)
    click.echo(json.dumps(found.to_json()) if as_json else _text(found))
    if found.verdict != "noise":
        ctx.exit(DIFFERS)


def _text(found: Diagnosis) -> str:
    lines = [found.sentence]
    for e in found.explanations:
        lines.append(
            f"  {e.name}: explains {e.rows} of {e.testable} rows where it shows, which leaves "
            f"{e.left:.1e} of {e.base:.1e}; source: {e.source}"
        )
    if found.untestable:
        names = ", ".join(found.untestable)
        lines.append(f"not to be seen in what was given, whether made or not: {names}")
    return "\n".join(lines)


def _list(as_json: bool) -> None:
    from refimpl.reference.variant import VARIANTS

    if as_json:
        entries = [{"name": n, "phrase": v.phrase, "source": v.source} for n, v in VARIANTS.items()]
        click.echo(json.dumps(entries))
        return
    for name, known in VARIANTS.items():
        click.echo(f"{name}: {known.phrase} [{known.source}]")

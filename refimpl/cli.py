"""The command `refimpl`: parses and prints; everything else is imported when it is used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from refimpl.cli_engine import about, engine_options, measured, opened_model
from refimpl.cli_support import (
    INTERRUPTED,
    SentenceGroup,
    note,
    progress_bar,
    read_text,
)

if TYPE_CHECKING:
    from refimpl.backends import OpenModel
    from refimpl.decoding.generation import GenerateOptions, Generation


@click.group(
    cls=SentenceGroup,
    lazy={
        "bench": "refimpl.cli_bench:bench",
        "chat": "refimpl.cli_chat:chat",
        "convert": "refimpl.cli_convert:convert",
        "golden": "refimpl.cli_golden:golden",
        "inspect": "refimpl.cli_inspect:inspect",
        "perplexity": "refimpl.cli_perplexity:perplexity",
        "stats": "refimpl.cli_stats:stats",
        "synth": "refimpl.cli_synth:synth",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="step-flash-reference", prog_name="refimpl")
def main() -> None:
    """Exact reference implementation of Step 3.5 Flash.

    The engine's kernels are chosen for the processor: REFIMPL_SIMD (avx512, avx2, portable) forces
    an instruction set, REFIMPL_AMX (on, off, emulate) decides on AMX in prefill.

    \b
    Example:
      refimpl generate 'def fibonacci(n):'
    """


@main.command(short_help="Continue a prompt.")
@click.argument("prompt", required=False)
@click.option(
    "--model",
    default="mini",
    metavar="PATH|mini",
    show_default=True,
    help="GGUF file, Hugging Face folder, or the embedded model.",
)
@click.option(
    "--tokens",
    metavar="FILE",
    help="Prompt as a JSON list of token ids, instead of PROMPT ('-' for stdin).",
)
@click.option(
    "--max-new-tokens",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after N tokens.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 takes the most probable token, so that runs repeat; above 0 samples.",
)
@click.option(
    "--top-k",
    type=int,
    default=0,
    metavar="K",
    help="Sample from the K most probable tokens (0: all).",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    metavar="P",
    help="Sample from the fewest tokens whose probabilities sum to P (1: all).",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    metavar="P",
    help="Drop tokens below P times the highest probability (0: none).",
)
@click.option("--seed", type=int, metavar="S", help="Seed of the sampling; drawn if not given.")
@click.option(
    "--mtp",
    type=click.Choice(["0", "1", "2", "3", "auto"]),
    help="Tokens that the MTP layers draft in every step; auto: as many as pay off. "
    "[default: 0 with the reference, auto with an engine]",
)
@click.option(
    "--mtp-model",
    metavar="PATH",
    help="Second checkpoint that holds the MTP layers, where the model's file lacks them.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End the text before TEXT; may be given several times.",
)
@click.option(
    "--backend",
    type=click.Choice(["reference", "engine"]),
    help="What runs the model. [default: engine for GGUF files, reference for folders]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bf16"]),
    help="Arithmetic of the reference; chooses it. [default: float32]",
)
@click.option("--threads", type=int, metavar="N", help="Threads. [default: physical cores]")
@engine_options
@click.option(
    "--save-state",
    metavar="FILE",
    help="Keep the prompt as the model has read it (--max-new-tokens 0: do only that).",
)
@click.option(
    "--load-state",
    metavar="FILE",
    help="Go on from a saved prompt, which PROMPT must begin with.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def generate(ctx: click.Context, prompt: str | None, as_json: bool, **given: Any) -> None:
    """Continue PROMPT ('-' reads it from stdin, as it is).

    The continuation goes to stdout as it comes, without the prompt; speeds and accepted drafts
    go to stderr. Drafts change the speed only: greedy text is the same with any --mtp, sampled
    text has the same distribution, but for one seed another number of drafts gives another text
    (with auto the number follows measured times). The order of the cuts is temperature, top-k,
    top-p, min-p. Ctrl-C ends the text; what there is, is kept (exit code 130). A state file saves
    reading a long prompt again; it serves one model, backend and dtype, and changes no bit.

    \b
    Examples:
      refimpl generate 'def fibonacci(n):' --max-new-tokens 60 --mtp 3
      refimpl generate - --temperature 0.7 --top-k 40 --seed 1 < prompt.txt
      refimpl generate --tokens ids.json --json
      refimpl generate - --save-state long.state --max-new-tokens 0 < long.txt
      refimpl generate - --load-state long.state < long.txt
    """
    if (prompt is None) == (given["tokens"] is None):
        raise click.UsageError("give either a PROMPT or --tokens FILE", ctx)
    from time import perf_counter

    options = generate_options(given)
    began = perf_counter()
    with opened_model(given) as model:
        for warning in model.warnings:
            note(f"note: {warning}")
        ids = _prompt_ids(model, prompt, given["tokens"])
        load_s = perf_counter() - began
        made = _run(
            measured(model, given),
            ids,
            options,
            not as_json,
            given["load_state"],
            given["save_state"],
        )
        _print_speeds(made, given["mtp"])
        fields = about(model, made, given)
    if as_json:
        record = {**made.as_json(), "model": given["model"], **fields}
        record["timings"]["load_s"] = load_s
        click.echo(json.dumps(record, allow_nan=False))
    if made.finish_reason == "interrupted":
        ctx.exit(INTERRUPTED)


def generate_options(given: dict[str, Any]) -> GenerateOptions:
    """What the options of `generate` ask for."""
    from refimpl.backends import chosen_backend, default_mtp
    from refimpl.decoding.generation import GenerateOptions
    from refimpl.decoding.sampling import SamplingParams

    given["mtp"] = given["mtp"] or default_mtp(
        chosen_backend(given["model"], given["backend"], given["dtype"])
    )
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    sampling = SamplingParams(**{name: given[name] for name in names})
    if sampling.greedy and any(given[n] for n in ("top_k", "min_p", "seed")):
        note("note: without --temperature the most probable token is taken; nothing is sampled")
    elif given["mtp"] == "auto" and given["seed"] is not None and not sampling.greedy:
        note("note: with --mtp auto a seed does not repeat a text; --mtp 0 to 3 do")
    return GenerateOptions(
        max_new_tokens=given["max_new_tokens"],
        sampling=sampling,
        mtp="auto" if given["mtp"] == "auto" else int(given["mtp"]),
        stop_strings=given["stop"],
    )


def _prompt_ids(model: OpenModel, prompt: str | None, tokens: str | None) -> list[int]:
    from refimpl.errors import InputError
    from refimpl.golden.files import read_tokens
    from refimpl.text.tokenizer import NO_TOKENIZER

    if tokens is not None:
        return read_tokens(read_text(tokens, "the list of ids"), tokens)
    assert prompt is not None
    text = read_text("-", "the prompt") if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty: give at least one character")
    if model.tokenizer is None:
        raise InputError(NO_TOKENIZER.format(path=model.path))
    return model.tokenizer.encode(text)


def _run(
    model: OpenModel,
    ids: list[int],
    options: GenerateOptions,
    stream: bool,
    load_state: str | None,
    save_state: str | None,
) -> Generation:
    """Generate, showing the text meanwhile if `stream`; from and to state files if named."""
    from refimpl.decoding.generate import generate as run

    saved, on_prefilled = _states(model, load_state, save_state)

    shown = 0

    def show(_: object, text: str) -> None:
        nonlocal shown
        if text and stream:
            shown += len(text)
            click.echo(text, nl=False)

    decoder = model.tokenizer.stream if model.tokenizer is not None else None
    with progress_bar("prompt") as move:
        long = move if len(ids) > options.prefill_chunk else None
        made = run(
            model.backend,
            ids,
            options,
            new_decoder=decoder,
            on_tokens=show,
            on_prefill=long,
            saved=saved,
            on_prefilled=on_prefilled,
        )
    if stream and options.max_new_tokens:
        if decoder is None:
            note("note: the checkpoint has no tokenizer; --json gives the ids")
        click.echo(made.text[shown:])
    if saved is not None:
        note(f"state: {len(saved.tokens)} tokens of the prompt came from {load_state}")
    return made


def _states(model: OpenModel, load: str | None, save: str | None) -> Any:
    """The saved prompt to go on from, and what saves this one; None for each that is not asked."""
    from pathlib import Path

    if load is None and save is None:
        return None, None
    from refimpl.decoding.state import check_state_output, read_state, save_state

    saved = None
    if save is not None:
        check_state_output(Path(save), model.path)
    if load is not None:
        saved = read_state(Path(load), model.backend)
    if save is None:
        return saved, None

    def keep(cache: Any, step: Any) -> None:
        save_state(Path(save), model.backend, cache, step)
        note(f"wrote {save} ({cache.length} tokens, {Path(save).stat().st_size / 1e6:.1f} MB)")

    return saved, keep


def _print_speeds(made: Generation, mtp: str) -> None:
    t, m = made.timings, made.mtp
    run = f"{t.prompt_tokens - t.reused_tokens} of " if t.reused_tokens else ""
    tokens = "token" if t.prompt_tokens == 1 else "tokens"
    speed = _speed(t.prefill_s, t.prefill_tokens_per_s)
    note(f"prompt: {run}{t.prompt_tokens} {tokens} in {speed}")
    if made.ids:
        speed = _speed(t.decode_s, t.decode_tokens_per_s)
        note(
            f"text: first token after {t.ttft_s:.2f} s, {t.decoded_tokens} more in {speed}, "
            f"ended by: {made.finish_reason}"
            + (f", seed {made.seed}" if made.seed is not None else "")
        )
    if m.drafted:
        places = zip(m.accepted_by_position, m.drafted_by_position, strict=True)
        shares = ", ".join(f"{100 * a / d:.0f} %" for a, d in places)
        note(
            f"drafts (--mtp {mtp}): {m.accepted} of {m.drafted} accepted in {m.steps} steps, "
            f"{m.accepted / m.steps:.2f} a step; by position {shares}"
        )


def _speed(seconds: float, tokens_per_s: float | None) -> str:
    shown = f"{seconds:.2f} s"
    return shown if tokens_per_s is None else f"{shown} ({tokens_per_s:.1f} tokens/s)"

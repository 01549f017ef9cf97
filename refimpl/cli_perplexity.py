"""The command `refimpl perplexity`: parse and print."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from refimpl.cli_engine import announce_compiling, memory_bytes, memory_option, note_residency
from refimpl.cli_support import note, progress_bar, read_text

if TYPE_CHECKING:
    from refimpl.backends import OpenModel
    from refimpl.quality.clustered import Measured
    from refimpl.quality.perplexity import Distance, Perplexity


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which text is read, by which model, run by what."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        memory_option,
        click.option("--threads", type=int, metavar="N", help="Threads. [default: physical cores]"),
        click.option(
            "--exact", is_flag=True, help="Engine: no int8 activations, f32 keys and values."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float64", "bf16"]),
            help="Arithmetic of the reference. [default: float32]",
        ),
        click.option(
            "--backend",
            type=click.Choice(["reference", "engine"]),
            help="What runs the model. [default: engine for GGUF files, else reference]",
        ),
        click.option("--max-tokens", type=int, metavar="N", help="Read the first N tokens only."),
        click.option(
            "--context", type=int, metavar="N",
            help="Tokens of a window. [default: 512, or the model's context if that is less]",
        ),
        click.option(
            "--tokens", metavar="FILE", help="A JSON list of token ids instead of --text."
        ),
        click.option("--text", metavar="FILE", help="Text in UTF-8 ('-' for stdin)."),
        click.option("--model", default="mini", metavar="PATH|mini", show_default=True,
                     help="GGUF file, Hugging Face folder, or the embedded model."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(short_help="Perplexity on a text, distance from another model.")
@text_options
@click.option("--against", metavar="PATH|mini", help="The base to compare with, such as BF16.")
@click.option(
    "--stride", type=int, metavar="N",
    help="Windows overlap and advance by N, so that every token is judged once.",
)  # fmt: skip
@click.pass_context
def perplexity(ctx: click.Context, against: str | None, stride: int | None, **given: Any) -> None:
    """Perplexity of a model on a text, and its distance from another model.

    The protocol is llama-perplexity's, so that figures can be compared: chunks of --context tokens,
    of which the second half is judged. With --against also the KL divergence from that model,
    how often the most probable token is the same, and the ratio of the perplexities.

    Every ± is one standard error clustered by window, since the tokens of a window are not
    independent (for the 95th percentile a bootstrap over windows).

    \b
    Examples:
      refimpl perplexity --model mini --text README.md --context 256
      refimpl perplexity --model step-q4_0.gguf --against step-bf16.gguf --text wiki.test.raw
    """
    from refimpl.quality.perplexity import compare, measure, require_same_tokens
    from refimpl.quality.windows import bos_of, windows_of

    with contextlib.ExitStack() as stack:
        # What the process uses counts for both: the base gets what the model leaves.
        model = stack.enter_context(opened(given, share=1 if against is None else 0.5))
        ids, context = text_ids(ctx, model, given)
        config = model.backend.config
        windows = windows_of(ids, config, context, stride, bos_of(model.tokenizer))
        distance = None
        with progress_bar("windows") as move:
            if against is None:
                made = measure(model.backend, windows, move)
            else:
                base = stack.enter_context(opened(given | {"model": against}))
                require_same_tokens(model.tokenizer, base.tokenizer)
                if base.backend.config.max_position_embeddings < context:
                    windows_of(ids, base.backend.config, context, stride)
                made, distance = compare(model.backend, base.backend, windows, move)
        if given["as_json"]:
            about = {
                "model": given["model"], "against": against, "backend": model.name,
                "context": context, "stride": stride, "tokens": len(ids),
            }  # fmt: skip
            shown = {**about, **asdict(made)}
            if distance is not None:
                shown["distance"] = asdict(distance)
            click.echo(json.dumps(shown, allow_nan=False))
        else:
            click.echo(_text(made, distance))


@contextlib.contextmanager
def opened(given: dict[str, Any], share: float = 1) -> Iterator[OpenModel]:
    """The model that `text_options` ask for, with a share of the memory that they allow."""
    from refimpl.backends import EngineOptions, open_model

    allowed = memory_bytes(given["memory"])
    memory = None if allowed is None else int(share * allowed)
    options = EngineOptions(given["exact"], None, announce_compiling, memory_bytes=memory)
    choice = given["model"], given["backend"], given["dtype"], given["threads"], options
    with open_model(*choice) as model:
        note_residency(model.backend)
        yield model


def text_ids(ctx: click.Context, model: OpenModel, given: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of --text or --tokens, and the length of a window."""
    from refimpl.golden.files import read_tokens
    from refimpl.quality.inputs import cut, ids_of_text

    if (given["text"] is None) == (given["tokens"] is None):
        raise click.UsageError("give either --text FILE or --tokens FILE", ctx)
    for warning in model.warnings:
        note(f"note: {warning}")
    if given["tokens"] is not None:
        ids = read_tokens(read_text(given["tokens"], "the list of ids"), given["tokens"])
    else:
        ids = ids_of_text(model, read_text(given["text"], "the text"))
    context = given["context"]
    if context is None:
        context = min(512, model.backend.config.max_position_embeddings)
    return cut(ids, given["max_tokens"]), context


def _text(made: Perplexity, d: Distance | None) -> str:
    lines = [
        f"judged         {made.judged_tokens:,} tokens in {made.windows} windows",
        f"perplexity     {shown(made.perplexity)}",
        f"nats/token     {shown(made.nats_per_token)} "
        f"(± {made.token_standard_error:.5f} if tokens were independent)",
    ]
    if d is not None:
        share = d.top1_agreement
        error = None if share.standard_error is None else 100 * share.standard_error
        tail = "" if error is None else f" ± {error:.2f}"
        lines += [
            f"base           {shown(d.base.perplexity)}",
            f"ratio          {shown(d.perplexity_ratio, 5)}",
            f"nats delta     {shown(d.nats_delta, 5)}",
            f"KL mean        {shown(d.kl_mean, 5)}",
            f"KL 95 %        {shown(d.kl_p95, 5)}",
            f"KL max         {d.kl_max:.5f}",
            f"same top token {100 * share.value:.2f}{tail} %",
        ]
    return "\n".join(lines)


def shown(x: Measured, digits: int = 4) -> str:
    """A figure with its standard error."""
    tail = "" if x.standard_error is None else f" ± {x.standard_error:.{digits}f}"
    return f"{x.value:.{digits}f}{tail}"

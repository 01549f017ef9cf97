"""The command `refimpl stats`: parse and print."""

from __future__ import annotations

import json
from typing import Any

import click

from refimpl.cli_perplexity import opened, text_ids, text_options
from refimpl.cli_support import progress_bar


@click.command(short_help="Drafts accepted and experts used on a text.")
@text_options
@click.option("--loops", type=int, default=8, show_default=True, metavar="N",
              help="Places that the real draft-and-verify loop continues.")  # fmt: skip
@click.option("--new-tokens", type=int, default=64, show_default=True, metavar="N",
              help="Tokens of each such continuation.")  # fmt: skip
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="S",
    help="Seed of sampled text.",
)
@click.pass_context
def stats(ctx: click.Context, loops: int, new_tokens: int, seed: int, **given: Any) -> None:
    """Count what a model does on a text: drafts that stand, experts that are used.

    Acceptance of drafts by position, each given that all before it stood (behind the true text,
    and in the real loop, greedy and sampled); load of the experts; distinct experts that 1 to 8
    neighbouring tokens use, beside what independent choices would; the margin between the last
    chosen expert and the next. Every ± is one standard error clustered by window.

    The --json output is the file that `hwmodel plan --stats FILE` reads.

    \b
    Examples:
      refimpl stats --model mini --text README.md --context 256
      refimpl stats --model step-q4_k_s.gguf --text prompts.txt --json > stats.json
    """
    from refimpl.quality.statistics import statistics
    from refimpl.quality.windows import bos_of, windows_of

    with opened(given) as model:
        ids, context = text_ids(ctx, model, given)
        windows = windows_of(ids, model.backend.config, context, None, bos_of(model.tokenizer))
        backend: Any = model.backend
        with progress_bar("windows") as move:
            record = statistics(
                backend, windows, loops=loops, new_tokens=new_tokens, seed=seed, progress=move
            )
        about = {"model": given["model"], "backend": model.name, "context": context}
    if given["as_json"]:
        click.echo(json.dumps({**about, **record}, allow_nan=False))
    else:
        click.echo(_text(record))


def _text(record: dict[str, Any]) -> str:
    lines = [f"{record['tokens']:,} tokens in {record['windows']} windows", ""]
    if "drafts" not in record:
        lines.append("drafts: the model has no MTP layers")
    else:
        lines.append(f"{'drafts that stand, given those before':38} {'position 1, 2, ...'}")
        for name, found in record["drafts"].items():
            each = "  ".join(_share(x) for x in found["by_position"])
            per_step = found["accepted_per_step"]["value"]
            lines.append(f"  {name.replace('_', ' '):36} {each}  ({per_step:.2f} a step)")
    if "distinct_experts" not in record:
        return "\n".join([*lines, "experts: the model has no MoE layers"])
    independent = record["overlap"]["independent"]
    lines += ["", "neighbouring tokens  distinct experts  independent, same load  uniform"]
    rows = zip(
        record["distinct_experts"].items(), record["overlap"]["standard_errors"],
        independent["measured_load"], independent["uniform"], strict=False,
    )  # fmt: skip
    for (n, value), error, loaded, uniform in rows:
        shown = f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")
        lines.append(f"{n:>19}  {shown:>16}  {loaded:22.2f}  {uniform:7.2f}")
    lines += ["", "layer  imbalance  entropy/log E  busiest tenth  unused"]
    for f in record["load_by_layer"]:
        lines.append(
            f"{f['layer']:5}  {f['imbalance']:9.2f}  {f['entropy_share']:13.3f}  "
            f"{100 * f['busiest_tenth_share']:11.1f} %  {f['unused']:6}"
        )
    m = record["routing_margin"]
    lines += ["", f"routing margin: median {m['p50']['value']:.4f}, 1 % below "
              f"{m['p01']['value']:.5f}"]  # fmt: skip
    return "\n".join(lines)


def _share(x: dict[str, Any]) -> str:
    error = x["standard_error"]
    tail = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * x['value']:.1f}{tail} %"

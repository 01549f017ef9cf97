"""The command `refimpl inspect`: parse and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refimpl.cli_support import progress_bar

if TYPE_CHECKING:
    from refimpl.checkpoint.inspection import Inspection
    from refimpl.config import ModelConfig

UNUSABLE = 1


@click.command(short_help="What a checkpoint is, holds and lacks.")
@click.argument("model", metavar="PATH|mini")
@click.option("--check", is_flag=True, help="Read every block and look for damage.")
@click.option("--mtp-model", metavar="PATH", help="Second checkpoint that holds the MTP layers.")
@click.option(
    "--layers",
    metavar="A:B",
    help="Only say which files trunk layers A to B-1 lie in; of a folder, config.json and the "
    "index are enough.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def inspect(
    ctx: click.Context,
    model: str,
    check: bool,
    mtp_model: str | None,
    layers: str | None,
    as_json: bool,
) -> None:
    """Say what a checkpoint is, what it holds, and what it lacks.

    Reads headers only, of complete and incomplete checkpoints alike; --check also reads every
    block: values that are not finite, scales that no quantiser writes, rows far beyond the rest,
    norm weights that look as if + 1 was applied twice or not at all.

    Exit code 0: nothing is wrong, 1: something is missing or damaged, 2: it cannot be read.

    \b
    Examples:
      refimpl inspect Step-3.5-Flash
      refimpl inspect step3.5_flash_Q4_K_S.gguf --check
      refimpl inspect trunk.gguf --mtp-model mtp-trunk.gguf
      refimpl inspect Step-3.5-Flash --layers 4:5
    """
    from refimpl.backends import model_path
    from refimpl.checkpoint.inspection import inspect as run

    if layers is not None:
        if check or mtp_model is not None:
            raise click.UsageError("--layers takes neither --check nor --mtp-model", ctx)
        ctx.exit(_files_of_layers(model_path(model), layers, as_json))
    second = None if mtp_model is None else Path(mtp_model)
    with progress_bar("reading") as move:
        found = run(model_path(model), check, move, second)
    click.echo(json.dumps(found.to_json()) if as_json else _text(found))
    if found.problems:
        ctx.exit(UNUSABLE)


def _files_of_layers(path: Path, layers: str, as_json: bool) -> int:
    """Print the files of a range of layers; the exit code."""
    from refimpl.checkpoint.open import read_config
    from refimpl.checkpoint.shards import shards_of
    from refimpl.golden.pieces import parse_layers, tensors_of_layers

    config = read_config(path)
    first, stop = parse_layers(layers, config)
    found = shards_of(path, tensors_of_layers(config, first, stop, embeddings=first == 0))
    if as_json:
        click.echo(json.dumps({"path": str(path), "layers": [first, stop], **found.to_json()}))
        return 0 if found.complete else UNUSABLE
    for file in found.files:
        here = "here" if file.present else "missing"
        click.echo(f"{file.name}: {file.tensors} tensors of these layers, {here}")
    if found.nowhere:
        names = ", ".join(found.nowhere[:3]) + (", ..." if len(found.nowhere) > 3 else "")
        click.echo(f"problem: {len(found.nowhere)} tensors are in no file: {names}")
    return 0 if found.complete else UNUSABLE


def _text(found: Inspection) -> str:
    listing, config = found.listing, found.listing.config
    files = "" if len(listing.files) == 1 else f" in {len(listing.files)} files"
    and_mtp = "" if found.mtp_path is None else f" and {found.mtp_path}"
    lines = [f"{listing.path}{and_mtp}: {listing.form}{files}", *_shape(config), ""]
    lines.append(
        f"{'role':10} {'tensors':>7} {'parameters':>15} {'bytes':>15} {'bits/weight':>11}  types"
    )
    for r in found.roles:
        types = _mixture(r.types)
        lines.append(
            f"{r.role:10} {r.tensors:7} {r.parameters:15,} {r.stored_bytes:15,} "
            f"{r.bits_per_weight:11.3f}  {types}"
        )
    tensors = sum(r.tensors for r in found.roles)
    lines.append(
        f"{'total':10} {tensors:7} {found.parameters:15,} {found.stored_bytes:15,} "
        f"{found.bits_per_weight:11.3f}  "
        f"{', '.join(f'{n} {kind}' for kind, (n, _) in found.types.items())}"
    )
    lines += ["", _mtp(found), _tokenizer(found)]
    if listing.unexpected:
        names = ", ".join(t.name for t in listing.unexpected[:3])
        more = ", ..." if len(listing.unexpected) > 3 else ""
        lines.append(f"not part of the model: {len(listing.unexpected)} tensors ({names}{more})")
    if found.findings is not None and not found.findings:
        lines.append("values: every block read, nothing wrong found")
    lines += [f"problem: {p}" for p in found.problems]
    if listing.mtp_only:
        lines.append("MTP layers alone: give this file with --mtp-model beside the main model's")
    elif not found.problems:
        lines.append("complete: every tensor of the model is there, with its name and shape")
    return "\n".join(lines)


def _shape(c: ModelConfig) -> list[str]:
    full = sum(s.window is None for s in c.trunk)
    lines = [
        f"{c.num_hidden_layers} layers ({full} full, {c.num_hidden_layers - full} sliding with a "
        f"window of {c.sliding_window}), hidden size {c.hidden_size}, vocabulary {c.vocab_size}, "
        f"context {c.max_position_embeddings}",
        f"{c.num_attention_heads} query heads on full and {c.sliding_attention_heads} on sliding "
        f"layers, {c.num_attention_groups} KV heads of {c.head_dim}",
    ]
    if c.moe_layers:
        lines.append(
            f"{len(c.moe_layers)} MoE layers: {c.moe_top_k} of {c.moe_num_experts} experts of "
            f"width {c.moe_intermediate_size}, one shared expert of {c.share_expert_dim}"
        )
    return lines


def _mixture(types: dict[str, int]) -> str:
    total = sum(types.values())
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{kind} {100 * size / total:.0f} %" for kind, size in types.items())


def _mtp(found: Inspection) -> str:
    declared, there = found.listing.config.num_nextn_predict_layers, found.listing.mtp_present
    if not declared:
        return "MTP layers: none declared"
    state = "" if found.mtp_state == "present" else f" ({found.mtp_state}: drafts are off)"
    return f"MTP layers: {there} of {declared}{state}"


def _tokenizer(found: Inspection) -> str:
    t = found.tokenizer
    if t is None:
        return "tokenizer: none" if found.tokenizer_problem is None else "tokenizer: unusable"
    template = t["chat_template_characters"]
    shown = "no chat template" if template is None else f"chat template of {template} characters"
    pre = t["pre_tokenizer"] or "unknown to GGUF"
    return (
        f"tokenizer: byte-level BPE, {t['entries']} entries, {t['merges']} merges, "
        f"pre-tokenizer {pre}; {shown}"
    )

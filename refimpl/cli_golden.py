"""The commands `refimpl golden ...`: parse and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refimpl.cli_engine import announce_compiling, memory_bytes, memory_option, note_residency
from refimpl.cli_support import Real, SentenceGroup, note, read_text

if TYPE_CHECKING:
    from refimpl.backend import Backend
    from refimpl.backends import EngineOptions
    from refimpl.golden.compare import Comparison, Difference

DIFFERS = 1


@click.group(
    cls=SentenceGroup,
    short_help="Dump, compare and diagnose what every layer computes.",
    lazy={"diagnose": "refimpl.cli_diagnose:diagnose"},
)
def golden() -> None:
    """Dump and compare what a run computes at every layer, and name the mistake behind a gap.

    \b
    Example:
      refimpl golden dump --model mini --tokens ids.json --out mine.npz
    """


@golden.command(short_help="Write down what a run computes.")
@click.option("--model", required=True, metavar="PATH|mini", help="Checkpoint to run.")
@click.option("--mtp-model", metavar="PATH", help="Second checkpoint that holds the MTP layers.")
@click.option("--tokens", required=True, metavar="FILE", help="Prompt: a JSON list of token ids.")
@click.option("--out", required=True, metavar="OUT.npz", help="File to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bf16"]),
    default="float32",
    show_default=True,
    help="Arithmetic; bf16 rounds where the vendor's code does.",
)
@click.option(
    "--backend",
    type=click.Choice(["reference", "engine"]),
    default="reference",
    show_default=True,
    help="What runs the model.",
)
@click.option("--new", type=int, default=0, metavar="N", help="Greedy tokens after the prompt.")
@click.option("--chunk", type=int, metavar="C", help="Prefill C tokens at a time (default: all).")
@click.option("--threads", type=int, metavar="N", help="Threads. [default: physical cores]")
@click.option(
    "--layers", metavar="A:B", help="Only trunk layers A to B-1; only their shards are read."
)
@click.option(
    "--hidden-in",
    metavar="FILE",
    help="Input of layer A: .npy rows (one per token), a golden file, or the piece before.",
)
@click.option("--last", type=int, metavar="N", help="Keep only the last N rows of every array.")
@click.option("--topk", type=int, metavar="K", help="Keep only the K largest logits of a row.")
@click.option(
    "--variant",
    metavar="NAME",
    help="Make this known mistake on purpose (`golden diagnose --list` names them).",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Engine: no int8 activations, f32 keys and values; needed to equal a reference's file.",
)
@memory_option
@click.pass_context
def dump(
    ctx: click.Context,
    model: str,
    mtp_model: str | None,
    tokens: str,
    out: str,
    dtype: str,
    backend: str,
    new: int,
    chunk: int | None,
    threads: int | None,
    variant: str | None,
    exact: bool,
    memory: float | None,
    **piece: Any,
) -> None:
    """Run the model over a prompt and write everything it computes.

    OUT.npz holds logits, hidden states, attention and FFN outputs of every layer, routing, and
    with --new the greedy text; for models with MTP layers also their teacher-forced outputs and
    a draft-and-verify run. The documentation of refimpl.golden.files lists the arrays.

    With --layers, --last or --topk a piece is written (refimpl.golden.pieces): a checkpoint too
    large to run is verified layer by layer, each from the file of the one before or from another
    implementation's own activations. The reference needs only the shards of these layers on the
    disk; --backend engine --exact takes a whole file and reads only them into memory.

    \b
    Examples:
      refimpl golden dump --model Step-3.5-Flash --tokens ids.json --out mine.npz --new 16
      refimpl golden dump --model Step-3.5-Flash --tokens ids.json --layers 0:4 --out 0.npz
      refimpl golden dump --model Step-3.5-Flash --tokens ids.json --layers 4:8 \\
        --hidden-in 0.npz --out 4.npz
      refimpl golden dump --model step-q4_k_s.gguf --backend engine --exact --tokens ids.json \\
        --layers 0:4 --out 0.npz
    """
    from refimpl.backends import EngineOptions

    options = EngineOptions(exact, None, announce_compiling, memory_bytes=memory_bytes(memory))
    if any(value is not None for value in piece.values()):
        if new or any(value is not None for value in (chunk, variant, mtp_model)):
            raise click.UsageError(
                "pieces take neither --new, --chunk, --variant nor --mtp-model", ctx
            )
        _dump_piece(model, tokens, out, (backend, dtype, threads, options), **piece)
    else:
        choice = (backend, dtype, threads, options)
        _dump_whole(model, mtp_model, tokens, out, choice, new, chunk, variant)


def _dump_whole(
    model: str,
    mtp_model: str | None,
    tokens: str,
    out: str,
    choice: tuple[str, str, int | None, EngineOptions],
    new: int,
    chunk: int | None,
    variant: str | None,
) -> None:
    from refimpl.backends import open_model
    from refimpl.golden.dump import golden_arrays
    from refimpl.golden.files import check_output, config_hash, read_tokens, write_golden

    check_output(Path(out), model, tokens, mtp_model)
    ids = read_tokens(read_text(tokens, "the list of ids"), tokens)
    backend, dtype, _, options = choice
    with open_model(model, *choice, mtp_model=mtp_model) as opened:
        for warning in opened.warnings:
            note(f"note: {warning}")
        note_residency(opened.backend)
        runs = opened.backend if variant is None else _mistaken(opened.backend, dtype, variant)
        arrays = golden_arrays(runs, ids, new, chunk)  # type: ignore[arg-type]
        meta = {
            **_run_meta(dtype, backend, options.exact, config_hash(opened.backend.config)),
            "variant": variant,
            "chunk": chunk,
            "command": _command(dtype, backend, new, chunk, options.exact),
        }
    write_golden(Path(out), arrays, meta)
    note(f"wrote {out}: {len(arrays)} arrays over {len(ids)} tokens")


def _run_meta(dtype: str, backend: str, exact: bool, config_sha256: str) -> dict[str, Any]:
    """What every golden file says of the run that made it."""
    return {
        "dtype": dtype,
        "backend": backend,
        "exact": exact or backend == "reference",
        "config_sha256": config_sha256,
    }


def _mistaken(backend: Backend, dtype: str, name: str) -> Backend:
    """The same model with a known mistake."""
    from refimpl.errors import InputError
    from refimpl.reference.model import ReferenceModel
    from refimpl.reference.variant import VARIANTS

    if name not in VARIANTS:
        raise InputError(f"no known mistake is called '{name}'; see: golden diagnose --list")
    if not isinstance(backend, ReferenceModel):
        raise InputError("--variant needs --backend reference: the engine makes no mistakes")
    return ReferenceModel(backend.weights.source, dtype, VARIANTS[name].flags)


def _dump_piece(
    model: str,
    tokens: str,
    out: str,
    choice: tuple[str, str, int | None, EngineOptions],
    layers: str | None,
    hidden_in: str | None,
    last: int | None,
    topk: int | None,
) -> None:
    import contextlib

    from refimpl.backends import limited_threads, model_path, open_backend, quiet
    from refimpl.golden.files import check_output, config_hash, read_tokens, write_golden
    from refimpl.golden.pieces import open_layers, piece_arrays, read_hidden

    check_output(Path(out), model, tokens, hidden_in)
    ids = read_tokens(read_text(tokens, "the list of ids"), tokens)
    backend, dtype, threads, options = choice
    needed = None if backend == "engine" else hidden_in is None
    source, (first, stop) = open_layers(model_path(model), layers or ":", needed)
    with limited_threads(threads), contextlib.closing(source), quiet():
        c = source.config
        rows = None
        if hidden_in is not None:
            rows = read_hidden(Path(hidden_in), first, len(ids), c.hidden_size)
        runs: Any = open_backend(source, backend, dtype, threads, options)
        note_residency(runs)
        try:
            arrays = piece_arrays(runs, ids, (first, stop), rows, last, topk)
        finally:
            if hasattr(runs, "close"):
                runs.close()
        engine = f" --backend engine{' --exact' if options.exact else ''}"
        command = f"refimpl golden dump --dtype {dtype} --layers {first}:{stop}"
        meta = {
            **_run_meta(dtype, backend, options.exact, config_hash(c)),
            "command": command + (engine if backend == "engine" else ""),
        }
    write_golden(Path(out), arrays, meta)
    note(f"wrote {out}: layers {first} to {stop - 1}, {len(arrays['positions'])} rows")


def _command(dtype: str, backend: str, new: int, chunk: int | None, exact: bool) -> str:
    rest = ("" if chunk is None else f" --chunk {chunk}") + (" --exact" if exact else "")
    return f"refimpl golden dump --dtype {dtype} --backend {backend} --new {new}{rest}"


@golden.command(short_help="Name the first layer in which two runs part.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=Real(min=0),
    metavar="X",
    help="Largest difference in units of max(1, rms) [default: by the less precise run: "
    "1e-9 float64, 5e-5 float32, 1e-2 float16, 5e-2 bf16].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def compare(ctx: click.Context, a: str, b: str, tolerance: float | None, as_json: bool) -> None:
    """Compare golden files A and B and name the first layer that departs.

    Exit code 0: equal within the tolerance, 1: they differ, 2: they cannot be compared.

    \b
    Example:
      refimpl golden compare reference.npz mine.npz
    """
    from refimpl.golden.compare import compare as run
    from refimpl.golden.files import read_golden
    from refimpl.golden.pieces import aligned

    (arrays_a, meta_a), (arrays_b, meta_b) = read_golden(Path(a)), read_golden(Path(b))
    arrays_a, arrays_b, first = aligned(arrays_a, arrays_b)
    result = run(arrays_a, arrays_b, (_dtype(meta_a), _dtype(meta_b)), tolerance, first)
    click.echo(json.dumps(result.to_json()) if as_json else _table(result))
    if result.first_departure is not None:
        ctx.exit(DIFFERS)


def _dtype(meta: dict[str, Any]) -> str | None:
    value = meta.get("dtype")
    return value if isinstance(value, str) else None


def _table(result: Comparison) -> str:
    head = f"{'where':28} {'max':>9} {'rms':>9} {'NMSE':>9} {'KL mean':>9} {'KL p95':>9}"
    lines = [f"  {head} {'top-1':>6} {'top-5':>6}"]
    for d in result.differences:
        mark = "! " if d.departs else "  "
        numbers = " ".join(_number(x) for x in (d.max, d.rms, d.nmse, d.kl_mean, d.kl_p95))
        lines.append(f"{mark}{d.place:28} {numbers} {_share(d.top1)} {_share(d.top5)}".rstrip())
    if result.missing:
        lines.append(f"not in both files: {', '.join(result.missing)}")
    return "\n".join([*lines, *_verdict(result)])


def _verdict(result: Comparison) -> list[str]:
    first = result.first_departure
    if first is None:
        return [f"equal within {result.tolerance:g}"]
    verdict = f"differs from {first.place} on (tolerance {result.tolerance:g})"
    if first.margin is not None:
        verdict += f"; the routing margin there is {first.margin:.2g} in A"
    return [*_values(first), verdict]


def _values(d: Difference) -> list[str]:
    return [f"{d.place}{index}: {x:.9g} in A, {y:.9g} in B" for index, x, y in d.first]


def _number(value: float | None) -> str:
    return f"{'':9}" if value is None else f"{value:9.2e}"


def _share(value: float | None) -> str:
    return f"{'':6}" if value is None else f"{100 * value:5.1f}%"

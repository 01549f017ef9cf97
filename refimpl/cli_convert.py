"""The command `refimpl convert`: parse and print."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from refimpl.cli_support import note, progress_bar

if TYPE_CHECKING:
    from pathlib import Path

TYPES = [
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl",
    "iq4_xs", "q4_0", "fp8",
]  # fmt: skip


@click.command(short_help="Write a checkpoint in another form or type.")
@click.argument("src")
@click.argument("out")
@click.option(
    "--type",
    "file_type",
    required=True,
    type=click.Choice(TYPES),
    help="How matrices are stored, in a GGUF file with llama.cpp's default mixture of types for "
    "each, vectors and routers f32; fp8 is for folders (the routed experts, as published).",
)
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layers out.")
@click.option("--mtp-model", metavar="PATH", help="Second checkpoint that holds the MTP layers.")
@click.option("--name", metavar="TEXT", help="general.name of a GGUF file [default: SRC's name].")
@click.option("--force", is_flag=True, help="Replace a GGUF file that is there already.")
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Threads that quantise. [default: physical cores]",
)
@click.pass_context
def convert(
    ctx: click.Context,
    src: str,
    out: str,
    file_type: str,
    no_mtp: bool,
    mtp_model: str | None,
    name: str | None,
    force: bool,
    threads: int | None,
) -> None:
    """Write the checkpoint SRC (a folder, a GGUF file, or mini) as OUT.

    An OUT that ends in .gguf becomes a GGUF file that llama.cpp loads; any other becomes a
    Hugging Face folder (f32, f16, bf16, fp8). Tensors are read, quantised and written piece by
    piece, so a few hundred MB of memory do for any model. After Ctrl-C or a full disk the same
    command goes on where it stopped (OUT.partial).

    \b
    Examples:
      refimpl convert Step-3.5-Flash step-q4_k_s.gguf --type q4_k_s
      refimpl convert step-bf16.gguf step-iq4_xs.gguf --type iq4_xs --no-mtp
      refimpl convert trunk.gguf whole.gguf --type q6_k --mtp-model mtp.gguf
    """
    import time
    from pathlib import Path

    from refimpl.backends import EMBEDDED, model_path
    from refimpl.checkpoint.convert import convert as run

    if no_mtp and mtp_model is not None:
        raise click.UsageError("--mtp-model adds what --no-mtp leaves out; give one of them", ctx)
    if src == EMBEDDED:
        note(
            "note: mini is stored in 4 bits; its BF16 weights are the folder refimpl/mini/bf16 of "
            "the repository"
        )
    began = time.monotonic()
    with _notes_beside_a_bar() as (move, say):
        run(model_path(src), out, file_type, not no_mtp, move, name, force, say, threads, mtp_model)
    seconds = time.monotonic() - began
    note(f"wrote {out}: {_size(Path(out)) / 1e6:,.1f} MB in {seconds:.1f} s")


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))


@contextlib.contextmanager
def _notes_beside_a_bar() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A progress bar and a function for remarks, which wait while the bar is drawn."""
    waiting: list[str] = []
    moving = False
    try:
        with progress_bar("writing", in_bytes=True) as bar:

            def move(done: int, total: int) -> None:
                nonlocal moving
                moving = True
                bar(done, total)

            def say(remark: str) -> None:
                if moving:
                    waiting.append(remark)
                else:
                    note(f"note: {remark}")

            yield move, say
    finally:
        for remark in waiting:
            note(f"note: {remark}")

"""The command `refimpl convert`: parse and print."""

from __future__ import annotations

import click

from refimpl.cli_support import note, progress_bar

TYPES = [
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl",
    "iq4_xs", "q4_0",
]  # fmt: skip


@click.command()
@click.argument("src")
@click.argument("out")
@click.option(
    "--type",
    "file_type",
    required=True,
    type=click.Choice(TYPES),
    help="How matrices are stored, with llama.cpp's default mixture of types for each; vectors "
    "and routers stay f32.",
)
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layers out.")
@click.option("--name", metavar="TEXT", help="general.name of a GGUF file [default: SRC's name].")
def convert(src: str, out: str, file_type: str, no_mtp: bool, name: str | None) -> None:
    """Write the checkpoint SRC (a folder, a GGUF file, or mini) as OUT.

    An OUT that ends in .gguf becomes a GGUF file that llama.cpp loads; any other becomes a
    Hugging Face folder (f32, f16, bf16).

    \b
    Example:
      refimpl convert Step-3.5-Flash step-q4_k_s.gguf --type q4_k_s
    """
    from refimpl.backends import model_path
    from refimpl.checkpoint.convert import convert as run

    with progress_bar("writing") as move:
        notes = run(model_path(src), out, file_type, not no_mtp, move, name)
    for remark in notes:
        note(f"note: {remark}")
    note(f"wrote {out}")

"""The command `refimpl synth`: parse and print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refimpl.cli_support import note, progress_bar

_TYPES = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
    "iq4_nl", "iq4_xs",
]  # fmt: skip
_SLICE = {"experts": 64, "vocab": 16384}


@click.command(short_help="Write a random checkpoint.")
@click.argument("out")
@click.option(
    "--preset",
    type=click.Choice(["tiny_a", "tiny_b", "slice", "published"]),
    default="tiny_a",
    show_default=True,
    help="tiny_a, tiny_b: a few MB in which every feature bites; slice: five layers of the "
    "published model's widths; published: all of its 45 layers and 288 experts.",
)
@click.option(
    "--type",
    "file_type",
    type=click.Choice([*_TYPES, "fp8"]),
    default="bf16",
    show_default=True,
    help="How matrices are stored: in a folder f32, f16, bf16, or fp8 (the routed experts, the "
    "rest bf16, as published); in a GGUF file any but fp8, of which q4_k_s (the official "
    "file's), q4_k_m and q5_k_m are mixtures (tiny presets: those of convert).",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="S",
    help="Seed of the weights.",
)
@click.option("--experts", type=int, metavar="N", help="Experts of the slice. [default: 64]")
@click.option("--vocab", type=int, metavar="N", help="Its vocabulary. [default: 16384]")
@click.option("--mtp", type=int, metavar="N", help="MTP layers [default: tiny all, others 0].")
@click.option(
    "--sparse",
    is_flag=True,
    help="slice and published as .gguf: real norms, routers and embeddings, holes for the rest: "
    "111.5 GB that take 0.5 GB of disk, to try what opening and memory do at full size.",
)
def synth(
    out: str, preset: str, file_type: str, seed: int, mtp: int | None, sparse: bool, **sizes: Any
) -> None:
    """Write a random checkpoint OUT: a .gguf file, or else a Hugging Face folder.

    Weights are scaled so that activations keep about unit variance. A tiny checkpoint holds
    exactly quantised values; the slice is written straight as random valid blocks, several GB in
    seconds. The same seed gives the same bytes.

    \b
    Examples:
      refimpl synth tiny --preset tiny_a --type f32
      refimpl synth slice.gguf --preset slice --type q4_k_s --experts 64
      refimpl synth full.gguf --preset published --type q4_k_s --sparse
    """
    from refimpl.checkpoint.slice import published_config, slice_config, write_random
    from refimpl.errors import InputError

    path = Path(out)
    if preset != "slice" and (given := [n for n, size in sizes.items() if size is not None]):
        raise InputError(f"--{given[0]} goes with --preset slice, not with {preset}")
    with progress_bar("writing") as move:
        if preset == "slice":
            wanted = {**_SLICE, **{n: size for n, size in sizes.items() if size is not None}}
            config = slice_config(wanted["experts"], wanted["vocab"], mtp or 0)
            write_random(config, path, file_type, seed, move, sparse)
        elif preset == "published":
            write_random(published_config(mtp or 0), path, file_type, seed, move, sparse)
        elif sparse:
            raise InputError(f"--sparse goes with slice and published, not with {preset}")
        else:
            _tiny(path, preset, file_type, seed, mtp)
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))
    note(f"wrote {out}: {size:,} bytes")


def _tiny(out: Path, preset: str, file_type: str, seed: int, mtp: int | None) -> None:
    import tempfile

    from refimpl.checkpoint.convert import convert
    from refimpl.checkpoint.synth import PRESETS, synthesize
    from refimpl.errors import InputError

    config = PRESETS[preset]()
    have = config.num_nextn_predict_layers
    if mtp not in (None, 0, have):
        raise InputError(f"{mtp} MTP layers asked for; {preset} has {have}, or 0")
    config = config.without_mtp() if mtp == 0 else config
    if out.suffix != ".gguf":
        synthesize(config, seed, out, file_type)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = synthesize(config, seed, Path(folder) / out.stem, "f32")
        convert(source, out, file_type)

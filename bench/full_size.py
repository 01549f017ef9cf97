"""The engine at full size on a machine that cannot hold the weights.

    python -m bench.full_size full.gguf --out reports/cpu_engine/full_size.json

`full.gguf` is a file of the published layout (`refimpl synth full.gguf --preset published --type
q4_k_s --sparse`: its holes read as zeros, so speeds are those of memory and page faults, never of
a disk) or any other GGUF file. Measured: opening, inspecting, decoding, and decoding at a depth
whose keys and values are random, with the KV bytes in memory beside what the cost model's ledger
says. Each decoding runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

_MICRO_BATCH = 512  # rows of a ring beyond its window, the engine's default


def _timed(*args: str) -> tuple[float, str]:
    """Seconds and output of a `refimpl` command in a new process."""
    code = "from refimpl.cli import main; main()"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return time.perf_counter() - began, done.stdout


def opening(model: Path) -> dict[str, Any]:
    """Seconds to open and check all tensors, to be ready for the first token, and to inspect."""
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.engine.model import EngineModel

    seconds, _ = _timed("inspect", str(model), "--json")
    EngineModel(open_checkpoint(model)).close()  # compiles what is not compiled yet
    began = time.perf_counter()
    source = open_checkpoint(model)
    opened = time.perf_counter()
    EngineModel(source).close()
    return {
        "apparent_bytes": model.stat().st_size,
        "disk_bytes": 512 * model.stat().st_blocks,
        "inspect_command_s": seconds,
        "open_s": opened - began,
        "engine_ready_s": time.perf_counter() - opened,
    }


def decoding(model: Path, depth: int, tokens: int, kv_type: str) -> dict[str, Any]:
    """One `refimpl bench` record, cut to speed and memory, and the ledger's KV bytes."""
    from hwmodel.memory import kv_bytes
    from hwmodel.model import shape_of_config
    from refimpl.checkpoint.listing import list_checkpoint

    command = ["bench", "-m", str(model), "-p", "0", "-n", str(tokens), "-d", str(depth), "-r", "1"]
    command += ["--kv-type", kv_type, "--json"] + (["--synthetic-kv"] if depth else [])
    (record,) = json.loads(_timed(*command)[1])
    shape = shape_of_config(list_checkpoint(model).config, model.name)
    context = depth + tokens
    kept = ("n_depth", "n_gen", "n_threads", "type_k", "simd", "synthetic_kv", "avg_ts",
            "weight_bytes_per_step", "kv_bytes_per_step", "resident", "cpu_info",
            "build_commit")  # fmt: skip
    return {
        **{name: record[name] for name in kept},
        "ledger_kv_bytes": kv_bytes(shape, context, kv_type, "window", _MICRO_BATCH),
    }


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write [default: stdout]")
@click.option("--depth", type=int, default=262_132, show_default=True, help="Of the deep decoding.")
@click.option("--tokens", type=int, default=8, show_default=True, help="Decoded in each run.")
@click.option("--kv-type", "kv_types", multiple=True, default=("f16", "q8_0"), show_default=True)
def main(model: Path, out: Path | None, depth: int, tokens: int, kv_types: tuple[str, ...]) -> None:
    """Measure a GGUF file at full size."""
    runs = [decoding(model, 0, tokens, "f16")]
    runs += [decoding(model, depth, tokens, kv_type) for kv_type in kv_types]
    record = {"model": model.name, "opening": opening(model), "decoding": runs}
    text = json.dumps(record, indent=1) + "\n"
    if out is None:
        click.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}", err=True)


if __name__ == "__main__":
    main()

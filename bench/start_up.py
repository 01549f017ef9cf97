"""How long `refimpl generate` takes to start: with nothing compiled, and with kernels on disk.

    python -m bench.start_up --out reports/cpu_engine/start_up.json

Every run is the whole command in a new process. The cold ones have an empty folder for compiled
kernels each; Python's own compiled modules and the weights are where they were. Files are in
memory: a first run after switching on reads them from disk besides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench.markdown import markdown

FILE = "start_up.json"
TOKENS = 8
PROMPT = "def fibonacci(n):"
_ANNOUNCED = "compiling kernels"
_LIMITS_S = {"cold": 15.0, "warm": 1.0}  # for the first text


def start(cache: Path) -> dict[str, Any]:
    """Run the command once with kernels kept in `cache`.

    Returns:
        Seconds from the start of the process to the first text and to its end, and whether
        compiling was announced.

    Raises:
        click.ClickException: the command failed; its own words.
    """
    code = "from refimpl.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", PROMPT, "--max-new-tokens", str(TOKENS)]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    with tempfile.TemporaryFile() as notes:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=notes, env=env) as run:
            assert run.stdout is not None
            text = run.stdout.read(1)
            first = time.perf_counter() - began
            text += run.stdout.read()
        whole = time.perf_counter() - began
        notes.seek(0)
        said = notes.read().decode("utf-8", "replace")
    if run.returncode or not text:
        raise click.ClickException((said.strip().splitlines() or ["no text was written"])[-1])
    return {"first_text_s": first, "whole_s": whole, "announced": _ANNOUNCED in said}


def measure(cold: int, warm: int) -> dict[str, Any]:
    """So many runs with an empty folder of kernels, then with a full one."""
    from refimpl.benchmark.host import build_commit, cpu_name
    from refimpl.engine.simd import choose_simd

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(cold)]
        firsts = [start(folder) for folder in folders]
        again = [start(folders[-1]) for _ in range(warm)]
    return {
        "host": f"{cpu_name()}, {os.cpu_count()} threads",
        "build": build_commit(),
        "kernels": choose_simd().sources,
        "command": f"refimpl generate '{PROMPT}' --max-new-tokens {TOKENS}",
        "cold": firsts,
        "warm": again,
    }


def section(record: dict[str, Any] | None) -> list[str]:
    """The report's paragraphs in Markdown; none without a record."""
    if record is None:
        return []
    rows = []
    for kind, what in (("cold", "nothing compiled"), ("warm", "kernels compiled earlier")):
        runs: Sequence[dict[str, Any]] = record[kind]
        firsts = [r["first_text_s"] for r in runs]
        announced = sum(r["announced"] for r in runs)
        rows.append((
            what, str(len(runs)), _seconds(firsts), _seconds([r["whole_s"] for r in runs]),
            f"{announced} of {len(runs)}",
            f"at most {_LIMITS_S[kind]:g}",
            "reached" if median(firsts) <= _LIMITS_S[kind] else "short",
        ))  # fmt: skip
    header = ("kernels", "runs", "first text, s", "whole command, s", "compiling announced",
              "demand on the first text, s", "verdict")  # fmt: skip
    return [
        "## Start",
        f"`{record['command']}` with the embedded model, each run in a process of its own; medians "
        f"and ranges ({record['host']}, refimpl {record['build']} kernels {record['kernels']}). "
        "Made by `python -m bench.start_up`.",
        markdown(header, rows),
    ]


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def read_record(path: Path) -> dict[str, Any] | None:
    """What was measured, or None where nothing was.

    Raises:
        RunFileError: the file is not JSON.
    """
    from hwmodel.errors import RunFileError

    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFileError(f"{path}: not JSON ({error}); run python -m bench.start_up") from None
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--cold", type=click.IntRange(min=1), default=2, show_default=True, metavar="N",
              help="Runs with nothing compiled.")  # fmt: skip
@click.option("--warm", type=click.IntRange(min=1), default=5, show_default=True, metavar="N",
              help="Runs after them.")  # fmt: skip
def main(out: Path | None, cold: int, warm: int) -> None:
    """Measure cold and warm starts of 'refimpl generate'."""
    from hwmodel.files import check_writable, write_whole

    if out is not None:
        try:
            check_writable(out)
        except OSError as error:
            raise click.BadParameter(f"{out}: {error.strerror}", param_hint="--out") from None
    record = measure(cold, warm)
    if out is not None:
        write_whole(out, (json.dumps(record, indent=1) + "\n").encode())
    click.echo("\n\n".join(section(record)))


if __name__ == "__main__":
    main()

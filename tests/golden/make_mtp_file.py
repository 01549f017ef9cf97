"""Records the two files that llama.cpp's converter writes with --no-mtp and --mtp.

    python tests/golden/make_mtp_file.py --llama-cpp DIR

DIR and what is needed: as in make_converter.py. Writes tests/golden/mtp_file.json: for each of the
two files of tiny_a in BF16 its keys and, by name, type, dimensions and the start of the SHA-256 of
every tensor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from make_converter import HERE, SEED, describe, run_converter

OPTIONS = {"main": "--no-mtp", "mtp": "--mtp"}


def recorded(llama_cpp: Path, title: str) -> dict[str, Any]:
    """What one of the two files holds."""
    sys.path.insert(0, str(llama_cpp / "gguf-py"))  # its own `gguf`, before anything loads another
    from refimpl.checkpoint.synth import PRESETS, synthesize

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = synthesize(PRESETS["tiny_a"](), SEED, work / "tiny_a")
        run_converter(llama_cpp, folder, "bf16", work / "out.gguf", OPTIONS[title])
        return describe(work / "out.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True)
    llama_cpp = parser.parse_args().llama_cpp.resolve()
    record: dict[str, Any] = {
        "seed": SEED,
        "preset": "tiny_a",
        "by": "llama.cpp convert_hf_to_gguf.py",
    }
    # The converter keeps its options in classes, so each file has a process of its own.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for title in OPTIONS:
            record[title] = processes.submit(recorded, llama_cpp, title).result()
    out = HERE / "mtp_file.json"
    text = json.dumps(record, ensure_ascii=False)
    out.write_text(text.replace("], [", "],\n[").replace('": {', '":\n{') + "\n")
    print(f"wrote {out.name}, {out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()

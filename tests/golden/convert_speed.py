"""How fast `refimpl convert` is beside llama-quantize, on the same file and machine.

    python tests/golden/convert_speed.py --llama-quantize PATH [--rounds N] [--types q4_k_s ...]

PATH is llama.cpp's program. A BF16 file of five layers of the published widths (8 experts, random
weights) is written once into the work folder and read into memory; then the two programs convert
it in turns, each as a whole process with all cores, and the sizes of what they write are compared.
`refimpl convert` also forces its file to disk, llama-quantize does not. Rounds are added to those
in reports/convert_speed.json; both kinds of file may be deleted at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from refimpl.benchmark.host import build_commit, cpu_name
from refimpl.checkpoint.slice import slice_config, write_random
from refimpl.inventory import gguf_inventory

RECORD = Path(__file__).resolve().parents[2] / "reports" / "convert_speed.json"
CONFIG = slice_config(8, 4096, 0)
SEED = 1
OURS = [sys.executable, "-c", "from refimpl.cli import main; main()", "convert"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("checkpoints"), help="for 2.3 GB")
    parser.add_argument("--types", nargs="+", default=["q4_k_s"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = args.work / "convert-speed-bf16.gguf"
    if not source.exists():
        write_random(CONFIG, source, "bf16", SEED)
    rounds = json.loads(args.out.read_text())["rounds"] if args.out.exists() else []
    for kind in args.types:
        warm(source, args.work, kind)
        for _ in range(args.rounds):
            rounds.append(one_round(args.llama_quantize, source, args.work, kind))
            print(json.dumps(rounds[-1]), file=sys.stderr)
    record = {
        "by": "llama.cpp as vendored by llama-cpp-python 0.3.36",
        "weights": sum(spec.elements for spec in gguf_inventory(CONFIG)),
        "rounds": rounds,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(table(record)))


def warm(source: Path, work: Path, kind: str) -> None:
    """One conversion that is not counted: the source is in memory then, the quantisers compiled."""
    out = work / "convert-speed-ours.gguf"
    seconds([*OURS, str(source), str(out), "--type", kind, "--force"])
    out.unlink()


def one_round(program: Path, source: Path, work: Path, kind: str) -> dict[str, Any]:
    """Both programs once."""
    theirs, ours = (work / f"convert-speed-{n}.gguf" for n in ("theirs", "ours"))
    own = [*OURS, str(source), str(ours), "--type", kind, "--force"]
    times = {
        "refimpl_s": seconds(own),
        "llama_quantize_s": seconds([str(program), str(source), str(theirs), kind.upper()]),
    }
    sizes = {path.stat().st_size for path in (ours, theirs)}
    if max(sizes) - min(sizes) > 1 << 20:  # keys differ by a little, tensors must not
        raise SystemExit(f"the two files of {kind} differ in size: {sorted(sizes)}")
    for path in (ours, theirs):
        path.unlink()
    host = f"{cpu_name()}, {os.cpu_count()} threads"
    return {"type": kind, "host": host, "build": build_commit(), **times}


def seconds(command: list[str]) -> float:
    """Time of a process that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return round(took, 3)


def table(record: dict[str, Any]) -> list[str]:
    """Medians by type, as Markdown."""
    lines = [
        "| type | rounds | refimpl convert, s | llama-quantize, s | times as fast |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(r["type"] for r in record["rounds"]):
        some = [r for r in record["rounds"] if r["type"] == kind]
        ours, theirs = ([r[k] for r in some] for k in ("refimpl_s", "llama_quantize_s"))
        ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
        lines.append(f"| {kind} | {len(some)} | {spread(ours)} | {spread(theirs)} | {ratio:.1f} |")
    return lines


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

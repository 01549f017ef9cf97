"""Perplexity of the embedded model in F32: `refimpl perplexity` beside llama-perplexity.

    python tests/golden/perplexity_llamacpp.py --llama-perplexity PATH [--chunks N]

PATH is llama.cpp's program. Both read the same F32 file, converted here, and the same text, the
held-out documents; llama.cpp keeps F32 keys and values and leaves flash attention off, so that
both compute in float32. Writes reports/llamacpp_perplexity.json: the running perplexity after
every chunk as llama.cpp prints it (four digits), ours over the same chunks, and the two finals.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backends import open_model
from refimpl.checkpoint.convert import convert
from refimpl.mini import data
from refimpl.mini.measure_types import CONTEXT, held_documents
from refimpl.quality.perplexity import measure
from refimpl.quality.windows import bos_of, windows_of

RECORD = Path(__file__).resolve().parents[2] / "reports" / "llamacpp_perplexity.json"
_CHUNK = re.compile(r"\[(\d+)\]([0-9.]+),")
_FINAL = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-perplexity", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file, text = Path(name) / "mini-f32.gguf", Path(name) / "held-out.txt"
        convert(data.HERE / "bf16", file, "f32")
        made = compared(args.llama_perplexity, file, text, args.chunks)
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    print(sentence(made))


def compared(program: Path, file: Path, text: Path, chunks: int) -> dict[str, Any]:
    """Both programs over the first `chunks` chunks of the held-out text."""
    with open_model(file, "reference") as model:
        assert model.tokenizer is not None
        text.write_text("".join(held_documents(model.tokenizer)), encoding="utf-8")
        ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))
        windows = windows_of(ids, model.backend.config, CONTEXT, None, bos_of(model.tokenizer))
        ours = [measure(model.backend, [w]) for w in windows[:chunks]]
    command = [
        program, "-m", file, "-f", text, "-c", CONTEXT, "--chunks", chunks, "-b", CONTEXT,
        "-ctk", "f32", "-ctv", "f32", "-fa", "off",
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, errors="replace"
    )
    said = done.stdout + done.stderr
    final = _FINAL.search(said)
    if done.returncode or final is None:
        raise SystemExit(f"{program} failed:\n{said[-2000:]}")
    nats = np.array([p.nats_per_token.value for p in ours])
    tokens = np.array([p.judged_tokens for p in ours])
    running = np.exp(np.cumsum(nats * tokens) / np.cumsum(tokens))
    theirs = [float(value) for _, value in _CHUNK.findall(said)]
    if len(theirs) != len(running):
        raise SystemExit(f"{program} judged {len(theirs)} chunks, expected {len(running)}")
    return {
        "by": "llama.cpp as vendored by llama-cpp-python 0.3.36",
        "context": CONTEXT,
        "chunks": len(theirs),
        "judged_tokens": int(tokens.sum()),
        "llamacpp": {"final": float(final[1]), "running": theirs},
        "refimpl": {
            "final": math.exp(float((nats * tokens).sum() / tokens.sum())),
            "running": [round(float(x), 6) for x in running],
        },
    }


def sentence(made: dict[str, Any]) -> str:
    """The comparison in words."""
    ours, theirs = made["refimpl"], made["llamacpp"]
    pairs = list(zip(ours["running"], theirs["running"], strict=True))
    equal = sum(f"{a:.4f}" == f"{b:.4f}" for a, b in pairs)
    worst = max(abs(a - b) for a, b in pairs)
    return (
        f"F32 perplexity of the embedded model over {made['chunks']} chunks of {made['context']} "
        f"tokens ({made['judged_tokens']:,} judged): refimpl {ours['final']:.4f}, llama-perplexity "
        f"{theirs['final']:.4f}; {equal} of {len(pairs)} running figures equal in all four digits "
        f"printed, the largest difference {worst:.1e}."
    )


if __name__ == "__main__":
    main()

"""Greedy text of the embedded model: llama.cpp against the reference, on the same GGUF files.

Run: python tests/golden/greedy_llamacpp.py F32.gguf INT4.gguf [--out reports/llamacpp_greedy.json]
     (needs llama-cpp-python; make the F32 file with `refimpl convert refimpl/mini/bf16 F32.gguf
     --type f32`)

Both run every prompt greedily with F32 keys and values. Where the tokens part, the script gives
the first position, the reference's margin between its two best logits there, and the largest
logit difference over the common text before it: a parting is honest when the margin is below
that error. llama.cpp quantises activations to 8 bits for Q4_0 and Q8_0 weights, the reference
does not, so only the F32 file must agree everywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from make_llamacpp import Context, load

from refimpl.checkpoint.open import open_checkpoint
from refimpl.mini import prompts
from refimpl.reference.model import ReferenceModel
from refimpl.text.tokenizer import tokenizer_of

Array = np.ndarray[Any, Any]
PROMPT_TOKENS = 96  # the end of each prompt: llama.cpp's context of the golden scripts is 256
NEW_TOKENS = 128


def ours(model: ReferenceModel, prompt: list[int]) -> tuple[list[int], Array]:
    """Greedy tokens (N,) and their logits (N, V)."""
    cache = model.new_cache(len(prompt) + NEW_TOKENS)
    rows = [model.prefill(prompt, cache).logits[-1]]
    while len(rows) < NEW_TOKENS:
        rows.append(model.decode([int(rows[-1].argmax())], cache).logits[0])
    return [int(r.argmax()) for r in rows], np.stack(rows)


def theirs(model: Any, prompt: list[int]) -> tuple[list[int], Array]:
    """The same from llama.cpp."""
    context = Context(model, mtp=False, whole_cache=False)
    rows = [context.run(prompt, 0)[0][-1]]
    while len(rows) < NEW_TOKENS:
        at = len(prompt) + len(rows) - 1
        rows.append(context.run([int(rows[-1].argmax())], at)[0][-1])
    context.close()
    return [int(r.argmax()) for r in rows], np.stack(rows)


def compare(path: Path, texts: list[str]) -> dict[str, Any]:
    """All prompts on one file."""
    tokenizer = tokenizer_of(path)
    assert tokenizer is not None
    reference, peer = ReferenceModel(open_checkpoint(path), "float32"), load(path)
    records = []
    for text in texts:
        prompt = tokenizer.encode(text)[-PROMPT_TOKENS:]
        (a, x), (b, y) = ours(reference, prompt), theirs(peer, prompt)
        parts = next((i for i in range(NEW_TOKENS) if a[i] != b[i]), None)
        common = NEW_TOKENS if parts is None else parts + 1  # logits follow common text so far
        difference = np.abs(x[:common] - y[:common])
        record: dict[str, Any] = {
            "parts_at": parts,
            "max_logit_difference": float(difference.max()),
            "rms_logit_difference": float(np.sqrt(np.mean(difference**2))),
        }
        if parts is not None:
            best = np.sort(x[parts])
            record["margin"] = float(best[-1] - best[-2])
        records.append(record)
    llama_cpp.llama_model_free(peer)
    return {"file": path.name, "new_tokens": NEW_TOKENS, "prompts": records}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    texts = [p.text for p in prompts.load()]
    results = [compare(path, texts) for path in args.files]
    for result in results:
        runs = result["prompts"]
        same = sum(r["parts_at"] is None for r in runs)
        worst = max(r["max_logit_difference"] for r in runs)
        print(f"{result['file']}: {same} of {len(runs)} texts equal, max logit error {worst:.2g}")
        for i, r in enumerate(runs):
            if r["parts_at"] is not None:
                print(
                    f"  prompt {i}: parts at token {r['parts_at']}, margin {r['margin']:.2g}, "
                    f"logit error {r['max_logit_difference']:.2g}"
                )
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

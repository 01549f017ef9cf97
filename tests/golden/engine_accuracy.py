"""How far default arithmetic lies from float64: the engine and llama.cpp on the same GGUF files.

Run: python tests/golden/engine_accuracy.py [--out reports/engine_accuracy.json]
     (needs llama-cpp-python)

A checkpoint like `tiny_b`, in which every expert is selected, so that no choice can flip, but wide
enough for blocks of 256. Truth is the reference in float64 with the same dequantised weights. Both
keep keys and values in F32, so that only the arithmetic of products differs: llama.cpp quantises
activations to 8 bits in blocks of 32 (Q4_0, Q8_0, ...) or 256 (K-quants), the engine always of 32.
Given are root mean squares of logit errors over those of the logits, for prompts run in chunks of
1, of 3 and whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from make_llamacpp import Context, load

from refimpl.checkpoint.gguf_write import write_gguf
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.engine.model import EngineModel
from refimpl.reference.model import ReferenceModel

TYPES = ("q4_0", "q8_0", "iq4_nl", "q4_k_s", "q5_k_s", "q6_k", "iq4_xs")
TOKENS, SEEDS = 66, (1, 2, 3)
CHUNKS = {"1": 1, "3": 3, "whole": TOKENS}
WIDTH = 512

Array = np.ndarray[Any, Any]


def pieces(ids: list[int], size: int) -> list[tuple[int, list[int]]]:
    """First position and tokens of every chunk."""
    return [(at, ids[at : at + size]) for at in range(0, len(ids), size)]


def engine_logits(model: EngineModel, ids: list[int], size: int) -> Array:
    """Logits (T, V); up to 4 rows are decoded, more prefilled."""
    cache, rows = model.new_cache(len(ids)), []
    for _, piece in pieces(ids, size):
        if len(piece) <= 4:
            rows.append(model.decode(piece, cache).logits)
        else:
            rows.append(model.prefill(piece, cache, all_logits=True).logits)
    return np.concatenate(rows)


def peer_logits(model: Any, ids: list[int], size: int) -> Array:
    """The same from llama.cpp."""
    context = Context(model, mtp=False)
    rows = [context.run(piece, at)[0] for at, piece in pieces(ids, size)]
    context.close()
    return np.concatenate(rows)


def measure(path: Path, prompts: list[list[int]]) -> dict[str, dict[str, float]]:
    """Relative rms errors by chunk: engine, llama.cpp, and one over the other."""
    source = open_checkpoint(path)
    truth = ReferenceModel(source, "float64")
    exact = [truth.prefill(p, truth.new_cache(TOKENS), all_logits=True).logits for p in prompts]
    model, peer, found = EngineModel(source, kv_type="f32"), load(path), {}
    for name, size in CHUNKS.items():
        errors = {
            who: np.sqrt(
                sum(
                    float(np.sum((run(by, p, size) - e) ** 2))
                    for p, e in zip(prompts, exact, strict=True)
                )
                / sum(float(np.sum(e**2)) for e in exact)
            )
            for who, run, by in (
                ("engine", engine_logits, model),
                ("llama.cpp", peer_logits, peer),
            )
        }
        found[name] = {**errors, "ratio": errors["engine"] / errors["llama.cpp"]}
    model.close()
    llama_cpp.llama_model_free(peer)
    return found


def main() -> None:
    """Write the figures as JSON and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("reports/engine_accuracy.json"))
    out = parser.parse_args().out
    config = dataclasses.replace(
        PRESETS["tiny_b"](),
        hidden_size=WIDTH, intermediate_size=WIDTH, moe_intermediate_size=WIDTH // 2,
        share_expert_dim=WIDTH // 2,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, TOKENS).tolist() for _ in SEEDS]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = synthesize(config, 1, Path(folder) / "wide", "f32")
        for kind in TYPES:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(open_checkpoint(checkpoint), path, kind)
            results[kind] = measure(path, prompts)
            path.unlink()
            for chunk, r in results[kind].items():
                print(f"{kind:8} {chunk:>5}: engine {r['engine']:.3e}, llama.cpp "
                      f"{r['llama.cpp']:.3e}, ratio {r['ratio']:.3f}", flush=True)  # fmt: skip
    record = {"tokens": TOKENS, "prompts": len(prompts), "width": WIDTH, "relative_rms": results}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A tiny checkpoint quantised by mlx-lm, and what mlx and mlx-lm make of it.

Run: python tests/golden/make_mlx_quantised.py [--out FOLDER]    (needs mlx and mlx-lm)

`mlx4/` is written by the functions that `mlx_lm.convert -q` calls (`load_model`, `quantize_model`,
`save_model`, `save_config`): 4 bits in groups of 64, the router at 8 bits, BF16 scales.
`mlx4_mlx.npz` holds the logits of mlx-lm's `step3p5` over that folder, with scales and norms cast
to float32 and everything computed in float32, and per tensor the SHA-256 of its float32 values as
`mx.dequantize` gives them. `mlx_bits.npz` holds for every bit width and group size packed codes,
scales and biases of `mx.quantize` on one seeded matrix, and `mx.dequantize` of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from golden_shared import FOLDER, PROMPT_TOKENS, Array, tiny_quantised
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from refimpl.checkpoint.synth import synthesize

SEED = 12


def make_folder(out: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        source = synthesize(tiny_quantised(), SEED, Path(work) / "hf", "bf16")
        model, config = load_model(source)
        model, config = quantize_model(model, config, group_size=64, bits=4)
        save_model(out, model)
        save_config(config, config_path=out / "config.json")
    (out / "model.safetensors.index.json").unlink()  # one file needs none


def logits(folder: Path) -> Array:
    """(T, V) float32 over the seeded prompt."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(prompt())[None])[0])


def prompt() -> Array:
    rng = np.random.Generator(np.random.PCG64(SEED))
    return rng.integers(0, tiny_quantised().vocab_size, PROMPT_TOKENS, dtype=np.int64)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the float32 values of every quantised matrix, by name."""
    stored = mx.load(str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())["quantization"]
    result = {}
    for name, packed in stored.items():
        module = name.removesuffix(".weight")
        if packed.dtype != mx.uint32:
            continue
        form = {k: config.get(module, config)[k] for k in ("bits", "group_size")}
        scales, biases = (stored[f"{module}.{k}"].astype(mx.float32) for k in ("scales", "biases"))
        values = np.array(mx.dequantize(packed, scales, biases, **form))
        assert values.dtype == np.float32
        result[name] = hashlib.sha256(values.tobytes()).hexdigest()
    return result


def every_width() -> dict[str, Array]:
    rng = np.random.Generator(np.random.PCG64(SEED))
    matrix = mx.array(rng.standard_normal((4, 256), dtype=np.float32))
    arrays = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            packed, scales, biases = mx.quantize(matrix, group_size=group, bits=bits)
            back = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
            parts = {"packed": packed, "scales": scales, "biases": biases, "values": back}
            arrays |= {f"{bits}_{group}_{name}": np.array(a) for name, a in parts.items()}
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: here)")
    out = parser.parse_args().out
    mx.set_default_device(mx.cpu)
    folder = out / "mlx4"
    make_folder(folder)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx-lm", "mlx"))
    meta = np.array(json.dumps({"peer_version": versions, "sha256": digests(folder)}))
    np.savez_compressed(out / "mlx4_mlx.npz", meta=meta, prompt=prompt(), logits=logits(folder))
    np.savez_compressed(out / "mlx_bits.npz", meta=np.array(versions), **every_width())
    for file in (folder / "model.safetensors", out / "mlx4_mlx.npz", out / "mlx_bits.npz"):
        print(f"{file.name}: {file.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()

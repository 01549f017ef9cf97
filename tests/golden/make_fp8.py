"""A tiny FP8 checkpoint written by torch, and what transformers dequantises it to.

Run: python tests/golden/make_fp8.py [--out FOLDER]    (needs torch, transformers, safetensors)

The folder `fp8/` is in the published layout: BF16 but for the stacked routed experts, which are
float8_e4m3fn with a float32 `weight_scale_inv` for every block (16 x 16 here, so that the tiny
matrices have several). `fp8_transformers.npz` holds each expert tensor by its name as
`Fp8Dequantize` of transformers gives it, in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from golden_shared import FOLDER, tiny_quantised
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from refimpl.checkpoint.synth import random_weights
from refimpl.config_io import to_hf
from refimpl.inventory import inventory

BLOCK = 16
SEED = 11


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, out, in) float32 -> float8_e4m3fn of the same shape and scales (E, out/16, in/16)."""
    e, rows, columns = weight.shape
    blocks = weight.reshape(e, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(2, 4)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scales[:, :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(weight.shape), scales


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: here)")
    out = parser.parse_args().out
    config = tiny_quantised()
    weights = random_weights(config, SEED)
    tensors = {}
    for spec in inventory(config):
        value = torch.from_numpy(weights[spec.hf_name])
        if spec.role == "routed":
            codes, scales = quantised(value)
            tensors[spec.hf_name], tensors[f"{spec.hf_name}_scale_inv"] = codes, scales
        else:
            tensors[spec.hf_name] = value.to(torch.bfloat16)
    folder = out / "fp8"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    field = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    text = json.dumps(to_hf(config) | {"quantization_config": field}, indent=1)
    (folder / "config.json").write_text(text + "\n")

    stored = load_file(folder / "model.safetensors")
    theirs = Fp8Dequantize(None)
    arrays = {
        name: theirs._dequantize_one(value, stored[f"{name}_scale_inv"]).numpy()
        for name, value in stored.items()
        if value.dtype == torch.float8_e4m3fn
    }
    assert all(a.dtype == np.float32 for a in arrays.values())
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "torch"))
    path = out / "fp8_transformers.npz"
    np.savez_compressed(path, meta=np.array(json.dumps({"peer_version": versions})), **arrays)
    for file in (folder / "model.safetensors", path):
        print(f"{file.name}: {file.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()

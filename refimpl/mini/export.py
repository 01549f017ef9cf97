"""Write the trained masters in the published checkpoint layout.

    python -m refimpl.mini.export CHECKPOINT OUT

Matrices and norm weights (zero-centred, w and not 1 + w) are BF16, the expert selection biases
F32.  Config and tokenizer are copied beside them when OUT is another folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def export(checkpoint: Path, out: Path) -> int:
    """Write `out/model.safetensors`; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file

    from . import torch_model

    config = torch_model.read_config(HERE / "bf16")
    masters = torch.load(checkpoint, weights_only=True)["masters"]
    n = config["num_hidden_layers"]
    if f"model.layers.{n + 1}.eh_proj.weight" not in masters:
        from .train_mtp import clone_heads  # a checkpoint of the trunk phase

        clone_heads(masters, n, torch_model.MTP - 1)
    tensors = {}
    for name, shape in torch_model.shapes(config).items():
        if tuple(masters[name].shape) != shape:
            raise ValueError(f"{name}: shape {tuple(masters[name].shape)}, expected {shape}")
        kind = torch.float32 if name.endswith("router_bias") else torch.bfloat16
        tensors[name] = masters[name].to(kind).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.safetensors.part"
    save_file(tensors, str(part), metadata={"format": "pt"})
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.chmod(0o644)
    os.replace(part, out / "model.safetensors")
    if out.resolve() != (HERE / "bf16").resolve():
        for name in COMPANIONS:
            shutil.copyfile(HERE / "bf16" / name, out / name)
    return sum(t.numel() for t in tensors.values())


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    print(f"{export(args.checkpoint, args.out):,} parameters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

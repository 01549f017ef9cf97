"""The last phase: MTP-2 and MTP-3 start as copies of MTP-1, then all three are tuned together.

The trunk is frozen.  Hidden states are chained: each layer reads the previous layer's output
before its own norm.

    python -m refimpl.mini.train_mtp --data DIR --checkpoints DIR --steps N
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .train import CLIP, HERE, MUON_RATE, Log, environment_ready, norm_of, save_atomically

LOSS_WEIGHTS = (1.0, 0.7, 0.5)
PEAK = 0.5  # of the trunk's peak learning rates
WARM_UP = 20  # steps
DATA_SEED = 1000  # other windows than the trunk saw last


def clone_heads(masters: dict[str, Any], first: int, count: int) -> None:
    """Copy layer `first` (with its norm and output head) to the `count` layers after it."""
    source = f"model.layers.{first}."
    for name in [n for n in masters if n.startswith(source)]:
        for k in range(1, count + 1):
            target = f"model.layers.{first + k}." + name[len(source) :]
            masters[target] = masters[name].clone()


def chained(model: Any, window: Any) -> list[Any]:
    """window (B, T+1+3) -> the three MTP losses over a frozen trunk, nats/token."""
    import torch

    t = model.length
    with torch.no_grad():
        u = model.trunk(window[:, :t])
    losses = []
    for k in range(3):
        u = model.mtp(u, window[:, 1 + k : t + 1 + k], k)
        losses.append(model.mtp_head(u, window[:, 2 + k : t + 2 + k], k)[0])
    return losses


def run(args: argparse.Namespace) -> None:
    """Tune the three layers for `args.steps` steps; write `final.pt`."""
    import torch

    from . import data, torch_model
    from .optim import Optimiser

    torch.set_num_threads(2)
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    config = torch_model.read_config(HERE / "bf16")
    n = config["num_hidden_layers"]
    saved = torch.load(args.checkpoints / "latest.pt", weights_only=True)
    masters = saved["masters"]
    clone_heads(masters, n, torch_model.MTP - 1)
    heads = [f"model.layers.{n + k}." for k in range(torch_model.MTP)]
    tuned = {name: p for name, p in masters.items() if name.startswith(tuple(heads))}
    model = torch_model.Model(config, masters, args.length)
    model.trained = {name for name in model.plan if name.startswith(tuple(heads))}
    model.quantised = args.quantise
    model.copies.clear()
    model.refresh()
    optimiser = Optimiser(tuned, MUON_RATE)
    windows = data.Windows(args.data, args.length, DATA_SEED)
    log = Log(args.checkpoints / "training_log.jsonl")
    log.write({"event": "start_mtp", "trunk_step": saved["step"], "steps": args.steps})
    sums, start = [0.0] * 3, time.monotonic()
    for step in range(args.steps):
        losses = chained(model, torch.from_numpy(windows.batch(step)))
        total = sum(w * x for w, x in zip(LOSS_WEIGHTS, losses, strict=True))
        total.backward()
        grads = model.gradients()
        factor = PEAK * min((step + 1) / WARM_UP, 1.0) * (1 - step / args.steps)
        optimiser.step(grads, min(1.0, CLIP / (norm_of(grads) + 1e-6)), factor)
        model.refresh()
        sums = [s + x.item() for s, x in zip(sums, losses, strict=True)]
        if (step + 1) % 10 == 0:
            seconds = time.monotonic() - start
            mean = [round(s / 10, 5) for s in sums]
            log.write({"mtp_step": step + 1, "seconds": seconds, "mtp_losses": mean})
            sums = [0.0] * 3
    value = {"masters": masters, "step": saved["step"], "mtp_step": args.steps}
    save_atomically(value, args.checkpoints / "final.pt")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.train_mtp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by streams")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--quantise", action="store_true", help="Q4_0-aware")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    args = parser.parse_args(argv)
    environment_ready()
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

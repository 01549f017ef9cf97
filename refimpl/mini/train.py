"""Train the trunk and MTP-1.

    python -m refimpl.mini.train --data DIR --checkpoints DIR --steps N --decay-start D

The schedule is by step: warm-up, constant, then linear to zero from D to N.  The run can be
stopped (SIGTERM writes a checkpoint) and started again; N and D may then be other numbers as long
as both lie ahead, and the log records them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM_UP = 30  # steps
MTP_WEIGHTS = (0.3, 0.1)  # first and second half
BIAS_RATES = (0.01, 0.001, 0.0)  # first half, until 90 %, last 10 %
CLIP = 1.0
HELD_EVERY = 100  # steps
LOG_EVERY = 10  # steps
SAVE_EVERY_S = 300.0
EMBEDDING_STD = 1.0
MUON_RATE = 6e-3
FLOOR = 0.005  # of the peak rate, at the last step

# Without these a quarter of the time goes into page faults and kernel generation.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    "LRU_CACHE_CAPACITY": "8192",
    "OMP_NUM_THREADS": "2",
}


@dataclass(frozen=True)
class Settings:
    """What determines the run, beside the code and the corpus."""

    steps: int
    decay_start: int
    seed: int
    length: int
    quantise_from: int  # step from which matrices pass through Q4_0; beyond `steps` = never

    def rate(self, step: int) -> float:
        """Learning-rate factor of a step."""
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        if step < self.decay_start:
            return 1.0
        return max(FLOOR, (self.steps - step) / (self.steps - self.decay_start))

    def mtp_weight(self, step: int) -> float:
        """Weight of the MTP-1 loss."""
        return MTP_WEIGHTS[step >= self.steps // 2]

    def bias_rate(self, step: int) -> float:
        """Step of the expert selection bias."""
        return BIAS_RATES[(step >= self.steps // 2) + (step >= 0.9 * self.steps)]


def environment_ready() -> None:
    """Start the interpreter again with the allocator and cache settings, once."""
    if os.environ.get("MALLOC_TOP_PAD_") != ENVIRONMENT["MALLOC_TOP_PAD_"]:
        spec = __spec__
        name = spec.name if spec else __name__
        target = getattr(sys.modules["__main__"].__spec__, "name", name)
        arguments = [sys.executable, "-m", target, *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **ENVIRONMENT})


def save_atomically(value: Any, path: Path) -> None:
    """torch.save beside the target, flush to disk, rename."""
    import torch

    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Log:
    """JSON lines, appended and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, floats rounded to five digits."""
        short = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(short) + "\n")


def norm_of(grads: dict[str, Any]) -> float:
    """Global L2 norm."""
    import torch

    parts = torch._foreach_norm([g.float() for g in grads.values()])
    return float(torch.stack(parts).norm())


def held_losses(model: Any, windows: Any, mtp: int) -> list[float]:
    """Mean losses over the fixed held-out windows."""
    import torch

    rows = [
        torch.tensor([x.item() for x in model.losses(windows[i : i + 4], mtp)])
        for i in range(0, len(windows), 4)
    ]
    return [float(x) for x in torch.stack(rows).mean(0)]


class Run:
    """State of the training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from . import data, torch_model
        from .optim import Optimiser

        torch.set_num_threads(2)
        torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
        self.args = args
        never = args.quantise_from or 10**9
        self.settings = Settings(args.steps, args.decay_start, args.seed, args.length, never)
        config = torch_model.read_config(HERE / "bf16")
        args.checkpoints.mkdir(parents=True, exist_ok=True)
        self.file = args.checkpoints / "latest.pt"
        self.log = Log(args.checkpoints / "training_log.jsonl")
        saved = torch.load(self.file, weights_only=True) if self.file.exists() else None
        fresh = torch_model.initial(config, args.seed, EMBEDDING_STD)
        masters = saved["masters"] if saved else fresh
        trained = {n: p for n, p in masters.items() if not n.endswith("router_bias")}
        self.optimiser = Optimiser(trained, MUON_RATE)
        self.step, self.seconds = 0, 0.0
        if saved:
            if saved["seed"] != args.seed:
                raise SystemExit(f"the checkpoint has seed {saved['seed']}, not {args.seed}")
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.optimiser.state, self.optimiser.steps = saved["state"], saved["step"]
        if self.step >= min(args.steps, args.decay_start):
            print(f"note: step {self.step} is past the new schedule's bends", file=sys.stderr)
        self.model = torch_model.Model(config, masters, args.length)
        self.windows = data.Windows(args.data, args.length, args.seed)
        self.held = torch.from_numpy(data.held_windows(args.length))
        self.stop = False
        signal.signal(signal.SIGTERM, self._request_stop)
        self.log.write({"event": "start", "step": self.step, **asdict(self.settings)})

    def _request_stop(self, *_: object) -> None:
        self.stop = True

    def save(self) -> None:
        """Write the checkpoint with full optimiser state."""
        value = {"masters": self.model.masters, "state": self.optimiser.state, "step": self.step}
        save_atomically({**value, "seed": self.args.seed, "seconds": self.seconds}, self.file)

    def one_step(self) -> dict[str, float]:
        """One optimiser step; returns losses, gradient norm and expert load."""
        import torch

        s, step, model = self.settings, self.step, self.model
        model.quantised = step >= s.quantise_from
        window = torch.from_numpy(self.windows.batch(step))
        losses = model.losses(window, 1)
        (losses[0] + s.mtp_weight(step) * losses[1]).backward()  # type: ignore[no-untyped-call]
        grads = model.gradients()
        norm = norm_of(grads)
        self.optimiser.step(grads, min(1.0, CLIP / (norm + 1e-6)), s.rate(step))
        load = torch.stack(model.counts).float()  # (MoE layers, E)
        names = [n for n in model.masters if n.endswith("router_bias")]
        for name, counts in zip(names, load, strict=True):
            model.masters[name] += s.bias_rate(step) * torch.sign(counts.mean() - counts)
        model.refresh()
        self.step += 1
        busiest = load.max(1).values / load.mean(1)
        return {
            "loss": losses[0].item(),
            "mtp_loss": losses[1].item(),
            "grad_norm": norm,
            "load_mean": float(busiest.mean()),
            "load_worst": float(busiest.max()),
        }

    def loop(self) -> None:
        """Train until the last step or SIGTERM."""
        sums: dict[str, float] = {}
        saved_at = last = time.monotonic()
        while self.step < self.settings.steps and not self.stop:
            for key, value in self.one_step().items():
                sums[key] = sums.get(key, 0.0) + value / LOG_EVERY
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % LOG_EVERY == 0:
                record: dict[str, Any] = {
                    "step": self.step,
                    "tokens": self.step * 4 * self.settings.length,
                    "seconds": self.seconds,
                    **sums,
                    "rate": self.settings.rate(self.step - 1),
                }
                sums = {}
                if self.step % HELD_EVERY == 0 or self.step == self.settings.steps:
                    record["held"], record["mtp_held"] = held_losses(self.model, self.held, 1)
                self.log.write(record)
            if now - saved_at > SAVE_EVERY_S:
                self.save()
                saved_at = time.monotonic()
        self.save()
        self.log.write({"event": "stop", "step": self.step})


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by streams")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="N, total optimiser steps")
    parser.add_argument("--decay-start", type=int, required=True, help="D, first step of decay")
    parser.add_argument("--quantise-from", type=int, default=0, help="Q4_0-aware from this step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    args = parser.parse_args(argv)
    if not WARM_UP < args.decay_start < args.steps:
        parser.error("need warm-up < decay-start < steps")
    environment_ready()
    Run(args).loop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

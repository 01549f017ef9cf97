"""Configurations that the claims ask about, and their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hwmodel.candidate import Candidate
from hwmodel.devices import load_device, read_sources, read_toml
from hwmodel.engines import load_engine
from hwmodel.model import step_shape
from hwmodel.plan import Plan, make_plan
from hwmodel.predict import predict
from hwmodel.quantity import Quantity, read_quantity
from hwmodel.request import PlanRequest, make_request
from hwmodel.run import Estimate, Split
from hwmodel.search import make_candidate, splits_of, why_illegal

SHORT = 1024  # tokens of context that count as none


@dataclass(frozen=True)
class Speed:
    """A configuration and its decode speed."""

    candidate: Candidate
    drafts: int
    estimate: Estimate

    @property
    def tok_s(self) -> float:
        """Tokens/s of one sequence."""
        return self.estimate.value or 0.0

    @property
    def band(self) -> tuple[float, float]:
        """Lower and upper end."""
        return self.estimate.low or 0.0, self.estimate.high or 0.0

    @property
    def extrapolated(self) -> bool:
        """Beyond the measured runs."""
        return self.estimate.status != "calibrated"

    @property
    def command(self) -> str:
        """Prints the figure again."""
        c, depth = self.candidate, self.candidate.run.workload.depth
        quant = "FP8" if c.run.quant.name == "FP8-experts" else c.run.quant.name
        return (
            f"hwmodel sweep --device {c.device.name} --count {c.count} --quant {quant} "
            f"--engine {c.engine.name} --depths {depth} --drafts {self.drafts}"
        )

    @property
    def name(self) -> str:
        """`8x h100, sglang, FP8-experts`."""
        c = self.candidate
        return f"{c.count}x {c.device.name}, {c.engine.title}, {c.run.quant.name}"


def dated(*found: Speed | Candidate) -> tuple[str, ...]:
    """The engines of some configurations with version and date: `vLLM 0.28 (2026-08)`."""
    engines = [(f.candidate if isinstance(f, Speed) else f).engine for f in found]
    return tuple(dict.fromkeys(e.label for e in engines))


def at_the_launch(engine: str) -> Quantity:
    """Drafts that an engine could make with the model when the articles were written."""
    path = Path(__file__).parents[1] / "data" / "launch.toml"
    raw = read_toml(path)
    key = f"drafts.{engine}"
    return read_quantity(path, key, raw["drafts"][engine], read_sources(raw, path))


def priced(device: str, *keys: str) -> tuple[str, ...]:
    """Figures of a device file with their date: `price.buy_usd of rtx4090 (list price, 2022)`."""
    held = load_device(device)
    found = [(key, held.quantities.get(key)) for key in keys]
    return tuple(
        f"{key} of {held.name} ({', '.join(_origin(q))})" for key, q in found if q is not None
    )


def _origin(q: Quantity) -> list[str]:
    doubt = "" if q.is_verified else "unverified"
    return [text for text in (q.note, q.as_of, doubt) if text]


@lru_cache(maxsize=64)
def plan_for(
    device: str, count: int | None = None, context: int = 32768, quant: str | None = None,
    ram_gb: float | None = None,
) -> Plan:  # fmt: skip
    """The plan of a device."""
    request = make_request(
        device, step_shape(), context=context, count=count, quant=quant, ram_gb=ram_gb
    )
    return make_plan(request)


@lru_cache(maxsize=64)
def configurations(device: str, count: int, context: int = 8192) -> tuple[Candidate, ...]:
    """Every published type in every engine and legal split that holds the model."""
    request = make_request(device, step_shape(), context=context)
    return tuple(_all(request, count))


def _all(request: PlanRequest, count: int) -> Iterable[Candidate]:
    for engine in request.engines:
        for split in splits_of(engine, request.device, count):
            for quant in engine.published:
                if why_illegal(request.model, request.kind(quant), split, count) is None:
                    found = make_candidate(request, engine, split, count, quant)
                    if found.holds:
                        yield found


def at_speed(candidate: Candidate, drafts: int = 0, depth: int = SHORT, **work: object) -> Speed:
    """Decode of a configuration; drafts beyond those of its engine are cut off."""
    n = min(drafts, candidate.engine.max_drafts)
    run = candidate.at(depth=depth, drafts=n, **work)
    return Speed(dataclasses.replace(candidate, run=run), n, predict(run, "decode_tok_s"))


def fastest(devices: Sequence[str], counts: Sequence[int] = (1, 2, 4, 8), drafts: int = 3) -> Speed:
    """The fastest configuration of any of the devices, with so many drafts."""
    found = [at_speed(c, drafts) for d in devices for n in counts for c in configurations(d, n)]
    return max(found, key=lambda s: s.tok_s)


def fixed(
    device: str, count: int, quant: str, engine: str, split: Split = "single",
    context: int = 32768, kv_type: str = "f16", micro_batch: int | None = None,
) -> Candidate:  # fmt: skip
    """A configuration as stated, whether it holds the model or not."""
    request = make_request(device, step_shape(), context=context)
    return make_candidate(
        request, load_engine(engine), split, count, quant, kv_type=kv_type, micro_batch=micro_batch
    )


def holding(device: str, count: int, context: int = 8192) -> list[Candidate]:
    """llama.cpp's published types that so many devices hold by layer split, largest first."""
    found = [c for c in configurations(device, count, context) if c.engine.name == "llama.cpp"]
    return sorted(found, key=lambda c: -c.memory.weights_bytes)


def fewest(device: str, quant: str) -> int:
    """How many devices a type needs in llama.cpp, 0 where eight are too few."""
    able = (n for n in range(1, 9) if fixed(device, n, quant, "llama.cpp", "layer", 8192).holds)
    return next(able, 0)

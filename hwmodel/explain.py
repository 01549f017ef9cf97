"""A figure taken apart: its terms, the counts behind them, and where each number comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hwmodel.candidate import Candidate
from hwmodel.memory import kv_value_bytes, ledger
from hwmodel.operations import StepCounts, step_counts
from hwmodel.predict import predict
from hwmodel.quant import role_bytes
from hwmodel.run import Estimate, Quantity, RunConfig

Figure = Literal["memory", "decode", "prefill", "ttft"]
FIGURES: tuple[Figure, ...] = ("memory", "decode", "prefill", "ttft")
_QUANTITY: dict[str, Quantity] = {
    "decode": "decode_tok_s",
    "prefill": "prefill_tok_s",
    "ttft": "ttft_s",
}


@dataclass(frozen=True)
class Explanation:
    """One figure: `estimate` and `counts` are None for memory.

    `sources` are (number, value with unit, source) of every stated number that went in.
    """

    figure: Figure
    candidate: Candidate
    run: RunConfig
    depth: int
    estimate: Estimate | None
    counts: StepCounts | None
    sources: tuple[tuple[str, float, str], ...]


def explain(candidate: Candidate, figure: Figure, depth: int, drafts: int = 0) -> Explanation:
    """Take a figure apart.

    Args:
        depth: tokens in the cache for decode; length of the prompt for prefill and ttft.
    """
    if figure == "memory":
        run = candidate.at(drafts=drafts)
        return Explanation(figure, candidate, run, depth, None, None, _sources(candidate))
    decode = figure == "decode"
    work = {"depth": depth, "drafts": drafts} if decode else {"depth": 0, "prompt_tokens": depth}
    run = candidate.at(**work)
    counts = step_counts(
        run.model,
        run.quant,
        depth if decode else 0,
        1 + drafts if decode else max(1, depth),
        run.workload.concurrency if decode else 1,
        logit_rows=None if decode else 1,
        unfold=not decode and candidate.engine.latent_prompts == "heads",
    )
    estimate = predict(run, _QUANTITY[figure])
    return Explanation(figure, candidate, run, depth, estimate, counts, _sources(candidate))


def _sources(c: Candidate) -> tuple[tuple[str, float, str], ...]:
    found = [(f"{c.device.name} {k}", q.value, q.source) for k, q in c.device.quantities.items()]
    found += [
        (f"{c.engine.name} {k}", q.value, q.source)
        for k, q in c.engine.quantities.items()
        if k.startswith("memory.")
    ]
    return tuple(sorted(found))


def explanation_json(e: Explanation) -> dict[str, Any]:
    """The explanation as plain values; bytes, seconds, operations."""
    c = e.candidate
    found: dict[str, Any] = {
        "figure": e.figure,
        "device": c.device.name,
        "count": c.count,
        "engine": c.engine.name,
        "quant": c.run.quant.name,
        "depth": e.depth,
        "weights_bytes_by_role": role_bytes(c.run.model, c.run.quant),
        "parameters_by_role": c.run.model.parameters_by_role,
        "sources": [{"number": n, "value": v, "source": s} for n, v, s in e.sources],
    }
    if e.estimate is None:
        m = ledger(e.run, max(1, e.depth))
        names = ("weights", "kv", "compute", "mtp", "reserve", "usable", "margin", "host", "disk")
        found["memory"] = {f"{n}_bytes": getattr(m, f"{n}_bytes") for n in names}
        return found
    found.update(
        value=e.estimate.value,
        unit=e.estimate.unit,
        low=e.estimate.low,
        high=e.estimate.high,
        roofline=e.estimate.roofline,
        limiting=e.estimate.limiting,
        status=e.estimate.status,
        provenance=list(e.estimate.provenance),
        terms=[
            {"name": t.name, "seconds": t.seconds, "bytes": t.bytes, "flop": t.flop}
            for t in e.estimate.terms
        ],
    )
    if e.counts is not None:
        kv = kv_value_bytes(e.run.workload.kv_type)
        found["counts"] = {
            "multiply_adds": dict(e.counts.multiply_adds),
            "weight_bytes": dict(e.counts.weight_bytes),
            "kv_bytes_read": e.counts.kv_values_read * kv,
            "kv_bytes_written": e.counts.kv_values_written * kv,
            "state_bytes": e.counts.state_bytes,
        }
    return found

"""Figures over many configurations: devices side by side, and tidy sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from hwmodel.candidate import Candidate
from hwmodel.plan import Plan, make_plan
from hwmodel.predict import predict
from hwmodel.request import PlanRequest
from hwmodel.search import choose, closest

SWEEP_COLUMNS = (
    "device", "count", "engine", "backend", "quant", "split", "kv_type", "context", "depth",
    "concurrency", "drafts", "fits", "fits_with", "weights_bytes", "kv_bytes", "compute_bytes",
    "mtp_bytes", "usable_bytes", "margin_bytes", "quantity", "value", "low", "high", "roofline",
    "unit", "limiting", "status",
)  # fmt: skip


def compare_devices(requests: Sequence[PlanRequest]) -> list[Plan]:
    """One plan per request, in the order given."""
    return [make_plan(request) for request in requests]


def compare_row(plan: Plan) -> dict[str, Any]:
    """What stands side by side of a plan; speeds in tok/s, times in s, sizes in bytes."""
    c = plan.chosen
    short, full = plan.decode[0][1], plan.decode[-1][1]
    prompt = plan.prompts[len(plan.prompts) // 2]
    return {
        "device": plan.request.device.name,
        "holds": plan.holds,
        "fits": plan.fits,
        "fits_with": plan.fits_with or None,
        "count": c.count,
        "engine": c.engine.name,
        "quant": c.run.quant.name,
        "margin_bytes": round(plan.memory.margin_bytes),
        "raised_margin_bytes": round(plan.memory.raised_margin_bytes),
        "max_context": plan.max_context,
        "decode_short_tok_s": short.value,
        "decode_full_tok_s": full.value,
        "full_depth": plan.decode[-1][0],
        "drafts": plan.best_drafts,
        "decode_gain_of_drafts": plan.drafts[plan.best_drafts].gain,
        "prompt_tokens": prompt.prompt_tokens,
        "ttft_s": prompt.ttft.value,
        "price_usd": c.devices_usd,
        "status": full.status,
    }


def sweep_rows(
    request: PlanRequest, depths: Sequence[int], drafts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Decode at every depth and draft length, and prefill of every depth, as tidy rows.

    The configuration is that of the plan (or the closest that holds the model); `context` is the
    longest depth asked for, at which memory is stated too.
    """
    context = max([1, *depths])
    wish = dataclasses.replace(request, context=context)
    candidate = choose(wish) or closest(wish)
    if candidate is None:
        return
    for depth in depths:
        for n in drafts:
            if n <= candidate.engine.max_drafts:
                yield _row(candidate, "decode_tok_s", depth, n)
        if depth:
            yield _row(candidate, "prefill_tok_s", depth, 0)


def _row(c: Candidate, quantity: Any, depth: int, drafts: int) -> dict[str, Any]:
    work: dict[str, Any] = {"drafts": drafts, "depth": depth}
    if quantity == "prefill_tok_s":
        work = {"drafts": 0, "depth": 0, "prompt_tokens": depth}
    found = dataclasses.replace(c, run=c.at(**work))
    m, e = found.memory, predict(found.run, quantity)
    values = (
        c.device.name, c.count, c.engine.name, c.backend, c.run.quant.name, c.run.placement.split,
        c.run.workload.kv_type, c.context, depth, c.run.workload.concurrency, drafts,
        int(found.fits), "" if found.fits else c.device.raise_how, round(m.weights_bytes),
        round(m.kv_bytes), round(m.compute_bytes), round(m.mtp_bytes), round(m.usable_bytes),
        round(m.margin_bytes), quantity, e.value, e.low, e.high, e.roofline, e.unit, e.limiting,
        e.status,
    )  # fmt: skip
    return dict(zip(SWEEP_COLUMNS, values, strict=True))

"""A plan as JSON."""

from __future__ import annotations

from typing import Any

from hwmodel.candidate import Candidate
from hwmodel.fit import engines_measured
from hwmodel.plan import Plan
from hwmodel.plan_view import split_text
from hwmodel.predict import config_columns
from hwmodel.probed import fit_for
from hwmodel.run import Estimate


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, tokens per second."""
    m, c = plan.memory, plan.chosen
    return {
        "device": c.device.name,
        "count": c.count,
        "engine": c.engine.name,
        "backend": c.backend,
        "model": c.run.model.name,
        "quant": c.run.quant.name,
        "kv_type": c.run.workload.kv_type,
        "context": plan.request.context,
        "concurrency": c.run.workload.concurrency,
        "fits": plan.fits,
        "fits_with": plan.fits_with or None,
        "problem": plan.problem or None,
        "nearest": _nearest(plan) if plan.has_nearest else None,
        "memory": {
            "weights_bytes": round(m.weights_bytes),
            "kv_bytes": round(m.kv_bytes),
            "compute_bytes": round(m.compute_bytes),
            "mtp_bytes": round(m.mtp_bytes),
            "reserve_bytes": round(m.reserve_bytes),
            "usable_bytes": round(m.usable_bytes),
            "margin_bytes": round(m.margin_bytes),
            "raised_margin_bytes": round(m.raised_margin_bytes),
            "host_bytes": round(m.host_bytes),
            "disk_bytes": round(m.disk_bytes),
        },
        "max_context": plan.max_context,
        "quality": {
            "perplexity_increase": c.quality.perplexity_increase,
            "basis": c.quality.basis,
            "source": c.quality.source,
        },
        "decode": [{"depth": depth, **_estimate(e)} for depth, e in plan.decode],
        "prefill": [
            {"prompt_tokens": p.prompt_tokens, **_estimate(p.prefill)} for p in plan.prompts
        ],
        "ttft_s": [
            {
                "prompt_tokens": p.prompt_tokens,
                "ttft_s": p.ttft.value,
                "low": p.ttft.low,
                "high": p.ttft.high,
            }
            for p in plan.prompts
        ],
        "mtp": _mtp(plan),
        "placement": _placement(c),
        "command": plan.command,
        "price_usd": c.devices_usd,
        "alternatives": [_configuration(a) for a in plan.alternatives],
        "provenance": _provenance(plan),
    }


def _nearest(plan: Plan) -> dict[str, Any]:
    return {**_configuration(plan.chosen), "assumed": plan.assumed or None}


def _estimate(e: Estimate) -> dict[str, Any]:
    return {
        "tok_per_s": e.value,
        "low": e.low,
        "high": e.high,
        "limiting": e.limiting,
        "roofline_tok_per_s": e.roofline,
        "status": e.status,
    }


def _mtp(plan: Plan) -> dict[str, Any]:
    return {
        "drafts": plan.best_drafts,
        "acceptance": list(plan.acceptance),
        "acceptance_source": plan.request.stats_file
        if plan.request.acceptance
        else "llama.cpp pull request 20981",
        "distinct_experts": plan.request.distinct_experts,
        "depth": plan.chosen.context // 4,
        "options": [
            {
                "drafts": o.drafts,
                "gain": o.gain,
                "mtp_bytes": round(o.mtp_bytes),
                "fits": o.fits,
                **_estimate(o.decode),
            }
            for o in plan.drafts
        ],
    }


def _placement(c: Candidate) -> dict[str, Any]:
    place = c.run.placement
    return {
        "devices": c.count,
        "split": place.split,
        "host_expert_share": place.host_expert_share,
        "host_layers": c.host_layers,
        "ssd_share": place.ssd_share,
        "description": split_text(c),
    }


def _configuration(c: Candidate) -> dict[str, Any]:
    return {
        "device": c.device.name,
        "count": c.count,
        "engine": c.engine.name,
        "quant": c.run.quant.name,
        "kv_type": c.run.workload.kv_type,
        "placement": _placement(c),
        "fits": c.fits,
        "fits_with": None if c.fits else c.device.raise_how or None,
        "tok_per_s": c.decode.value,
        "depth": c.context,
        "price_usd": c.devices_usd,
    }


def _provenance(plan: Plan) -> dict[str, Any]:
    e, c = plan.decode[0][1], plan.chosen
    run = e.nearest
    columns = config_columns(c.run)
    return {
        "status": e.status,
        "reason": e.reason,
        "engines_measured": engines_measured(fit_for(c.run), columns["model"]),
        "basis": list(e.provenance),
        "nearest_run": None
        if run is None
        else {
            "id": run.id,
            "description": run.description,
            "measured": run.measured,
            "predicted": run.predicted,
            "error": run.error,
            "held_out": run.held_out,
            "source": run.source,
        },
        "device_file": c.device.name,
        "engine_version": c.engine.version,
        "unverified": list(c.device.unverified()),
        "sources": sorted({q.source for q in c.device.quantities.values() if q.is_verified}),
    }

"""An explanation as text."""

from __future__ import annotations

from hwmodel.cli_support import table
from hwmodel.explain import Explanation
from hwmodel.memory import kv_value_bytes, ledger
from hwmodel.model import AttentionGroup
from hwmodel.plan_view import band, pair
from hwmodel.quant import role_bytes


def explanation_text(e: Explanation) -> str:
    """What was computed, from which counts, from which sources."""
    c = e.candidate
    many = f"{c.count}x " if c.count > 1 else ""
    model = "" if e.run.model.is_step else f"{e.run.model.title} on "
    head = f"{e.figure} of {model}{many}{c.device.name}, {c.engine.title}, {c.run.quant.name}"
    parts = [f"{head}, {e.depth:,} tokens", "", *(_memory(e) if e.estimate is None else _time(e))]
    rows = [[name, f"{value:.6g}", source] for name, value, source in e.sources]
    parts += ["", "Stated numbers", table(["number", "value", "source"], rows)]
    return "\n".join(parts)


def _memory(e: Explanation) -> list[str]:
    m = ledger(e.run, max(1, e.depth))
    model, quant = e.run.model, e.run.quant
    count = model.parameters_by_role
    stored = role_bytes(model, quant)
    rows = [[role, f"{count.get(role, 0):,}", f"{size:,.0f}"] for role, size in stored.items()]
    rows.append(["all of the trunk", f"{model.parameters:,}", f"{_trunk(stored):,.0f}"])
    kinds = [
        [
            f"{g.layers} layers, {_reach(g)}",
            f"{g.kv_values / g.compress:g}",
            f"{g.kv_values / g.compress * kv_value_bytes(e.run.workload.kv_type):,.0f}",
        ]
        for g in model.attention
        if g.kv_values
    ]
    sums = [
        ["weights on the devices", f"{m.weights_bytes:,.0f}"],
        [f"KV cache, {e.run.workload.kv_type}", f"{m.kv_bytes:,.0f}"],
        ["buffers", f"{m.compute_bytes:,.0f}"],
        ["MTP layers and their cache", f"{m.mtp_bytes:,.0f}"],
        ["usable as it comes", f"{m.usable_bytes:,.0f}"],
        ["left", f"{m.margin_bytes:,.0f}"],
    ]
    return [
        "Weights by role (counted from the tensor table)",
        table(["role", "parameters", "bytes"], rows),
        "",
        "KV cache per token and layer",
        table(["layers", "values", "bytes"], kinds),
        "",
        table(["memory", "bytes"], sums),
    ]


def _reach(g: AttentionGroup) -> str:
    """What a layer of the group sees of its cache."""
    shared = f", {g.compress} tokens an entry" if g.compress > 1 else ""
    if g.selected:
        return f"{g.window:,} tokens selected{shared}"
    return (f"window {g.window}" if g.window else "full") + shared


def _trunk(stored: dict[str, float]) -> float:
    return sum(v for role, v in stored.items() if role != "mtp")


def _time(e: Explanation) -> list[str]:
    assert e.estimate is not None and e.counts is not None
    estimate = e.estimate
    lines = [f"{pair(estimate)}, {band(estimate)}; limited by {estimate.limiting}"]
    lines.append(f"{estimate.status}{': ' + estimate.reason if estimate.reason else ''}")
    lines += list(estimate.provenance)
    total = sum(t.seconds for t in estimate.terms) or 1.0
    rows = [
        [
            t.name,
            f"{1e3 * t.seconds:.3f}",
            f"{100 * t.seconds / total:.0f}",
            f"{t.bytes:,.0f}" if t.bytes else "",
            f"{t.flop:,.0f}" if t.flop else "",
        ]
        for t in estimate.terms
    ]
    lines += ["", "Terms", table(["term", "ms", "%", "bytes", "operations"], rows)]
    roles = dict.fromkeys([*e.counts.multiply_adds, *e.counts.weight_bytes])
    rows = [
        [
            role,
            f"{e.counts.multiply_adds.get(role, 0):,.0f}",
            f"{e.counts.weight_bytes.get(role, 0):,.0f}",
        ]
        for role in roles
    ]
    kv = kv_value_bytes(e.run.workload.kv_type)
    rows.append(["KV read", "", f"{e.counts.kv_values_read * kv:,.0f}"])
    rows.append(["KV written", "", f"{e.counts.kv_values_written * kv:,.0f}"])
    if e.counts.state_bytes:
        rows.append(["states read and written", "", f"{e.counts.state_bytes:,.0f}"])
    what = "one step" if e.figure == "decode" else "the whole prompt in one chunk"
    lines += ["", f"Counts of {what}", table(["role", "multiply-adds", "bytes"], rows)]
    return lines

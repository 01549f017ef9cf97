"""Frontiers as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwmodel.cli_support import table
from hwmodel.frontier import Offer, RackPoint
from hwmodel.plan_view import band, figure


def offers_text(offers: Sequence[Offer]) -> str:
    """Machines, cheapest first, and the command of each."""
    depth = offers[0].candidate.context
    header = ["machine", "USD", f"tok/s at {depth:,}", "band", "type", "perplexity", "engine"]
    header += ["status"]
    rows = []
    for o in offers:
        c = o.candidate
        loss = c.quality.perplexity_increase
        rows.append(
            [
                f"{c.count}x {c.device.name}{' + host' if c.is_offloaded else ''}",
                f"{o.price_usd:,.0f}",
                figure(o.tok_s),
                band(o.decode),
                c.run.quant.name,
                "unknown" if loss is None else f"+{100 * loss:.1f} %",
                c.engine.name,
                o.decode.status,
            ]
        )
    lines = [table(header, rows), ""]
    lines += [f"{row[0]} {row[4]}: {o.command}" for row, o in zip(rows, offers, strict=True)]
    return "\n".join(lines)


def rack_text(points: Sequence[RackPoint]) -> str:
    """Groups and batches, the fastest user first, and the command of each."""
    device = points[0].candidate.device
    header = ["group", "split", "type", "engine", "users", "drafts", "tok/s each", "tok/s in all"]
    header += ["M tokens per USD", "USD per M", "limited by", "status"]
    rows = []
    for p in points:
        c, s = p.candidate, p.serving
        rows.append(
            [
                f"{c.count}x {device.name}",
                c.run.placement.split,
                c.run.quant.name,
                c.engine.name,
                str(s.batch),
                str(p.drafts),
                figure(p.user_tok_s),
                figure(s.total_tok_s),
                f"{p.tokens_per_usd / 1e6:.3g}",
                f"{1e6 / p.tokens_per_usd:.3g}",
                s.decode.limiting,
                s.decode.status,
            ]
        )
    first = points[0].candidate
    each = points[0].usd_per_h / first.count
    lines = [
        f"{first.run.model.title}, {first.context:,} tokens for each user, {each:.2f} dollars for "
        "a device and hour",
        "",
        table(header, rows),
        "",
    ]
    seen: set[str] = set()
    for p in points:
        if p.command not in seen:
            seen.add(p.command)
            lines.append(f"{p.candidate.count}x, {p.serving.batch} users: {p.command}")
    return "\n".join(lines)


def _common(c: Any) -> dict[str, Any]:
    return {
        "device": c.device.name, "count": c.count, "quant": c.run.quant.name,
        "engine": c.engine.name, "split": c.run.placement.split, "context": c.context,
    }  # fmt: skip


def offers_json(offers: Sequence[Offer]) -> list[dict[str, Any]]:
    """The same as objects."""
    return [
        {
            **_common(o.candidate),
            "price_usd": o.price_usd,
            "tok_s": o.tok_s,
            "low": o.decode.low,
            "high": o.decode.high,
            "perplexity_increase": o.candidate.quality.perplexity_increase,
            "offloaded": o.candidate.is_offloaded,
            "status": o.decode.status,
            "command": o.command,
        }
        for o in offers
    ]


def rack_json(points: Sequence[RackPoint]) -> list[dict[str, Any]]:
    """The same as objects."""
    return [
        {
            **_common(p.candidate),
            "users": p.serving.batch,
            "drafts": p.drafts,
            "user_tok_s": p.user_tok_s,
            "total_tok_s": p.serving.total_tok_s,
            "tokens_per_usd": p.tokens_per_usd,
            "usd_per_h": p.usd_per_h,
            "limiting": p.serving.decode.limiting,
            "status": p.serving.decode.status,
            "command": p.command,
        }
        for p in points
    ]

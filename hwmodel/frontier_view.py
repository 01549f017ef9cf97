"""Frontiers as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwmodel.cli_support import table
from hwmodel.frontier import Offer, Rack, RackPoint
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


_RACK_HEADER = [
    "group", "split", "type", "engine", "users", "drafts", "tok/s each", "tok/s in all",
    "exchange", "M tokens per USD", "USD per M", "rack tok/s", "limited by", "status",
]  # fmt: skip


def _rack_row(p: RackPoint, devices: int) -> list[str]:
    c, s = p.candidate, p.serving
    return [
        f"{c.count}x {c.device.name}",
        split_of(p),
        c.run.quant.name,
        c.engine.name,
        str(s.batch),
        str(p.drafts),
        figure(p.user_tok_s),
        figure(s.total_tok_s),
        f"{100 * p.exchange:.0f} %",
        f"{p.tokens_per_usd / 1e6:.3g}",
        f"{1e6 / p.tokens_per_usd:.3g}",
        figure(devices // c.count * s.total_tok_s),
        s.decode.limiting,
        s.decode.status,
    ]


def split_of(p: RackPoint) -> str:
    """`expert`, or `expert, attention 2x8`: two data-parallel groups of eight devices."""
    split, groups = p.candidate.run.placement.split, p.attention_groups
    width = p.candidate.count // groups
    return f"{split}, attention {groups}x{width}" if groups > 1 else str(split)


def rack_text(found: Rack) -> str:
    """Groups and batches, the fastest user first, what limits their size, and the commands."""
    points = found.points
    first = points[0].candidate
    each = points[0].usd_per_h / first.count
    lines = [
        f"{first.run.model.title}, {first.context:,} tokens for each user, {each:.2f} dollars for "
        f"a device and hour; {found.devices} devices run as many equal groups side by side as they "
        "make, each a replica",
        "",
        "nothing is both faster for a user and cheaper a token:",
        table(_RACK_HEADER, [_rack_row(p, found.devices) for p in points]),
        "",
        "most tokens per dollar of each kind of group:",
        table(_RACK_HEADER, [_rack_row(p, found.devices) for p in found.cheapest]),
        "",
    ]
    lines += [f"no group of {count}: {why}" for count, why in found.refused]
    lines += [""] if found.refused else []
    seen: set[str] = set()
    for p in (*points, *found.cheapest):
        if p.command not in seen:
            seen.add(p.command)
            users = f"{p.serving.batch} user{'s' if p.serving.batch > 1 else ''}"
            lines.append(f"{p.candidate.count}x, {users}: {p.command}")
    if any("host1" in p.command for p in (*points, *found.cheapest)):
        lines += ["", "over several machines: start it on host1, on machine i with --node-rank i"]
        lines[-1] += " (SGLang), or --headless --data-parallel-start-rank i (vLLM)"
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


def rack_json(found: Rack) -> dict[str, Any]:
    """The same as an object."""
    return {
        "devices": found.devices,
        "frontier": [_rack_point(p, found.devices) for p in found.points],
        "cheapest_by_group": [_rack_point(p, found.devices) for p in found.cheapest],
        "refused": [{"count": count, "why": why} for count, why in found.refused],
    }


def _rack_point(p: RackPoint, devices: int) -> dict[str, Any]:
    return {
        **_common(p.candidate),
        "attention_groups": p.attention_groups,
        "replicas": devices // p.candidate.count,
        "users": p.serving.batch,
        "drafts": p.drafts,
        "user_tok_s": p.user_tok_s,
        "low": p.serving.decode.low,
        "high": p.serving.decode.high,
        "total_tok_s": p.serving.total_tok_s,
        "exchange_share": p.exchange,
        "tokens_per_usd": p.tokens_per_usd,
        "usd_per_h": p.usd_per_h,
        "limiting": p.serving.decode.limiting,
        "status": p.serving.decode.status,
        "command": p.command,
    }

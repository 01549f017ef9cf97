"""Time on the links between devices: all-reduces, hand-overs, and experts on other devices."""

from __future__ import annotations

import math

from hwmodel.effects import Context
from hwmodel.parts import Part
from hwmodel.placement import Machine
from hwmodel.run import RunConfig

LINK_PRIOR = 0.75  # of a link's datasheet speed
ALL_REDUCE_S = {"nvlink": 8e-6, "xgmi": 12e-6, "pcie": 25e-6, "network": 40e-6}


def link_parts(run: RunConfig, m: Machine, c: Context, rows: int) -> list[Part]:
    """Two all-reduces per layer for tensor parallel, one hand-over per device for layer split."""
    hidden_bytes = 2.0 * rows * run.model.hidden_size
    if run.placement.attention_groups > 1:
        return _grouped_links(run, m, c, rows)
    if m.parallel > 1:
        hops = 2 * run.model.layers
        latency = ALL_REDUCE_S.get(m.link_kind, 25e-6) * (1 + math.log2(m.parallel)) / 2
        moved = hops * hidden_bytes * 2 * (m.parallel - 1) / m.parallel
        base = hops * latency + moved / m.link_bytes_per_s / LINK_PRIOR
        effects = (*c.features("links", "family"), (f"links/kind={m.link_kind}", 1.0))
        return [Part("links", "links", base, effects, moved / m.link_bytes_per_s, moved)]
    if m.stages > 1:
        moved = (m.stages - 1) * hidden_bytes
        base = (m.stages - 1) * 30e-6 + moved / m.link_bytes_per_s / LINK_PRIOR
        return [Part("links", "links", base, c.features("stages", "family"),
                     moved / m.link_bytes_per_s, moved)]  # fmt: skip
    return []


def _grouped_links(run: RunConfig, m: Machine, c: Context, rows: int) -> list[Part]:
    """Data-parallel attention: one all-reduce inside each group and layer, and in layers of
    experts every row to the machines of its experts (8 bits a value) and back (16 bits).

    A row meets at most `top_k` other machines, or other devices where all share one link.
    """
    model, place, device = run.model, run.placement, run.devices[0].device
    width = max(1, m.parallel // place.attention_groups)
    own_rows = rows / place.attention_groups
    link = device.link_bytes_per_s or m.link_bytes_per_s
    reduced = model.layers * 2 * 2.0 * own_rows * model.hidden_size * (width - 1) / width
    inside = model.layers * ALL_REDUCE_S["nvlink"] * (1 + math.log2(width)) / 2
    inside = inside if width > 1 else 0.0
    # all devices of a machine send their rows at once, each over its own share of the network
    hosts = -(-m.parallel // max(width, getattr(device, "max_per_host", 1)))
    others = hosts - 1 if m.link_kind == "network" else m.parallel - 1
    targets = min(model.top_k, max(1, others))
    sent = model.moe_layers * 3.0 * rows / m.parallel * model.hidden_size * targets
    latency = model.moe_layers * 2 * ALL_REDUCE_S.get(m.link_kind, 25e-6)
    limit = reduced / link + sent / m.link_bytes_per_s
    effects = (*c.features("links", "family"), (f"links/kind={m.link_kind}", 1.0))
    base = inside + latency + limit / LINK_PRIOR
    return [Part("links", "links", base, effects, limit, reduced + sent)]

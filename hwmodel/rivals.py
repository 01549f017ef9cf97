"""The vendor's relative decoding cost against rivals, recomputed.

A token's cost is taken as device time: devices / (batch x tokens/s of each sequence), at the
largest batch that keeps the stated speed and fits the memory. Depth, cards, drafts and speed are
those of the vendor's table (`data/rivals.toml`); engine, KV type, the cards' model, where a
sequence's attention lies and whether sliding layers keep only their window are assumptions, stated
with the result. The vendor's own figures are estimates too, by a method like that of
arXiv 2507.19427, and name neither the card nor the placement of attention (note 4 of its table).

Latents cannot be dealt out over cards, so that engines keep the attention of each sequence on one
card where they serve such models (SGLang's recommended launch of DeepSeek-V3.2 is `--dp 8
--enable-dp-attention`, docs.sglang.io/basic_usage/deepseek_v32.html); that is the default here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmodel.catalogue import load_model
from hwmodel.devices import load_device, read_sources, read_toml
from hwmodel.engines import load_engine
from hwmodel.errors import RequestError
from hwmodel.quant import load_quant
from hwmodel.quantity import read_quantity
from hwmodel.request import backend_of
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig, Workload
from hwmodel.serving import ServingPoint, largest_batch, serve

_ATTENTION = {
    "split": "every sequence split over all cards",
    "machine": "every sequence inside one machine",
    "card": "every sequence on one card",
}


@dataclass(frozen=True)
class Rival:
    """One row: what the vendor states and what the cost model finds.

    `found` is None where even one sequence does not fit or is slower than stated; `alone` is the
    speed of a single sequence. `relative` is the cost against Step's, None where unknown.
    """

    title: str
    devices: int
    drafts: int
    stated_tok_s: float
    stated_relative: float
    alone: ServingPoint
    found: ServingPoint | None
    relative: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows under one set of assumptions."""

    rivals: tuple[Rival, ...]
    depth: int
    assumptions: tuple[str, ...]
    source: str


def compare_rivals(
    sliding: str = "window",
    links: str = "network",
    device: str | None = None,
    attention: str = "card",
) -> Comparison:
    """Recompute the vendor's table.

    Args:
        sliding: whether caches of sliding layers hold their `window` or the `full` context.
        links: how machines of more than eight cards talk: over their `network`, or as if all
            cards shared one NVLink `domain`, which stands for exchange hidden behind computing.
        device: the card; the table's own by default.
        attention: of models on more than eight cards: every sequence `split` over all cards, or
            whole inside one `machine`, or on one `card` (data-parallel attention; what is not a
            routed expert is then held once per machine or card).

    Raises:
        UnknownNameError, RequestError: no such device, one with no peer link, or one that the
            table's engine does not run on.
    """
    path = Path(__file__).parent / "data" / "rivals.toml"
    raw = read_toml(path)
    sources = read_sources(raw, path)
    card = load_device(device or raw["device"])
    if card.link_bytes_per_s is None:
        raise RequestError(f"--device {card.name}: has no link to others, expected such as h100")
    engine = dataclasses.replace(load_engine(raw["engine"]), sliding_cache=sliding)
    if not backend_of(engine, card):
        raise RequestError(
            f"--device {card.name}: {engine.title}, which the table is computed for, does not run "
            "on it; expected such as h100"
        )
    rows = [
        _rival(entry, raw, path, sources, card, engine, links == "network", attention)
        for entry in raw["rivals"]
    ]
    own = rows[0].found
    if own is not None:
        rows = [dataclasses.replace(r, relative=_relative(r.found, own)) for r in rows]
    assumptions = (
        f"{card.title}, {engine.title}, expert parallel, {raw['kv_type']} KV",
        "caches of sliding layers hold "
        + ("their window" if sliding == "window" else "the whole context"),
        "machines of more than eight cards exchange over "
        + ("their network" if links == "network" else "links as fast as inside one machine"),
        "their attention: " + _ATTENTION[attention],
        "the largest batch that keeps the stated speed and fits; cost is device time per token",
        "drafts accepted as published for Step 3.5 Flash, for every model",
    )
    return Comparison(tuple(rows), raw["depth"], assumptions, sources["card"])


def _rival(
    entry: dict[str, Any], raw: dict[str, Any], path: Path, sources: Any, card: Any, engine: Any,
    network: bool, attention: str,
) -> Rival:  # fmt: skip
    stated = read_quantity(path, "tok_s", entry["tok_s"], sources).value
    run = RunConfig(
        model=load_model(entry["model"]),
        quant=load_quant(entry["quant"]),
        devices=(DeviceCount(card, entry["devices"]),),
        engine=EngineChoice(engine, backend_of(engine, card), engine.version, engine.date),
        placement=_placement(card, entry["devices"], network, attention),
        workload=Workload(depth=raw["depth"], kv_type=raw["kv_type"], drafts=entry["drafts"]),
    )
    return Rival(
        title=entry.get("title", run.model.title),
        devices=entry["devices"],
        drafts=entry["drafts"],
        stated_tok_s=stated,
        stated_relative=read_quantity(path, "relative_cost", entry["relative_cost"], sources).value,
        alone=serve(run, 1),
        found=largest_batch(run, stated),
    )


def _placement(card: Any, count: int, network: bool, attention: str) -> Placement:
    machines = -(-count // max(1, card.max_per_host))
    if machines == 1:
        return Placement(split="expert")
    place = Placement(
        split="expert", attention_groups={"split": 1, "machine": machines, "card": count}[attention]
    )
    if not network:
        return place
    return dataclasses.replace(
        place, link_kind="network", link_bytes_per_s=card.network_bytes_per_s
    )


def _relative(found: ServingPoint | None, own: ServingPoint) -> float | None:
    return None if found is None else found.device_s_per_token / own.device_s_per_token

"""The search of a plan: configurations that could hold the model, and which of them is best.

A candidate is a quant type in an engine on so many devices, split in one way, with a KV type and,
where wanted, experts in host memory or on disk. It *holds* the model if it fits at the devices'
default limit or at their documented raised one, and if the largest share of a layer split fits its
device. Candidates that hold it are ordered by quality tier first, then by how far their speed is
backed by measured runs, then by speed; the number of devices is the smallest that reaches a good
tier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from hwmodel.candidate import GOOD_TIER, Candidate, quality_of, tier_of
from hwmodel.devices import Device, load_device
from hwmodel.engines import Engine
from hwmodel.errors import RequestError
from hwmodel.fit import load_fit
from hwmodel.model import ModelShape
from hwmodel.placement import legal_counts, refusal
from hwmodel.predict import config_columns
from hwmodel.quant import Quant, load_quant, role_bytes
from hwmodel.request import DEFAULT_HOST, MAX_COUNT, SYSTEM_BYTES, PlanRequest, backend_of
from hwmodel.run import (
    DeviceCount,
    EngineChoice,
    Placement,
    RunConfig,
    Split,
    Workload,
)

SPARE_RAM_BYTES = 128 * 2**30  # host memory that is supposed where nothing else helps
OFFLOAD_MICRO_BATCH = 4096  # long chunks: experts are streamed to the GPU once per chunk


def splits_of(engine: Engine, device: Device, count: int) -> tuple[Split, ...]:
    """Ways to share the model among so many devices that the engine supports, legal or not."""
    if count == 1:
        return ("single",)
    if device.link_bytes_per_s is None:
        return ()
    wanted: tuple[Split, ...] = ("tensor", "expert", "layer")
    return tuple(s for s in wanted if s in engine.splits)


def why_illegal(
    model: ModelShape, quant: str | Quant, split: Split, count: int, groups: int = 1
) -> str | None:
    """Why a split cannot run; expert parallel still divides the attention heads by the devices of
    each of its groups."""
    kind = load_quant(quant) if isinstance(quant, str) else quant
    found = refusal(model, kind, split, count)
    if found is None and split == "expert" and count > 1:
        return refusal(model, load_quant("BF16"), "tensor", count // groups)
    return found


def check_split(request: PlanRequest) -> None:
    """Refuse a split or a count that no engine of the request can run.

    Raises:
        RequestError: why, and what would be legal.
    """
    split, count = request.split, request.count
    if split is None or count is None:
        return
    able = [e for e in request.engines if split in e.splits or (split == "single" and count == 1)]
    if not able:
        offered = {s for e in request.engines for s in splits_of(e, request.device, count)}
        ways = ", ".join(sorted(offered)) or "none over one device"
        names = ", ".join(e.name for e in request.engines)
        raise RequestError(f"--split {split} is not what {names} can do here; legal: {ways}")
    quants = (request.quant,) if request.quant else tuple(q for e in able for q in e.published)
    problems = [why_illegal(request.model, request.kind(q), split, count) for q in quants if q]
    if problems and all(problems):
        kind = request.kind(request.quant or quants[0])
        legal = [
            n
            for n in legal_counts(request.model, kind, split, MAX_COUNT)
            if why_illegal(request.model, kind, split, n) is None
        ]
        others = [
            s
            for e in request.engines
            for s in splits_of(e, request.device, count)
            if s != split
            and (request.quant is None or request.can_load(e, request.quant))
            and why_illegal(request.model, kind, s, count) is None
        ]
        hint = (
            f"; {count} devices can be split by {', '.join(dict.fromkeys(others))}"
            if others
            else ""
        )
        raise RequestError(
            f"--split {split} over {count} devices cannot run: {problems[0]}; legal counts: "
            f"{', '.join(map(str, legal))}{hint}"
        )


def candidates(request: PlanRequest, count: int) -> Iterator[Candidate]:
    """For every engine and split of so many devices, the quant types that hold, from the best
    tier down to the first that is as fast as asked.

    With a quant type asked for, that one, whether it holds or not.
    """
    for engine in request.engines:
        for split in splits_of(engine, request.device, count):
            if request.split not in (None, split):
                continue
            yield from _of_split(request, engine, split, count)


def _of_split(
    request: PlanRequest, engine: Engine, split: Split, count: int
) -> Iterator[Candidate]:
    quants = [request.quant] if request.quant else list(engine.published)
    usable = [q for q in quants if request.can_load(engine, q)]
    usable.sort(key=lambda q: quality_of(request.model, request.kind(q)).perplexity_increase or 0.0)
    best_tier: int | None = None
    for quant in usable:
        kind = request.kind(quant)
        if why_illegal(request.model, kind, split, count) is not None:
            continue
        tier = tier_of(quality_of(request.model, kind))
        if best_tier is not None and tier > best_tier:
            return
        found = _place(request, engine, split, count, quant)
        if found.holds and not found.is_offloaded and fast_enough(request, found):
            best_tier = tier
        if found.holds or request.quant:
            yield found


def _place(request: PlanRequest, engine: Engine, split: Split, count: int, quant: str) -> Candidate:
    """The candidate of one quant type: with the first KV type that holds, else with offloading."""
    plain = [
        make_candidate(request, engine, split, count, quant, kv_type=kv)
        for kv in engine.kv_types[:2]
    ]
    for candidate in plain:
        if candidate.holds:
            return candidate
    if request.ram_bytes is not None:
        offloaded = _offload(request, plain[0])
        if offloaded is not None:
            return offloaded
    return plain[0]


def make_candidate(
    request: PlanRequest,
    engine: Engine,
    split: Split,
    count: int,
    quant: str,
    kv_type: str = "f16",
    placement: Placement | None = None,
    host_layers: int = 0,
    micro_batch: int | None = None,
) -> Candidate:
    """A candidate as stated, whether it holds or not."""
    backend = backend_of(engine, request.device)
    placement = placement or Placement(split=split)
    if 1 < request.device.max_per_host < count:  # the slowest link decides: between machines
        placement = dataclasses.replace(
            placement,
            link_kind="network",
            link_bytes_per_s=request.device.network_bytes_per_s,
        )
    run = RunConfig(
        model=request.model,
        quant=request.kind(quant),
        devices=(DeviceCount(request.device, count),),
        engine=EngineChoice(engine, backend, engine.version, engine.date),
        placement=placement,
        workload=Workload(
            depth=0,
            concurrency=request.concurrency,
            kv_type=kv_type,
            micro_batch=micro_batch,
            acceptance=request.acceptance,
            distinct_experts=request.distinct_experts,
        ),
    )
    found = Candidate(run, request.context, backend, host_layers)
    if not found.is_offloaded:
        return found
    return dataclasses.replace(found, ram_bytes=request.ram_bytes, host=request.host)


def _offload(request: PlanRequest, plain: Candidate) -> Candidate | None:
    """The same with experts in host memory, and on disk where that is not enough either."""
    engine, device = plain.engine, plain.device
    if device.unified:
        return _stream(request, plain, Placement(split=plain.run.placement.split))
    if not engine.host_experts or request.host is None or request.ram_bytes is None:
        return None
    routed = role_bytes(request.model, plain.run.quant).get("routed", 0.0)
    room = max(0.0, request.ram_bytes - SYSTEM_BYTES)
    layers = request.model.moe_layers
    host = request.host
    for n in range(1, layers + 1):
        on_host = min(routed * n / layers, room)
        on_disk = routed * n / layers - on_host
        if on_disk > 0 and not engine.ssd_streaming:
            return None
        place = dataclasses.replace(
            plain.run.placement,
            host_expert_share=on_host / routed,
            host_bandwidth_bytes_per_s=host.bandwidth_bytes_per_s,
            host_link_bytes_per_s=device.host_link_bytes_per_s,
            ssd_share=on_disk / routed,
            ssd_bytes_per_s=host.disk_bytes_per_s,
        )
        found = make_candidate(
            request, engine, place.split, plain.count, plain.run.quant.name,
            placement=place, host_layers=n, micro_batch=OFFLOAD_MICRO_BATCH,
        )  # fmt: skip
        if found.holds:
            return found
    return None


def _stream(request: PlanRequest, plain: Candidate, place: Placement) -> Candidate | None:
    """Experts that do not fit stay on disk and are read when they are needed."""
    if not plain.engine.ssd_streaming or plain.count > 1:
        return None
    routed = role_bytes(request.model, plain.run.quant).get("routed", 0.0)
    missing = -plain.memory.raised_margin_bytes
    if missing > routed:  # a dense model among them: what every token reads stays in memory
        return None
    share = math.ceil(1000 * missing / routed) / 1000
    place = dataclasses.replace(
        place, ssd_share=share, ssd_bytes_per_s=plain.device.disk_bytes_per_s
    )
    found = make_candidate(
        request, plain.engine, place.split, plain.count, plain.run.quant.name, placement=place
    )
    return found if found.holds else None


def order(candidate: Candidate) -> tuple[bool, int, int, bool, float]:
    """Sort key of candidates with the same number of devices, best first.

    Anything that reads from disk comes last; where experts are outside the devices' memory, a good
    tier is good enough. Then come the evidence for the speed, whether the model's vendor publishes
    the file, and the speed itself.
    """
    streamed = candidate.run.placement.ssd_share > 0
    tier = max(candidate.tier, GOOD_TIER) if candidate.is_offloaded else candidate.tier
    community = candidate.run.quant.name not in candidate.engine.repositories
    return streamed, tier, evidence(candidate), community, -(candidate.decode.value or 0.0)


def evidence(candidate: Candidate) -> int:
    """How far the speed rests on measured runs: 0 of this model on such devices in such engines,
    1 of other models, 2 none."""
    if candidate.decode.status != "calibrated":
        return 2
    own = config_columns(candidate.run)
    for run in load_fit().runs:
        same = all(run.config.get(k) == own[k] for k in ("class", "family"))
        if same and _is_model(candidate.run.model, str(run.config.get("model", ""))):
            return 0
    return 1


def _is_model(model: ModelShape, name: str) -> bool:
    return name.startswith("step") if model.is_step else name == model.name


def is_wanted(request: PlanRequest, candidate: Candidate) -> bool:
    """It holds the model, costs no more and is as fast as asked."""
    return (
        candidate.holds and affordable(request, candidate.count) and fast_enough(request, candidate)
    )


def fast_enough(request: PlanRequest, candidate: Candidate) -> bool:
    """Each sequence gets the tokens/s asked for when its context is full."""
    wanted = request.min_decode
    return wanted is None or (candidate.decode.value or 0.0) >= wanted


def affordable(request: PlanRequest, count: int) -> bool:
    """So many devices cost no more than asked."""
    price = request.device.price_usd
    return request.max_price is None or (price is not None and price * count <= request.max_price)


def best_of(request: PlanRequest, count: int) -> Candidate | None:
    """The best candidate with so many devices that is wanted, None where there is none."""
    found = [c for c in candidates(request, count) if is_wanted(request, c)]
    return min(found, key=order) if found else None


def choose(request: PlanRequest) -> Candidate | None:
    """The recommended candidate: the fewest devices that reach a good tier, else the best tier."""
    if request.count is not None:
        return best_of(request, request.count)
    chosen: Candidate | None = None
    for count in range(1, MAX_COUNT + 1):
        found = best_of(request, count)
        if found is None:
            continue
        if chosen is None or found.tier < chosen.tier:
            chosen = found
        if chosen.tier <= GOOD_TIER:
            break
    return chosen


def closest(request: PlanRequest) -> Candidate | None:
    """The nearest thing to an impossible request that does hold the model.

    Wishes are given up in this order: the number of devices, the quant type, price and speed,
    offloading (any amount of host memory or disk), the engine.
    """
    loosened = [
        dataclasses.replace(request, count=None),
        dataclasses.replace(request, quant=None),
        dataclasses.replace(request, count=None, quant=None),
        dataclasses.replace(request, max_price=None, min_decode=None),
        dataclasses.replace(request, count=None, quant=None, max_price=None, min_decode=None),
        dataclasses.replace(
            request, count=None, quant=None, split=None, engine=None, max_price=None,
            min_decode=None,
        ),
    ]  # fmt: skip
    helped = dataclasses.replace(
        loosened[-1],
        ram_bytes=request.device.memory_bytes if request.device.unified else SPARE_RAM_BYTES,
        host=None if request.device.unified else load_device(DEFAULT_HOST),
    )
    for wish in (*loosened, helped):
        if wish != request:
            found = choose(wish)
            if found is not None:
                return found
    return None

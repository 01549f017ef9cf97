"""What is worth choosing: configurations that nothing else beats in every respect.

`buying` sets price, speed and quality of one user's machine against each other; `rack` sets the
speed that each of many users gets against the tokens that a dollar of rent buys, over numbers of
devices, legal splits and batches. A configuration is on the frontier if no other is at least as
good in every respect and better in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hwmodel.candidate import GOOD_TIER, Candidate, quality_of, tier_of
from hwmodel.cost import Terms, terms_of
from hwmodel.errors import RequestError, check_range
from hwmodel.model import ModelShape
from hwmodel.placement import kv_heads
from hwmodel.plan import command_of
from hwmodel.predict import predict
from hwmodel.request import PlanRequest, make_request
from hwmodel.run import Estimate, Placement
from hwmodel.search import candidates, make_candidate, splits_of, why_illegal
from hwmodel.serving import ServingPoint, at_batch, has_room, serve

COUNTS = (1, 2, 4, 8)
RACK_COUNTS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (
    1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
)  # fmt: skip
T = TypeVar("T")
MAX_RENT = 1000.0  # dollars for one device and hour
SAME = 0.01  # differences below one percent are none


@dataclass(frozen=True)
class Offer:
    """One machine that can be bought: `loss` is the increase of perplexity (0 where unknown)."""

    candidate: Candidate
    decode: Estimate
    price_usd: float
    loss: float

    @property
    def tok_s(self) -> float:
        """Tokens/s of one sequence at the request's context."""
        return self.decode.value or 0.0

    @property
    def command(self) -> str:
        """What starts the engine so."""
        return command_of(self.candidate)


def pareto(items: Sequence[T], better: Sequence[Callable[[T], float]]) -> list[T]:
    """The items that no other dominates; each of `better` is a value to be large.

    Values within one percent count as equal, so that a hair's breadth keeps nothing in.
    """

    def beats(a: T, b: T) -> bool:
        pairs = [(f(a), f(b)) for f in better]
        slack = [SAME * max(abs(x), abs(y)) for x, y in pairs]
        least = all(x >= y - s for (x, y), s in zip(pairs, slack, strict=True))
        return least and any(x > y + s for (x, y), s in zip(pairs, slack, strict=True))

    return [b for b in items if not any(beats(a, b) for a in items)]


def buying(
    devices: Sequence[str],
    model: ModelShape,
    context: str | int | None,
    budget_usd: float | None = None,
    quant: str | None = None,
    ram_gb: float | None = None,
) -> list[Offer]:
    """The frontier of price, speed and quality over devices and counts, cheapest first.

    Prices include the machine around cards (`hwmodel.cost`).

    Raises:
        RequestError: no device has a price, or nothing holds the model within the budget.
    """
    found: list[Offer] = []
    for name in devices:
        request = make_request(name, model, context=context, quant=quant, ram_gb=_ram(name, ram_gb))
        for count in COUNTS if request.device.link_bytes_per_s else (1,):
            found += _offers(request, count)
    if not found:
        raise RequestError(f"nothing of {', '.join(devices)} holds {model.title}, or has a price")
    within = [o for o in found if budget_usd is None or o.price_usd <= budget_usd]
    if not within:
        least = min(o.price_usd for o in found)
        raise RequestError(f"--budget is {budget_usd:,.0f}, expected {least:,.0f} dollars or more")
    kept = pareto(within, (lambda o: -o.price_usd, lambda o: o.tok_s, lambda o: -(o.loss + 0.01)))
    return sorted(_distinct(kept), key=lambda o: (o.price_usd, -o.tok_s))


def _ram(name: str, ram_gb: float | None) -> float | None:
    from hwmodel.devices import load_device

    return None if load_device(name).unified else ram_gb


def _offers(request: PlanRequest, count: int) -> Iterator[Offer]:
    for c in _all_types(request, count):
        price = terms_of(c).buy_usd
        loss = c.quality.perplexity_increase
        if price is not None and c.holds:
            run = c.at(depth=request.context, drafts=0)
            yield Offer(c, predict(run, "decode_tok_s"), price, 0.0 if loss is None else loss)


def _all_types(request: PlanRequest, count: int) -> Iterator[Candidate]:
    """Every published type, not only the best of each tier; offloaded ones by the plan's search."""
    if request.ram_bytes is not None and not request.device.unified:
        yield from (c for c in candidates(request, count) if c.is_offloaded)
    for engine in request.engines:
        for split in splits_of(engine, request.device, count):
            for quant in (request.quant,) if request.quant else engine.published:
                if request.can_load(engine, quant) and not why_illegal(
                    request.model, request.kind(quant), split, count
                ):
                    yield make_candidate(request, engine, split, count, quant)


def _distinct(offers: Sequence[Offer]) -> list[Offer]:
    """One offer for each machine and type: the fastest."""
    best: dict[tuple[str, int, str], Offer] = {}
    for o in offers:
        key = (o.candidate.device.name, o.candidate.count, o.candidate.run.quant.name)
        if key not in best or o.tok_s > best[key].tok_s:
            best[key] = o
    return list(best.values())


@dataclass(frozen=True)
class RackPoint:
    """A group of devices serving a batch; a rack holds as many groups as fit.

    `usd_per_h` is the group's rent (or its price written off); tokens per dollar do not change
    with the number of groups.
    """

    candidate: Candidate
    serving: ServingPoint
    usd_per_h: float
    drafts: int

    @property
    def attention_groups(self) -> int:
        """Data-parallel copies of everything but the routed experts, inside the group."""
        return self.candidate.run.placement.attention_groups

    @property
    def exchange(self) -> float:
        """Share of a step's time that the devices spend exchanging activations."""
        terms = self.serving.decode.terms
        spent = sum(t.seconds for t in terms if t.name == "links")
        return spent / sum(t.seconds for t in terms)

    @property
    def user_tok_s(self) -> float:
        """Tokens/s of each user."""
        return self.serving.tok_s

    @property
    def tokens_per_usd(self) -> float:
        """Output tokens that a dollar buys."""
        return 3600 * self.serving.total_tok_s / self.usd_per_h

    @property
    def command(self) -> str:
        """What starts one group."""
        run = self.serving.run
        return command_of(dataclasses.replace(self.candidate, run=run), self.drafts)


@dataclass(frozen=True)
class Rack:
    """What a rack can do.

    Attributes:
        devices: of the whole rack; `devices // count` equal groups run side by side.
        points: the frontier, fastest user first.
        cheapest: for each legal kind of group (devices, attention groups), the batch with the
            most tokens per dollar, on the frontier or not.
        refused: for each number of devices that no split can use, why.
    """

    devices: int
    points: tuple[RackPoint, ...]
    cheapest: tuple[RackPoint, ...]
    refused: tuple[tuple[int, str], ...]


def rack(
    device: str,
    model: ModelShape,
    context: str | int | None,
    engine: str | None = None,
    quant: str | None = None,
    most: int = 64,
    drafts: int | None = None,
    rent: float | None = None,
) -> Rack:
    """The frontier of speed per user and tokens per dollar.

    Quality is no axis of it: without `quant`, types that lose much are left out.

    Args:
        most: devices of the rack; groups of 1, 2, 4, ... of them are tried.
        drafts: drafts per step; None tries none and all that the engine offers.
        rent: dollars for one device and hour; None takes the device's own, else its price.

    Raises:
        RequestError: no price is known, or nothing fits.
    """
    check_range("--rent", rent, 0, MAX_RENT)
    check_range("--most", most, 1, RACK_COUNTS[-1])
    request = make_request(device, model, context=context, engine=engine, quant=quant)
    points: list[RackPoint] = []
    refused: list[tuple[int, str]] = []
    for count in RACK_COUNTS:
        if count <= most and (count == 1 or request.device.link_bytes_per_s):
            found = list(_group_points(request, count, drafts, rent))
            points += found
            if not found:
                refused.append((count, _why_none(request, count)))
    if not points:
        raise RequestError(f"nothing up to {most}x {request.device.name} holds {model.title}")
    kept = pareto(points, (lambda p: p.user_tok_s, lambda p: p.tokens_per_usd))
    alike: dict[tuple[int, int, int], RackPoint] = {}
    most_tokens = 0.0
    for p in sorted(kept, key=lambda p: -p.user_tok_s):
        if p.tokens_per_usd > most_tokens:  # of points alike within one percent the faster stays
            alike.setdefault((p.candidate.count, p.attention_groups, p.serving.batch), p)
            most_tokens = p.tokens_per_usd
    cheapest: dict[tuple[int, int], RackPoint] = {}
    for p in sorted(points, key=lambda p: -p.tokens_per_usd):
        cheapest.setdefault((p.candidate.count, p.attention_groups), p)
    return Rack(
        most, tuple(alike.values()), tuple(cheapest[k] for k in sorted(cheapest)), tuple(refused)
    )


def _why_none(request: PlanRequest, count: int) -> str:
    """Why no engine can use a group of so many devices: illegal splits, else no room."""
    found = []
    for engine in request.engines:
        for split in splits_of(engine, request.device, count):
            for quant in (request.quant,) if request.quant else engine.published:
                if request.can_load(engine, quant) and _good_enough(request, quant):
                    for groups in _attention_groups(request, split, count):
                        kind = request.kind(quant)
                        why = why_illegal(request.model, kind, split, count, groups)
                        found.append(why or f"{quant} does not fit")
    return "; ".join(dict.fromkeys(found)) or "no engine can load the model so"


def _good_enough(request: PlanRequest, quant: str) -> bool:
    asked = request.quant is not None
    return asked or tier_of(quality_of(request.model, request.kind(quant))) <= GOOD_TIER


def _attention_groups(request: PlanRequest, split: str, count: int) -> tuple[int, ...]:
    """One group, over several machines one for each of them, and one for each device where the
    cache is a latent, which a group would keep on all of its devices."""
    if split != "expert" or count == 1:
        return (1,)
    machines = -(-count // max(1, request.device.max_per_host))
    found = [1]
    if request.device.max_per_host > 1 and machines > 1 and count % machines == 0:
        found.append(machines)
    if kv_heads(request.model) == 1:
        found.append(count)
    return tuple(dict.fromkeys(found))


def _rack_types(request: PlanRequest, count: int) -> Iterator[Candidate]:
    """What `_all_types` gives, and expert parallel with data-parallel attention."""
    yield from _all_types(request, count)
    for engine in request.engines:
        for groups in _attention_groups(request, "expert", count)[1:]:
            if "expert_groups" not in engine.flags:
                continue
            for quant in (request.quant,) if request.quant else engine.published:
                if request.can_load(engine, quant) and not why_illegal(
                    request.model, request.kind(quant), "expert", count, groups
                ):
                    place = Placement(split="expert", attention_groups=groups)
                    yield make_candidate(request, engine, "expert", count, quant, placement=place)


def _group_points(
    request: PlanRequest, count: int, drafts: int | None, rent: float | None
) -> Iterator[RackPoint]:
    for c in _rack_types(request, count):
        if not (c.holds and _good_enough(request, c.run.quant.name)):
            continue
        terms = terms_of(c, rent=None if rent is None else rent * count)
        price = _hourly(terms)
        if price is None:
            name = request.device.name
            raise RequestError(f"no price is known for {name}; --rent USD adds it")
        offered = c.engine.max_drafts
        for n in sorted({0, offered} if drafts is None else {min(drafts, offered)}):
            run = c.at(depth=request.context, drafts=n)
            for batch in BATCHES:
                if batch < c.run.placement.attention_groups:
                    continue  # a group without a sequence would only wait
                if not has_room(at_batch(run, batch)):
                    break
                yield RackPoint(c, serve(run, batch), price, n)


def _hourly(terms: Terms) -> float | None:
    return terms.rent_usd_per_h if terms.rent_usd_per_h is not None else terms.owned_usd_per_h

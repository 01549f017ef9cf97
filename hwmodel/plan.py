"""The plan: one answer to "will it fit, how fast, with which flags, and how sure".

`make_plan` runs the search and computes every figure of the answer with the one estimator;
`hwmodel.plan_view` prints it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hwmodel.candidate import GOOD_TIER, Candidate
from hwmodel.command import Launch, build_command
from hwmodel.memory import Ledger
from hwmodel.placement import sockets
from hwmodel.predict import predict
from hwmodel.request import MAX_COUNT, PlanRequest
from hwmodel.run import Estimate, Split
from hwmodel.search import (
    affordable,
    best_of,
    candidates,
    check_split,
    choose,
    closest,
    make_candidate,
    splits_of,
    why_illegal,
)
from hwmodel.speculative import conditional_acceptance

WORTHWHILE = 1.03  # drafting is recommended from this gain on
NEAR_BEST = 0.03  # a shorter draft is taken if it loses no more gain: it needs less acceptance
_DEPTH_DIVISORS = (64, 16, 4, 1)
_PROMPT_DIVISORS = (16, 4, 1)


@dataclass(frozen=True)
class DraftOption:
    """Decode with so many drafts per step; `gain` is against none."""

    drafts: int
    decode: Estimate
    gain: float
    mtp_bytes: float
    fits: bool


@dataclass(frozen=True)
class PromptFigure:
    """Speed and time to first token of one prompt size."""

    prompt_tokens: int
    prefill: Estimate
    ttft: Estimate


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        chosen: the configuration that every figure describes: the recommended one, or, where the
            request cannot be met, the closest that holds the model.
        holds: whether the request can be met (exit code 0).
        problem: why not, empty where it can.
        has_nearest: `chosen` is a substitute that does hold the model.
        held: the devices do hold the model; it is too slow or too dear.
        memory: ledger of `chosen` with the recommended drafts.
        max_context: longest context that still fits, at the raised limit where there is one.
        decode: estimates without drafts at ascending depths, as (depth, estimate).
        drafts: every draft length that the engine supports, 0 first; `best_drafts` of them.
        alternatives: what other numbers of the same device would hold.
    """

    request: PlanRequest
    chosen: Candidate
    holds: bool
    problem: str
    has_nearest: bool
    held: bool
    memory: Ledger
    max_context: int
    decode: tuple[tuple[int, Estimate], ...]
    prompts: tuple[PromptFigure, ...]
    drafts: tuple[DraftOption, ...]
    best_drafts: int
    acceptance: tuple[float, ...]
    command: str
    alternatives: tuple[Candidate, ...]

    @property
    def draft_depth(self) -> int:
        """Tokens in the cache where the drafts are compared: a quarter of the context."""
        return draft_depth(self.chosen)

    @property
    def assumed(self) -> str:
        """Options that the configuration shown needs beyond those of the request, '' for none."""
        c, r = self.chosen, self.request
        if c.ram_bytes is None or (c.ram_bytes, c.host) == (r.ram_bytes, r.host):
            return ""
        return f"--ram {c.ram_bytes / 2**30:g}" + (f" --host {c.host.name}" if c.host else "")

    @property
    def fits(self) -> bool:
        """The request can be met as the machine comes."""
        return self.holds and self.memory.margin_bytes >= 0

    @property
    def fits_with(self) -> str:
        """The setting that makes it fit, empty where none is needed or none helps."""
        if self.holds and self.memory.margin_bytes < 0:
            return self.chosen.device.raise_how
        return ""


def make_plan(request: PlanRequest) -> Plan:
    """Search and answer.

    Raises:
        RequestError: the split asked for cannot run.
    """
    check_split(request)
    chosen = choose(request)
    holds = held = chosen is not None
    problem = ""
    if not holds:
        problem, held = _problem(request)
    has_nearest = False
    if chosen is None:
        chosen = closest(request)
        has_nearest = chosen is not None
    if chosen is None:
        chosen = _smallest(request)
    options = _draft_options(chosen)
    best = _best_drafts(options)
    with_drafts = dataclasses.replace(chosen, run=chosen.at(drafts=best))
    return Plan(
        request=request,
        chosen=chosen,
        holds=holds,
        problem=problem,
        has_nearest=has_nearest,
        held=held,
        memory=with_drafts.memory,
        max_context=max_context(with_drafts),
        decode=_decode(chosen),
        prompts=_prompts(chosen),
        drafts=options,
        best_drafts=best,
        acceptance=request.acceptance or conditional_acceptance(),
        command=command_of(chosen, best),
        alternatives=_alternatives(request, chosen),
    )


def command_of(candidate: Candidate, drafts: int = 0) -> str:
    """The exact command that starts a candidate."""
    device, layers = candidate.device, candidate.host_layers
    processor = device if candidate.backend == "cpu" else candidate.host
    all_layers = layers and layers == candidate.run.model.moe_layers
    launch = Launch(
        engine=candidate.engine,
        backend=candidate.backend,
        quant=candidate.run.quant.name,
        file=candidate.run.quant.file,
        holds_mtp=candidate.run.quant.holds_mtp,
        model=candidate.run.model.title,
        context=candidate.context,
        count=candidate.count,
        placement=candidate.run.placement,
        kv_type=candidate.run.workload.kv_type,
        sequences=candidate.run.workload.concurrency,
        drafts=drafts,
        micro_batch=candidate.run.workload.micro_batch,
        host_layers=None if all_layers else layers,
        hosts=-(-candidate.count // device.max_per_host),
        layer_shares=candidate.layer_shares if layers and candidate.count > 1 else (),
        numa=processor is not None and sockets(processor) > 1,
    )
    return build_command(launch)


def max_context(candidate: Candidate) -> int:
    """Longest context, up to the model's own, that fits at the raised limit; 0 for none."""

    def fits(tokens: int) -> bool:
        return dataclasses.replace(candidate, context=tokens).holds

    low, high = 0, candidate.run.model.max_context
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _problem(request: PlanRequest) -> tuple[str, bool]:
    """Why the request cannot be met: memory, price or speed, in that order; and whether the
    devices hold the model all the same."""
    device = request.device
    linked = device.link_bytes_per_s is not None
    counts = [request.count] if request.count else list(range(1, MAX_COUNT + 1 if linked else 2))
    held = [c for n in counts for c in candidates(request, n) if c.holds]
    if not held:
        return _no_room(request, counts), False
    if not any(affordable(request, c.count) for c in held):
        least = min(c.devices_usd or 0.0 for c in held)
        return f"what holds the model costs {least:,.0f} dollars or more", True
    fastest = max(c.decode.value or 0.0 for c in held)
    return (
        f"nothing reaches {request.min_decode:,.10g} tokens/s at {request.context:,} tokens; "
        f"the fastest makes {fastest:{',.0f' if fastest >= 100 else '.3g'}}"
    ), True


def _no_room(request: PlanRequest, counts: list[int]) -> str:
    """Why nothing holds the model: an illegal split, or so many GB too little."""
    device, count = request.device, counts[-1]
    many = f"{count}x {device.name}" if count > 1 else device.name
    if len(counts) > 1:
        many = f"1 to {many}"
    what = f"{request.quant} does not fit" if request.quant else "no published type fits"
    least, illegal = _least_short(request, count)
    if least is None:
        return f"{what} {many}: {illegal}" if illegal else f"{what} {many}"
    missing = -least.memory.raised_margin_bytes / 1e9
    why = f"{missing:.1f} GB too little" if missing > 0 else least.share_problem
    named = "" if request.quant else f"for {least.run.quant.name} in {least.engine.title} "
    text = f"{what} {many}: {named}{why}"
    if illegal:
        text += f" ({illegal})"
    helps = device.unified or any(e.host_experts for e in request.engines)
    return text + (
        "; --ram GB adds host memory and disk" if helps and not request.ram_bytes else ""
    )


def _least_short(request: PlanRequest, count: int) -> tuple[Candidate | None, str]:
    """Of all legal configurations on so many devices the one that lacks least, and why others
    are illegal."""
    found: list[Candidate] = []
    illegal = ""
    able = [s for e in request.engines for s in splits_of(e, request.device, count)]
    if request.split and request.split not in able:
        who = " and ".join(e.title for e in request.engines)
        illegal = f"{who} cannot split by {request.split} here; they can by {_listed(able)}"
    for engine in request.engines:
        for split in splits_of(engine, request.device, count):
            if request.split not in (None, split):
                continue
            for quant in [request.quant] if request.quant else engine.published:
                if not request.can_load(engine, quant):
                    if request.lacks_fp8(engine, quant):
                        illegal = f"{engine.title} needs FP8 arithmetic for it"
                    continue
                why = why_illegal(request.model, request.kind(quant), split, count)
                illegal = why or illegal
                if why is None:
                    found.append(make_candidate(request, engine, split, count, quant))
    best = max(found, key=lambda c: c.memory.raised_margin_bytes) if found else None
    return best, illegal if request.split or best is None else ""


def _listed(splits: list[Split]) -> str:
    return ", ".join(dict.fromkeys(splits)) or "nothing"


def _smallest(request: PlanRequest) -> Candidate:
    """The smallest published type on the devices asked for, although it does not fit."""
    engine = request.engines[0]
    count = request.count or 1
    split = (request.split and (request.split,)) or splits_of(engine, request.device, count)
    quant = request.quant or engine.published[-1]
    return make_candidate(request, engine, (split or ("layer",))[0], count, quant)


def _decode(candidate: Candidate) -> tuple[tuple[int, Estimate], ...]:
    depths = sorted({candidate.context // d for d in _DEPTH_DIVISORS})
    return tuple((d, predict(candidate.at(depth=d, drafts=0), "decode_tok_s")) for d in depths)


def _prompts(candidate: Candidate) -> tuple[PromptFigure, ...]:
    sizes = sorted({max(1, candidate.context // d) for d in _PROMPT_DIVISORS})
    found = []
    for size in sizes:
        run = candidate.at(prompt_tokens=size, depth=0, drafts=0)
        found.append(PromptFigure(size, predict(run, "prefill_tok_s"), predict(run, "ttft_s")))
    return tuple(found)


def draft_depth(candidate: Candidate) -> int:
    """Where drafts are compared: a quarter of the context."""
    return candidate.context // 4


def _draft_options(candidate: Candidate) -> tuple[DraftOption, ...]:
    """Every draft length of the engine, at `draft_depth`."""
    depth = draft_depth(candidate)
    most = min(candidate.engine.max_drafts, candidate.run.model.mtp_layers)
    plain = predict(candidate.at(depth=depth, drafts=0), "decode_tok_s")
    found = []
    for drafts in range(most + 1):
        drafting = dataclasses.replace(candidate, run=candidate.at(depth=depth, drafts=drafts))
        decode = predict(drafting.run, "decode_tok_s")
        gain = decode.value / plain.value if decode.value and plain.value else 0.0
        found.append(DraftOption(drafts, decode, gain, drafting.memory.mtp_bytes, drafting.holds))
    return tuple(found)


def _best_drafts(options: tuple[DraftOption, ...]) -> int:
    """The fewest drafts within `NEAR_BEST` of the largest gain, 0 where none is worth it."""
    worth = [o for o in options if o.drafts and o.fits and o.gain >= WORTHWHILE]
    most = max((o.gain for o in worth), default=0.0)
    return min((o.drafts for o in worth if o.gain >= most - NEAR_BEST), default=0)


def _alternatives(request: PlanRequest, chosen: Candidate) -> tuple[Candidate, ...]:
    """What other counts of the device hold, where that is another type than the chosen one."""
    if request.count is not None or request.device.link_bytes_per_s is None:
        return ()
    found: list[Candidate] = []
    for count in (1, 2, 4, 8):
        other = best_of(request, count) if count != chosen.count else None
        if other is None or other.run.quant == chosen.run.quant:
            continue
        if found and found[-1].run.quant == other.run.quant:
            continue
        if count > chosen.count and other.tier >= chosen.tier and chosen.tier <= GOOD_TIER:
            continue
        found.append(other)
    return tuple(found[:3])

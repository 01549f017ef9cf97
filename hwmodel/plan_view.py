"""A plan as one screen of text."""

from __future__ import annotations

import textwrap

from hwmodel.candidate import Candidate
from hwmodel.command import MTP_FILE, weights_name
from hwmodel.fit import unmeasured
from hwmodel.plan import NEAR_BEST, WORTHWHILE, Plan
from hwmodel.predict import config_columns
from hwmodel.probed import cache_note, fit_for, in_cache
from hwmodel.quant import weight_bytes
from hwmodel.run import Estimate, NearestRun

WIDTH = 100
_LABEL = 10


def figure(value: float) -> str:
    """A speed or time with the digits that its error supports."""
    if value >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def gigabytes(value: float) -> str:
    """Bytes as decimal GB."""
    return f"{value / 1e9:.1f}"


def pair(estimate: Estimate) -> str:
    """`48 tok/s (57 % of 84)`: the estimate and its share of the datasheet's limit."""
    if estimate.value is None:
        return f"not predicted ({estimate.reason})"
    if not estimate.roofline:
        return f"{figure(estimate.value)} {estimate.unit}"
    share = 100 * estimate.value / estimate.roofline
    return (
        f"{figure(estimate.value)} {estimate.unit} ({share:.0f} % of {figure(estimate.roofline)})"
    )


def band(estimate: Estimate) -> str:
    """`41-55`, empty where declined."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{figure(estimate.low)} to {figure(estimate.high)}"


def plan_text(plan: Plan) -> str:
    """The plan as at most about 35 lines of 98 columns."""
    lines = [_title(plan), ""]
    lines += _block("Fits", _fits(plan))
    lines += _block("Quant", [_quant(plan)])
    lines += _block("Context", [_context(plan)])
    lines += _block("Decode", _decode(plan))
    lines += _block("Prompt", _prompts(plan))
    lines += _block("Drafts", _drafts(plan))
    lines += _block("Split", [split_text(plan.chosen)])
    lines += _block("Start", shell_lines(plan.command, WIDTH - _LABEL), wrap=False)
    lines += _block("Files", [_files(plan)])
    lines += _block("How sure", _sure(plan))
    if plan.alternatives:
        lines += _block("Also", [_alternative(c) for c in plan.alternatives])
    return "\n".join(lines)


def _block(label: str, texts: list[str], wrap: bool = True) -> list[str]:
    found: list[str] = []
    for text in texts:
        width = WIDTH - _LABEL if wrap else 10_000
        found += textwrap.wrap(text, width, break_on_hyphens=False) if wrap else [text]
    return [f"{label if i == 0 else '':<{_LABEL}}{line}".rstrip() for i, line in enumerate(found)]


def shell_lines(command: str, width: int) -> list[str]:
    """A command over several lines, broken before flags with the shell's backslash."""
    pieces = command.split(" --")
    words = [pieces[0], *(f"--{p}" for p in pieces[1:])]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _title(plan: Plan) -> str:
    c = plan.chosen
    many = f"{c.count}x " if c.count > 1 else ""
    what = f"{c.run.model.title} on {many}{c.device.title}"
    how = f"{c.engine.title} ({c.backend}), {c.run.quant.name}, {plan.request.context:,} tokens"
    sequences = c.run.workload.concurrency
    if sequences > 1:
        how += f" for each of {sequences} sequences"
    head = f"{what}\n{how}"
    if not plan.holds:
        shown = "The closest that does" if plan.has_nearest else "The smallest type, all the same"
        verdict = "DOES NOT FIT"
        if plan.held:
            verdict, shown = "FITS, BUT NOT AS ASKED", "Without that wish"
        if plan.assumed:
            shown += f", with {plan.assumed}"
        head = f"{verdict}: {plan.problem}.\n{shown}:\n\n{head}"
    return head


def _fits(plan: Plan) -> list[str]:
    m, device = plan.memory, plan.chosen.device
    parts = [("weights", m.weights_bytes), ("KV", m.kv_bytes), ("buffers", m.compute_bytes)]
    if m.mtp_bytes:
        parts.append(("MTP", m.mtp_bytes))
    sum_text = " + ".join(f"{name} {gigabytes(v)}" for name, v in parts)
    used = f"{sum_text} = {gigabytes(m.used_bytes)} GB"
    usable = gigabytes(m.usable_bytes)
    if m.margin_bytes >= 0:
        return [f"yes, {gigabytes(m.margin_bytes)} GB to spare", f"{used} of {usable} GB usable"]
    if m.raised_margin_bytes >= 0:
        raised = gigabytes(m.usable_bytes + m.raised_margin_bytes - m.margin_bytes)
        return [
            f"yes, {gigabytes(m.raised_margin_bytes)} GB to spare, after:  {device.raise_how}",
            f"{used} of {raised} GB usable then; as it comes {usable} GB, "
            f"{gigabytes(-m.margin_bytes)} GB too little",
        ]
    return [f"no, {gigabytes(-m.raised_margin_bytes)} GB short", f"{used} of {usable} GB usable"]


def _quant(plan: Plan) -> str:
    run = plan.chosen.run
    size = weight_bytes(run.model, run.quant)
    bits = 8 * size / run.model.parameters
    cost = plan.chosen.quality.text()
    return f"{run.quant.name}, {gigabytes(size)} GB, {bits:.2f} bits per weight: {cost}"


def _context(plan: Plan) -> str:
    kv = plan.chosen.run.workload.kv_type
    most = plan.max_context
    whole = " (all the model has)" if most == plan.chosen.run.model.max_context else ""
    return f"up to {most:,} tokens{whole} with {kv} KV"


def _decode(plan: Plan) -> list[str]:
    found = []
    for depth, e in plan.decode:
        text = f"{depth:>8,} deep  {pair(e):<28} {band(e):<14}"
        found.append(f"{text} limited by {e.limiting}" if e.limiting else text)
    sequences = plan.chosen.run.workload.concurrency
    if sequences > 1:
        found.append(f"each; all {sequences} sequences together {sequences} times that")
    return found


def _prompts(plan: Plan) -> list[str]:
    found = []
    for p in plan.prompts:
        ttft = f"{figure(p.ttft.value)} s" if p.ttft.value is not None else "unknown time"
        found.append(
            f"{p.prompt_tokens:>8,} long  {ttft} to first token ({band(p.ttft)}), "
            f"prefill {pair(p.prefill)}"
        )
    return found


def _drafts(plan: Plan) -> list[str]:
    options = [o for o in plan.drafts if o.drafts]
    if not options:
        who = plan.chosen.engine.title if plan.chosen.run.model.is_step else "a plan"
        return [f"off: {who} does not draft with this model"]
    shown = ", ".join(f"{o.drafts}: {o.gain:.2f}x{'' if o.fits else ' (no room)'}" for o in options)
    basis = plan.request.stats_file if plan.request.acceptance else "published acceptance"
    if not plan.best_drafts:
        crowded = any(o.gain >= WORTHWHILE and not o.fits for o in options)
        why = "no room for the MTP layers" if crowded else "drafting does not pay here"
        return [f"off: {why} ({shown}; {basis})"]
    best = plan.drafts[plan.best_drafts]
    most = max(o.gain for o in options if o.fits)
    chosen = f", the fewest within {NEAR_BEST:g} of the best" if best.gain < most else ""
    return [
        f"{best.drafts} per step: {pair(best.decode)}, {best.gain:.2f} times as fast "
        f"({shown}; {basis}), +{gigabytes(best.mtp_bytes)} GB; "
        f"{plan.draft_depth:,} deep{chosen}"
    ]


def split_text(candidate: Candidate) -> str:
    """How the model is dealt out over devices, host memory and disk, in words."""
    place, n = candidate.run.placement, candidate.count
    layers = candidate.run.model.moe_layers
    text = {
        "single": "everything on one device",
        "layer": f"layers dealt out over {n} devices (capacity, not speed)",
        "tensor": f"every matrix split over {n} devices",
        "expert": f"whole experts dealt out over {n} devices, the rest split",
    }[place.split]
    if candidate.host_layers:
        text += f"; experts of {candidate.host_layers} of {layers} layers in host memory"
        text += f" ({gigabytes(candidate.memory.host_bytes)} GB)"
    if place.ssd_share:
        text += f"; {100 * place.ssd_share:.0f} % of the experts stay on disk"
        text += f" ({gigabytes(candidate.memory.disk_bytes)} GB)"
    if n > 1 and candidate.device.max_per_host < n:
        text += f"; {-(-n // candidate.device.max_per_host)} machines over "
        text += candidate.device.network_kind or "a network"
    return text


def _files(plan: Plan) -> str:
    engine, kind = plan.chosen.engine, plan.chosen.run.quant
    quant, file = kind.name, kind.file
    title = plan.chosen.run.model.title
    name, repository = weights_name(engine, quant, file, title), engine.repositories.get(quant)
    if file:
        text = f"{file}, as given; sizes read from it"
    elif repository == name:
        text = f"https://huggingface.co/{repository}"
    elif repository:
        text = f"{name} from https://huggingface.co/{repository}"
    else:
        text = f"{name}: your own conversion, or one of the community's of that type"
    if plan.best_drafts and engine.flags.get("draft_model") and not kind.holds_mtp:
        text += f"; {MTP_FILE}: the MTP layers, which the first official GGUF lacks"
    return text


def _sure(plan: Plan) -> list[str]:
    e = plan.decode[0][1]
    texts = [e.status + (f": {e.reason}" if e.reason else "") + _errors(plan)]
    if e.nearest is not None:
        texts.append(f"nearest measured run: {nearest_text(e.nearest)}")
    run = plan.chosen.run
    if missing := unmeasured(fit_for(run), config_columns(run)):
        texts.append(missing)
    depth = plan.decode[0][0]
    if stays := cache_note(in_cache(plan.chosen.at(depth=depth, drafts=0))):
        texts.append(f"note: {stays}")
    parts = ("memory", "bandwidth", "flop", "links")
    used = [k for k in plan.chosen.device.unverified() if k.split(".")[0] in parts]
    if plan.chosen.count == 1:
        used = [k for k in used if not k.startswith(("links.network", "links.device"))]
    if used:
        texts.append(f"not verified for {plan.chosen.device.name}: {', '.join(used)}")
    if plan.chosen.device.notes:
        texts.append(f"note: {plan.chosen.device.notes}")
    return texts


def _errors(plan: Plan) -> str:
    """What cross-validation found for decode on this device, else over all devices."""
    found = fit_for(plan.chosen.run).errors.get("decode_tok_s", {})
    device = plan.chosen.device.name
    own = found.get("by_device", {}).get(device)
    where, entry = (device, own) if own else ("all devices", found)
    errors = entry.get("leave_sweep_out", {})
    if not errors.get("n"):
        return ""
    what = "runs left out of the fit in whole sweeps"
    if plan.chosen.device.peak_is_unknown:
        what = "points of files that the fit never saw"
    return (
        f"; decode on {where}, {what}: median error "
        f"{100 * errors['median']:.0f} %, 90th percentile {100 * errors['p90']:.0f} % "
        f"({errors['n']} runs)"
    )


def nearest_text(run: NearestRun) -> str:
    """A measured run and how far the model is off it."""
    how = "left out of the fit" if run.held_out else "in the fit"
    return (
        f"{run.id} ({run.description}): measured {figure(run.measured)}, predicted "
        f"{figure(run.predicted)} ({100 * run.error:+.0f} %, {how})"
    )


def _alternative(c: Candidate) -> str:
    cost = f", {c.devices_usd:,.0f} dollars" if c.devices_usd else ""
    return (
        f"{c.count}x {c.device.name}: {c.run.quant.name} in {c.engine.title}, {pair(c.decode)} at "
        f"full context{cost}"
    )

"""Claims about speed and speculative decoding."""

from __future__ import annotations

from hwmodel.catalogue import load_model
from hwmodel.claims.finding import (
    CONTRADICTED,
    HOLDS,
    Finding,
    Test,
    untestable,
    when,
)
from hwmodel.claims.machines import (
    SHORT,
    Speed,
    at_speed,
    at_the_launch,
    dated,
    fastest,
    fixed,
    plan_for,
)
from hwmodel.model import step_shape
from hwmodel.plan import make_plan
from hwmodel.plan_view import figure
from hwmodel.predict import predict
from hwmodel.request import make_request
from hwmodel.serving import largest_batch
from hwmodel.speculative import tokens_per_step
from hwmodel.workload import load_profile, run_job

HOPPER, BLACKWELL = ("h100", "h200"), ("b200",)
LOCAL = ("m4max", "dgx-spark", "ryzen-ai-max-395")
PEAK = 350.0


def _shown(speed: Speed) -> str:
    low, high = speed.band
    return f"{figure(speed.tok_s)} tok/s ({figure(low)} to {figure(high)}) on {speed.name}"


def _values(**speeds: Speed) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, s in speeds.items():
        low, high = s.band
        found |= {f"{name}_tok_s": s.tok_s, f"{name}_low": low, f"{name}_high": high}
    return found


def _needed_acceptance(speed: Speed, wanted: float) -> float | None:
    """Chance of every draft at which a configuration makes `wanted` tok/s; None above 1."""
    per_step = tokens_per_step(speed.drafts)
    low, high = 0.0, 1.0
    if speed.tok_s * tokens_per_step(speed.drafts, (1.0,) * speed.drafts) / per_step < wanted:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        reached = speed.tok_s * tokens_per_step(speed.drafts, (middle,) * speed.drafts) / per_step
        low, high = (middle, high) if reached < wanted else (low, middle)
    return high


def _peak(wanted: float, title: str) -> Finding:
    hopper, blackwell, local = fastest(HOPPER), fastest(BLACKWELL), fastest(LOCAL, (1,))
    needed = _needed_acceptance(hopper, wanted)
    most = max(hopper.band[1], blackwell.band[1])
    cards = f"{hopper.candidate.count} data-centre cards serve one user alone"
    if local.tok_s >= wanted:
        verdict = HOLDS
    elif hopper.tok_s >= wanted:
        verdict = when(f"{cards} with {hopper.drafts} drafts")
    elif most >= wanted and needed is not None:
        verdict = when(f"{cards} and {100 * needed:.0f} % of all drafts are accepted")
    else:
        verdict = CONTRADICTED
    inside = "inside" if most >= wanted else "above"
    return Finding(
        computed=f"{_shown(hopper)}; {_shown(blackwell)}",
        verdict=verdict,
        why=f"{title} lies {inside} the band of the fastest server at batch 1; the fastest local "
        f"machine makes {_shown(local)}.",
        command=f"{hopper.command}; {blackwell.command}",
        values={**_values(hopper=hopper, blackwell=blackwell, local=local), "needed": needed},
        extrapolated=hopper.extrapolated or blackwell.extrapolated,
        rests_on=dated(hopper, blackwell, local),
    )


def peak_350() -> Finding:
    """C01"""
    return _peak(PEAK, "350 tok/s")


def peak_400() -> Finding:
    """C38: the text model of Step 3.7 is the same decoder."""
    return _peak(400.0, "400 tok/s")


def typical() -> Finding:
    """C02"""
    box = fixed("h100", 8, "FP8-experts", "sglang", "expert", context=8192)
    alone = at_speed(box, 3)
    crowd = largest_batch(at_speed(box, 3).candidate.run, 100.0)
    pair = at_speed(plan_for("h100").chosen, 3)
    local = fastest(LOCAL, (1,))
    batch = crowd.batch if crowd else 0
    served = [s for s in (pair, alone) if s.band[0] <= 300 and s.band[1] >= 100]
    verdict = CONTRADICTED
    if served:
        where = f"{' or '.join(f'{s.candidate.count}x h100' for s in served)} serve it"
        alike = local.band[1] >= 100
        verdict = when(where + ("" if alike else "; no local machine does"))
    return Finding(
        computed=f"{_shown(pair)}; {_shown(alone)}, 100 tok/s each for up to {batch} users",
        verdict=verdict,
        why=f"Those lie in the range within their bands; the fastest local machine makes "
        f"{_shown(local)}.",
        command=f"{pair.command}; {alone.command}",
        values={**_values(pair=pair, alone=alone, local=local), "batch_at_100_tok_s": batch},
        extrapolated=alone.extrapolated or pair.extrapolated,
        rests_on=dated(pair, alone, local),
    )


def three_at_once() -> Finding:
    """C03"""
    layers = step_shape().mtp_layers
    most, mean = tokens_per_step(layers, (1.0,) * layers), tokens_per_step(layers)
    return Finding(
        computed=f"{layers} drafts, at most {most:.0f} tokens a step, {mean:.2f} on average",
        verdict=when("drafts are counted, not tokens; they are made one after another")
        if layers == 3
        else CONTRADICTED,
        why="Three MTP layers draft in a chain, each from the one before; the step that checks "
        "them adds a token of its own.",
        command="hwmodel explain decode --device h100 --drafts 3",
        values={"most": most, "mean": mean, "drafts": float(layers)},
    )


def four_in_one() -> Finding:
    """C04"""
    most, mean = tokens_per_step(3, (1.0, 1.0, 1.0)), tokens_per_step(3)
    return Finding(
        computed=f"at most {most:.0f}, {mean:.2f} on average at the published acceptance",
        verdict=when("every draft is accepted") if mean < most == 4 else CONTRADICTED,
        why="1 + p1 + p1 p2 + p1 p2 p3 reaches 4 only where all three chances are 1.",
        command="hwmodel explain decode --device h100 --drafts 3",
        values={"most": most, "mean": mean},
    )


def doubles() -> Finding:
    """C05"""
    gains: dict[str, float] = {}
    extrapolated = False
    machines = [(d, plan_for(d).chosen) for d in ("m4max", "dgx-spark", "rtx-pro-6000", "h100")]
    machines += [("rtx4090 and host memory", plan_for("rtx4090", 1, ram_gb=128).chosen)]
    machines += [
        (f"8x {d}", fixed(d, 8, "FP8-experts", "sglang", "expert")) for d in (*HOPPER, *BLACKWELL)
    ]
    for name, candidate in machines:
        plain, drafted = at_speed(candidate, 0, 8192), at_speed(candidate, 3, 8192)
        gains[name] = drafted.tok_s / plain.tok_s
        extrapolated |= drafted.extrapolated
    best = max(gains, key=lambda k: gains[k])
    shown = ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items())
    verdict = CONTRADICTED
    if gains[best] >= 1.8:
        where = ", ".join(n for n, g in gains.items() if g >= 1.8)
        verdict = when(f"the machine has arithmetic to spare: within a tenth on {where}")
    return Finding(
        computed=shown,
        verdict=verdict,
        why="Checking four tokens reads about 31 experts a layer instead of 8: where reading "
        "weights is the limit, most of what the drafts yield is paid for there.",
        command="; ".join(
            f"hwmodel sweep --device {HOPPER[1]} --count 8 --quant FP8 --engine sglang "
            f"--depths 8192 --drafts {n}" for n in (0, 3)
        ) + "; hwmodel plan --device m4max",
        values=dict(gains),
        extrapolated=extrapolated,
        rests_on=dated(*(c for _, c in machines)),
    )  # fmt: skip


def thousand_tokens() -> Finding:
    """C06"""
    best = fastest((*HOPPER, *BLACKWELL))
    asked = best.candidate.at(depth=0, prompt_tokens=1000, drafts=0)
    prompt = predict(asked, "ttft_s")
    first = prompt.value or 0.0
    total = first + 1000 / best.tok_s
    return Finding(
        computed=f"1000 / 350 = {1000 / PEAK:.2f} s; {total:.1f} s with the first token's "
        f"{first:.2f} s on {best.name}",
        verdict=when("the peak is held throughout and the first token comes at once")
        if abs(1000 / PEAK / 2.9 - 1) < 0.05 and best.band[1] >= PEAK
        else CONTRADICTED,
        why="The arithmetic is right for writing alone; reading the prompt, the network and "
        "reasoning tokens come on top.",
        command=best.command,
        values={"arithmetic_s": 1000 / PEAK, "total_s": total, "ttft_s": first},
        extrapolated=best.extrapolated or prompt.status != "calibrated",
        rests_on=dated(best),
    )


def faster_than_gemini() -> Finding:
    """C07"""
    server = fixed("h100", 8, "FP8-experts", "sglang", "expert")
    shared = at_speed(server, 3, concurrency=16)
    ratio, value = PEAK / 200 - 1, shared.tok_s
    return Finding(
        computed=f"350 / 200 - 1 = {100 * ratio:.0f} %; with 16 users on 8x h100 "
        f"{figure(value)} tok/s, {100 * (value / 200 - 1):+.0f} %",
        verdict=when("a peak of one is set against the usual speed of the other")
        if abs(ratio - 0.75) < 0.01
        else CONTRADICTED,
        why="The quotient is right; like for like a shared server gives each user less than its "
        "peak. Gemini's own speed is not testable here.",
        command=f"{shared.command} --concurrency 16",
        values={"ratio": ratio, "shared_tok_s": value},
        extrapolated=shared.extrapolated,
        rests_on=dated(shared),
    )


def deepseek_r1() -> Finding:
    """C08"""
    request = make_request("h200", load_model("deepseek-r1"), count=8, quant="FP8")
    alone = at_speed(make_plan(request).chosen)
    crowd = largest_batch(alone.candidate.run, 80.0)
    batch = crowd.batch if crowd else 0
    inside = alone.band[0] <= 80 <= alone.band[1]
    shared = when(f"a server is shared by {batch} users") if batch else CONTRADICTED
    return Finding(
        computed=f"{_shown(alone)}; 80 tok/s each for up to {batch} users",
        verdict=HOLDS if inside else shared,
        why=f"Without drafts; at 80 tok/s 1,000 tokens take {1000 / 80:.1f} s.",
        command="hwmodel plan --device h200 --count 8 --model deepseek-r1 --quant FP8",
        values={**_values(alone=alone), "batch_at_80_tok_s": batch},
        extrapolated=alone.extrapolated,
        rests_on=dated(alone),
    )


def vllm_drafts() -> Finding:
    """C23"""
    box = fixed("h100", 8, "FP8-experts", "vllm", "expert")
    launch, able = at_the_launch("vllm"), box.engine.max_drafts
    then, now = round(launch.value), min(3, able)
    plain, first, drafted = (at_speed(box, n) for n in (0, then, now))
    lacked, lacks = then < 3, now < 3
    verdict = HOLDS if lacked and lacks else CONTRADICTED
    if lacked and not lacks:
        verdict = when(f"the build is of the launch ({launch.as_of}); {box.engine.label} has it")
    return Finding(
        computed=f"at the launch ({launch.as_of}) {then} draft, today ({box.engine.label}) up to "
        f"{able}: {figure(plain.tok_s)} tok/s without drafts, {figure(first.tok_s)} with {then}, "
        f"{figure(drafted.tok_s)} with {now} on 8x h100",
        verdict=verdict,
        why="True when it was written, not any more. Even then the launch command of the model "
        f"card drafted {then} token a step, so that the fallback was not to a single token.",
        command="; ".join(["hwmodel engines show vllm", *(s.command for s in (first, drafted))]),
        values={
            "max_drafts": float(able),
            "launch_drafts": launch.value,
            "plain_tok_s": plain.tok_s,
            "launch_tok_s": first.tok_s,
            "drafted_tok_s": drafted.tok_s,
        },
        rests_on=(*dated(box), f"the model card of {launch.as_of}"),
    )


def agent_loop() -> Finding:
    """C24"""
    profile = load_profile("agent-loop")
    written = sum(t.reasoning_tokens + t.answer_tokens for t in profile.turns)
    slow, quick = written / 60, written / PEAK
    server = fixed("h100", 8, "FP8-experts", "sglang", "expert")
    jobs = {"8x h100": run_job(profile, server, 3)}
    for device in ("m4max", "dgx-spark"):
        plan = plan_for(device)
        jobs[device] = run_job(profile, plan.chosen, plan.best_drafts)
    shown = ", ".join(f"{name} {figure(j.seconds)} s" for name, j in jobs.items())
    return Finding(
        computed=f"writing alone {slow:.0f} s at 60 and {quick:.1f} s at 350 tok/s; with prompts "
        f"and 5 s of tools: {shown}",
        verdict=when("nothing but writing is counted and 350 tok/s are held")
        if abs(slow / 50 - 1) < 0.1 and abs(quick / 8 - 1) < 0.1
        else CONTRADICTED,
        why=f"{written:,} tokens explain both figures; tools and prompts do not shrink with the "
        "model's speed.",
        command="hwmodel workload agent-loop --device m4max --device dgx-spark --device h100",
        values={"at_60_s": slow, "at_350_s": quick, **{n: j.seconds for n, j in jobs.items()}},
        extrapolated=any(j.status != "calibrated" for j in jobs.values()),
        rests_on=dated(server, *(plan_for(d).chosen for d in ("m4max", "dgx-spark"))),
    )


def slower_than_h100() -> Finding:
    """C19: on the largest type that a single H100 holds."""
    types = [fixed("h100", 1, q, "llama.cpp", context=8192) for q in ("Q3_K_M", "IQ3_XXS")]
    one = [c for c in types if c.holds]
    if not one:
        return untestable("no published type fits a single H100.")
    quant = one[0].run.quant.name
    single = at_speed(one[0])
    four = at_speed(fixed("rtx4090", 4, quant, "llama.cpp", "layer", context=8192))
    return Finding(
        computed=f"{quant}: {_shown(four)}; {_shown(single)}",
        verdict=when(f"both hold the file, which for one H100 means {quant}")
        if four.tok_s < single.tok_s
        else CONTRADICTED,
        why="Layers dealt out over four cards add room, not speed: every token passes them one "
        "after another. The int4 file fits neither.",
        command=f"{four.command}; {single.command}",
        values=_values(four=four, single=single),
        extrapolated=four.extrapolated or single.extrapolated,
        rests_on=dated(four, single),
    )


def runs_locally() -> Finding:
    """C34"""
    plans = {d: plan_for(d) for d in ("m4max", "dgx-spark")}
    speeds = {d: at_speed(p.chosen, 0, SHORT) for d, p in plans.items()}
    able = all(p.holds for p in plans.values())
    raised = " and ".join(d for d, p in plans.items() if p.holds and not p.fits)
    return Finding(
        computed="; ".join(_shown(s) for s in speeds.values()),
        verdict=(HOLDS if not raised else when(f"the GPU memory limit of {raised} is raised"))
        if able
        else CONTRADICTED,
        why="Both hold the int4 file at 32K of context." if able else "Not both hold the file.",
        command="; ".join(
            ["hwmodel compare m4max dgx-spark", *(s.command for s in speeds.values())]
        ),
        values=_values(**{d.replace("-", "_"): s for d, s in speeds.items()}),
        extrapolated=any(s.extrapolated for s in speeds.values()),
        rests_on=dated(*speeds.values()),
    )


def gaming_pc() -> Finding:
    """C35: one card of 24 GB beside 32 to 128 GB of host memory."""
    plans = {ram: plan_for("rtx4090", 1, 8192, ram_gb=ram) for ram in (32, 64, 96, 128)}
    able = {ram: p for ram, p in plans.items() if p.holds and p.chosen.run.placement.ssd_share == 0}
    if not able:
        return Finding("no type fits 128 GB and the card", HOLDS, "", "", {})
    least = min(able)
    shown = [(ram, at_speed(p.chosen, 0, SHORT)) for ram, p in able.items()]
    return Finding(
        computed="; ".join(
            f"{figure(s.tok_s)} tok/s ({figure(s.band[0])} to {figure(s.band[1])}) with {ram} GB, "
            f"{s.candidate.run.quant.name}" for ram, s in shown
        ),
        verdict=when(f"the PC has less than {least} GB of memory beside a card of 24 GB")
        if least > 32
        else CONTRADICTED,
        why=f"From {least} GB on the experts live in ordinary memory and the card does the rest, "
        "at reading speed.",
        command=f"hwmodel plan --device rtx4090 --count 1 --ram {least} --context 8192",
        values={"least_ram_gb": float(least), **_values(**{f"ram_{r}_gb": s for r, s in shown})},
        extrapolated=any(s.extrapolated for _, s in shown),
        rests_on=dated(*(s for _, s in shown)),
    )  # fmt: skip


def gpt4_turbo() -> Finding:
    """C09"""
    return untestable("Size and hardware of GPT-4 Turbo are not published.")


TESTS: dict[str, Test] = {
    "C01": peak_350, "C02": typical, "C03": three_at_once, "C04": four_in_one, "C05": doubles,
    "C06": thousand_tokens, "C07": faster_than_gemini, "C08": deepseek_r1, "C09": gpt4_turbo,
    "C19": slower_than_h100, "C23": vllm_drafts, "C24": agent_loop, "C34": runs_locally,
    "C35": gaming_pc, "C38": peak_400,
}  # fmt: skip

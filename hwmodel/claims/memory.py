"""Claims about what fits where, and about the model's own sizes."""

from __future__ import annotations

import math

from hwmodel.candidate import Candidate
from hwmodel.claims.finding import CONTRADICTED, HOLDS, Finding, Test, untestable, when
from hwmodel.claims.machines import (
    at_speed,
    dated,
    fewest,
    fixed,
    holding,
    plan_for,
    priced,
)
from hwmodel.devices import load_device
from hwmodel.memory import kv_bytes, ledger
from hwmodel.model import step_shape
from hwmodel.operations import step_counts
from hwmodel.plan import max_context
from hwmodel.plan_view import figure
from hwmodel.predict import predict
from hwmodel.quant import load_quant, weight_bytes

GB, GIB = 1e9, 2**30
FULL = 262_144


def _gb(value: float) -> str:
    return f"{value / GB:.1f} GB"


def _needs(quant: str, context: int, kv_type: str = "f16") -> float:
    """Bytes that llama.cpp takes on one machine of unified memory, drafts aside."""
    return ledger(fixed("m4max", 1, quant, "llama.cpp", kv_type=kv_type).run, context).used_bytes


def _longest(limit: float, quant: str) -> int:
    """Longest context within a number of bytes, 0 where not even the weights fit."""
    low, high = 0, FULL
    if _needs(quant, 1) > limit:
        return 0
    if _needs(quant, high) <= limit:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _needs(quant, middle) <= limit else (low, middle)
    return low


def _up_to(longest: int) -> str:
    if longest >= FULL:
        return HOLDS
    return when(f"the context is at most {longest:,} tokens") if longest else CONTRADICTED


def at_least_120() -> Finding:
    """C10"""
    int4, small = _needs("Q4_K_S", 32768), _needs("IQ3_XXS", 32768)
    longest, whole = _longest(120 * GB, "Q4_K_S"), _needs("Q4_K_S", FULL)
    return Finding(
        computed=f"int4 {_gb(int4)} at 32K, {_gb(whole)} at 256K; IQ3_XXS {_gb(small)} at 32K",
        verdict=CONTRADICTED
        if small > 120 * GB or not longest
        else when(f"the weights are int4 and the context is at most {longest:,} tokens"),
        why=f"As a minimum it is {'too high' if small < 120 * GB else 'too low'}: IQ3_XXS needs "
        f"{_gb(120 * GB - small)} less; for int4 at the whole context it is "
        f"{_gb(abs(whole - 120 * GB))} too {'low' if whole > 120 * GB else 'high'}.",
        command="hwmodel sweep --device m4max --quant Q4_K_S --quant IQ3_XXS --depths 32K,256K",
        values={
            "int4_32k_bytes": int4, "int4_256k_bytes": whole, "iq3_xxs_32k_bytes": small,
            "longest_in_120_gb": float(longest),
        },
        rests_on=dated(fixed("m4max", 1, "Q4_K_S", "llama.cpp")),
    )  # fmt: skip


def int4_size() -> Finding:
    """C11"""
    size = weight_bytes(step_shape(), load_quant("Q4_K_S"))
    return Finding(
        computed=_gb(size),
        verdict=HOLDS if abs(size / 111.5e9 - 1) < 0.005 else CONTRADICTED,
        why="Every tensor of the trunk in the type that llama.cpp's Q4_K_S mixture gives it.",
        command="hwmodel explain memory --device m4max --quant Q4_K_S",
        values={"bytes": size},
    )


def overhead_7() -> Finding:
    """C12"""
    weights = weight_bytes(step_shape(), load_quant("Q4_K_S"))
    longest = _longest(weights + 7 * GB, "Q4_K_S")
    short, whole = (_needs("Q4_K_S", n) - weights for n in (8192, FULL))
    return Finding(
        computed=f"{_gb(short)} at 8K, {_gb(whole)} at 256K (f16 KV, buffers)",
        verdict=_up_to(longest),
        why="Twelve full-attention layers add 49,152 bytes a token in f16; the 33 sliding ones "
        "stay at their window.",
        command="hwmodel explain memory --device m4max --quant Q4_K_S --depth 256K",
        values={"at_8k_bytes": short, "at_256k_bytes": whole, "longest": float(longest)},
        rests_on=dated(fixed("m4max", 1, "Q4_K_S", "llama.cpp")),
    )


def unified_128() -> Finding:
    """C13"""
    found: list[str] = []
    limits: list[str] = []
    values: dict[str, float | None] = {}
    able = as_is = True
    for name in ("m4max", "dgx-spark", "ryzen-ai-max-395"):
        plan = plan_for(name, 1, 32768, "Q4_K_S")
        state = "fits" if plan.fits else f"fits after: {plan.fits_with}" if plan.holds else "no"
        found.append(f"{name} {state}, {plan.max_context:,} tokens")
        values[f"{name}_margin_bytes"] = plan.memory.raised_margin_bytes
        limits += priced(name, "memory.usable_bytes", "memory.raised_usable_bytes")
        able, as_is = able and plan.holds, as_is and plan.fits
    raised = HOLDS if as_is else when("the limit of GPU memory is raised where there is one")
    return Finding(
        computed="; ".join(found),
        verdict=raised if able else CONTRADICTED,
        why="128 GB hold the int4 file with room for a long context, but not every machine gives "
        "its GPU all of them as it comes.",
        command="hwmodel compare m4max dgx-spark ryzen-ai-max-395 --quant Q4_K_S",
        values=values,
        rests_on=(*dated(plan.chosen), *limits),
    )


def _short_of(c: Candidate) -> float:
    return -c.memory.raised_margin_bytes


def one_h100() -> Finding:
    """C14"""
    one = fixed("h100", 1, "Q4_K_S", "llama.cpp", context=8192)
    need = fewest("h100", "Q4_K_S")
    smaller = holding("h100", 1)
    other = smaller[0].run.quant.name if smaller else "none"
    loss = smaller[0].quality.perplexity_increase if smaller else None
    return Finding(
        computed=f"int4 is {_gb(_short_of(one))} too large for one; {need} hold it; "
        f"one holds {other}",
        verdict=CONTRADICTED if _short_of(one) > 0 else HOLDS,
        why=f"{_gb(one.memory.weights_bytes)} of int4 weights against "
        f"{_gb(one.memory.usable_bytes)} of the card; the same article asks for 120 GB."
        + (f" {other} fits, at {100 * loss:.0f} % more perplexity." if loss else ""),
        command="hwmodel plan --device h100 --count 1 --quant Q4_K_S",
        values={"short_bytes": _short_of(one), "needed": float(need)},
        rests_on=dated(one),
    )


def one_card_class() -> Finding:
    """C39"""
    alone = {d: fixed(d, 1, "Q4_K_S", "llama.cpp", context=8192) for d in ("h100", "a100")}
    short = {d: _short_of(c) for d, c in alone.items()}
    return Finding(
        computed=", ".join(f"{d}: {_gb(v)} too little" for d, v in short.items()),
        verdict=CONTRADICTED if all(v > 0 for v in short.values()) else HOLDS,
        why="Both have 80 GB; the int4 weights alone have 111.5.",
        command="hwmodel compare h100 a100 --count 1 --quant Q4_K_S",
        values={f"{d}_short_bytes": v for d, v in short.items()},
        rests_on=dated(*alone.values()),
    )


def four_4090_total() -> Finding:
    """C17"""
    total = 4 * load_device("rtx4090").memory_bytes
    return Finding(
        computed=f"{total / GIB:.0f} GiB = {_gb(total)}",
        verdict=HOLDS if abs(total / GIB / 96 - 1) < 0.01 else CONTRADICTED,
        why="Four times 24 GiB, before each card's own reserve.",
        command="hwmodel devices show rtx4090",
        values={"bytes": total},
    )


def four_4090_run() -> Finding:
    """C18"""
    able = holding("rtx4090", 4)
    int4 = fixed("rtx4090", 4, "Q4_K_S", "llama.cpp", "layer", context=8192)
    names = ", ".join(f"{c.run.quant.name} ({_gb(c.memory.weights_bytes)})" for c in able)
    longest = max_context(able[0]) if able else 0
    return Finding(
        computed=f"int4 is {_gb(_short_of(int4))} too large; they hold {names or 'nothing'}",
        verdict=when(f"the type is {able[0].run.quant.name} or experts go to host memory")
        if able
        else CONTRADICTED,
        why=f"The cards' own memory leaves room for {longest:,} tokens beside "
        f"{able[0].run.quant.name}." if able else "No published type fits 96 GiB.",
        command="hwmodel plan --device rtx4090 --count 4 --context 8192",
        values={"short_bytes": _short_of(int4), "longest": float(longest)},
        rests_on=dated(int4),
    )  # fmt: skip


def two_4090() -> Finding:
    """C21"""
    able = holding("rtx4090", 2)
    least = _short_of(fixed("rtx4090", 2, "IQ3_XXS", "llama.cpp", "layer", context=8192))
    plan = plan_for("rtx4090", 2, 8192, ram_gb=128)
    speed = at_speed(plan.chosen)
    low, high = speed.band
    return Finding(
        computed=f"the smallest published type is {_gb(least)} too large; with experts in 128 GB "
        f"of host memory {figure(speed.tok_s)} tok/s ({figure(low)} to {figure(high)})",
        verdict=HOLDS if able else CONTRADICTED,
        why="Some published type fits." if able else "48 GiB hold no published type whole, so "
        "that no quantization does it; experts in host memory do, at the speed given.",
        command="hwmodel plan --device rtx4090 --count 2 --ram 128 --context 8192",
        values={"short_bytes": least, "offload_tok_s": speed.tok_s},
        extrapolated=speed.extrapolated,
        rests_on=dated(speed),
    )  # fmt: skip


def accuracy_loss() -> Finding:
    """C22"""
    return untestable(
        "Accuracy is not a matter of cost; of the types that would be needed nobody has published "
        "a benchmark on this model."
    )


def whole_context() -> Finding:
    """C25"""
    shown: list[str] = []
    values: dict[str, float | None] = {}
    rests: list[str] = []
    able, as_is, beyond = True, True, False
    for name in ("m4max", "dgx-spark"):
        plan = plan_for(name, 1, FULL - 1024, "Q4_K_S")
        deep = at_speed(plan.chosen, 0, FULL - 1024)
        near = at_speed(plan.chosen, 0)
        first = predict(plan.chosen.at(depth=0, prompt_tokens=FULL - 1024, drafts=0), "ttft_s")
        minutes = (first.value or math.nan) / 60
        shown.append(
            f"{name}: {figure(deep.tok_s)} instead of {figure(near.tok_s)} tok/s, "
            f"{minutes:.0f} min to read it"
        )
        values |= {f"{name}_tok_s": deep.tok_s, f"{name}_prefill_s": first.value}
        able, as_is = able and plan.holds, as_is and plan.fits
        beyond = beyond or deep.extrapolated
        rests += dated(deep)
    raised = HOLDS if as_is else when("the GPU memory limit is raised where there is one")
    return Finding(
        computed="; ".join(shown),
        verdict=raised if able else CONTRADICTED,
        why="It fits; decoding slows down with the cache of the twelve full-attention layers, and "
        "reading the prompt takes its time.",
        command="hwmodel plan --device m4max --quant Q4_K_S --context 261120; "
        "hwmodel plan --device dgx-spark --quant Q4_K_S --context 261120",
        values=values,
        extrapolated=beyond,
        rests_on=tuple(dict.fromkeys(rests)),
    )


def sliding_share() -> Finding:
    """C26"""
    shape = step_shape()
    full = sum(g.layers for g in shape.attention if g.window is None)
    window = next(g.window for g in shape.attention if g.window)
    share = kv_bytes(shape, FULL) / kv_bytes(shape, FULL, sliding_cache="full")
    return Finding(
        computed=f"{full} of {shape.layers} layers full, window {window}; the cache at 256K is "
        f"{100 * share:.1f} % of that without windows",
        verdict=HOLDS if (full, shape.layers, window) == (12, 45, 512) else CONTRADICTED,
        why="Counted from the configuration's layer types; bytes from the memory ledger.",
        command="hwmodel explain memory --device m4max --depth 256K",
        values={"full_layers": float(full), "cache_share": share},
    )


def linear_cost() -> Finding:
    """C27: the local exponent of prefill, d log(cost) / d log(tokens)."""
    shape, quant = step_shape(), load_quant("Q4_K_S")

    def work(tokens: int) -> float:
        return step_counts(shape, quant, 0, tokens, logit_rows=1).flop

    half, whole = work(FULL // 2), work(FULL)
    of_work = math.log2(whole / half)
    plan = plan_for("m4max", 1, FULL - 1024, "Q4_K_S")

    def time(tokens: int) -> float:
        run = plan.chosen.at(depth=0, prompt_tokens=tokens, drafts=0)
        return tokens / (predict(run, "prefill_tok_s").value or math.nan)

    of_time = math.log2(time(FULL - 1024) / time(FULL // 2 - 512))
    adds = step_counts(shape, quant, 0, FULL, logit_rows=1).multiply_adds
    scores = adds["scores"] / sum(adds.values())
    return Finding(
        computed=f"doubling 128K to 256K costs {2**of_work:.1f} times the operations and "
        f"{2**of_time:.1f} times the time on m4max (linear would be 2, quadratic 4)",
        verdict=CONTRADICTED if of_work > 1.1 else HOLDS,
        why=f"Twelve full-attention layers stay quadratic; at 256K their scores are "
        f"{100 * scores:.0f} % of all operations. The other 33 are linear.",
        command="hwmodel sweep --device m4max --quant Q4_K_S --depths 128K,256K",
        values={"exponent_work": of_work, "exponent_time": of_time, "scores_share": scores},
    )


def parameters() -> Finding:
    """C28"""
    shape = step_shape()
    total, active = shape.parameters, shape.active_parameters
    return Finding(
        computed=f"{total / 1e9:.2f} B, {active / 1e9:.2f} B active (output head included)",
        verdict=HOLDS if abs(total / 196.81e9 - 1) < 0.002 and abs(active / 11e9 - 1) < 0.05
        else CONTRADICTED,
        why="Counted tensor by tensor, the MTP layers aside.",
        command="hwmodel explain decode --device m4max",
        values={"total": float(total), "active": float(active)},
    )  # fmt: skip


def mac_256k() -> Finding:
    """C36"""
    c = fixed("m4max", 1, "Q4_K_S", "llama.cpp", context=FULL, micro_batch=1024)
    speed = at_speed(c, 0, FULL - 1024)
    spare = c.memory.raised_margin_bytes
    low, high = speed.band
    return Finding(
        computed=f"{_gb(abs(spare))} {'to spare' if spare >= 0 else 'too little'}; "
        f"{figure(speed.tok_s)} tok/s ({figure(low)} to {figure(high)})",
        verdict=HOLDS if spare >= 0 else CONTRADICTED,
        why=f"{_gb(c.memory.used_bytes)} of the {_gb(c.memory.used_bytes + spare)} that the "
        "setting allows.",
        command="hwmodel plan --device m4max --quant Q4_K_S --context 256K",
        values={"spare_bytes": spare, "tok_s": speed.tok_s},
        extrapolated=speed.extrapolated,
        rests_on=dated(c),
    )


def kv_q8() -> Finding:
    """C37"""
    c = fixed("m4max", 1, "Q4_K_S", "llama.cpp", context=1024, kv_type="q8_0")
    short = -c.memory.margin_bytes
    return Finding(
        computed=f"as it comes {_gb(short)} too little at 1,024 tokens with q8_0 KV",
        verdict=CONTRADICTED if short > 0 else HOLDS,
        why=f"The weights alone exceed the {_gb(c.memory.usable_bytes)} that macOS gives its GPU "
        "by default: the limit must be raised for any context.",
        command="hwmodel plan --device m4max --quant Q4_K_S --context 1024",
        values={"short_bytes": short},
        rests_on=(*dated(c), *priced("m4max", "memory.usable_bytes")),
    )


TESTS: dict[str, Test] = {
    "C10": at_least_120, "C11": int4_size, "C12": overhead_7, "C13": unified_128, "C14": one_h100,
    "C17": four_4090_total, "C18": four_4090_run, "C21": two_4090, "C22": accuracy_loss,
    "C25": whole_context, "C26": sliding_share, "C27": linear_cost, "C28": parameters,
    "C36": mac_256k, "C37": kv_q8, "C39": one_card_class,
}  # fmt: skip

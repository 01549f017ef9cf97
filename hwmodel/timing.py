"""From counts to seconds: the parts of a step, each at a prior efficiency times fitted effects.

A part takes `base_s x exp(sum of value x effect)`. `base_s` is the part's bytes or operations over
the datasheet's peak, divided by a prior efficiency read off published runs; the effects are
learned by `bench calibrate` and are 0 where nothing was learned, so that an unknown device or
engine falls back to its class and then to the prior (`hwmodel.effects`).

The fit evaluates the same parts (`hwmodel.fit.seconds`), so that there is one estimator.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hwmodel import placement as place
from hwmodel.arithmetic import products
from hwmodel.effects import Context, Features, age_effects, context_of
from hwmodel.launches import launches_s
from hwmodel.links import LINK_PRIOR, link_parts
from hwmodel.memory import kv_value_bytes, stated_scale
from hwmodel.operations import StepCounts, draft_bytes, step_counts
from hwmodel.parts import Part
from hwmodel.placement import Machine
from hwmodel.quant import bits_per_weight
from hwmodel.run import RunConfig

# Share of peak bandwidth that large matrices reach, by device class (published runs, rounded;
# AMD's: Qwen3-32B in FP8 at 57 tokens/s on one MI308X, github.com/ROCm/aiter/pull/3653).
BANDWIDTH_PRIOR = {
    "apple": 0.80, "nvidia-datacenter": 0.75, "nvidia-consumer": 0.88, "nvidia-unified": 0.85,
    "amd-instinct": 0.45, "amd-apu": 0.80, "amd-consumer": 0.70, "intel": 0.65, "cpu": 0.50,
}  # fmt: skip
# Seconds per layer beyond the matrices: launches, normalisation, routing.
OVERHEAD_PRIOR = {"llama.cpp": 60e-6, "server": 60e-6, "mlx": 70e-6, "ktransformers": 150e-6}
MOE_OVERHEAD = 50e-6
SCORES_PRIOR = 0.30  # the same for scores of attention
QUERY_PRIOR = 0.55  # of the bandwidth, queries that an indexer reads again (as KV reads)
BATCH_SHARE = 0.5  # of what large prompts reach, a few rows per step
UNPACKED_BYTES = 4.0  # per weight: 16 bits written and read again
HOST_PRIOR = 0.58  # of host memory's peak bandwidth, experts computed by the processor
HOST_LAYERS_PRIOR = 0.67  # the same for whole layers, read in order
PACK_PRIOR = 0.40  # the same for packing experts that are sent over a link
HAND_OVER_S = 100e-6  # activations to the host and back, per layer with experts there


def decode_parts(run: RunConfig) -> list[Part]:
    """The parts of one decode step: every sequence gains `tokens_per_step` tokens."""
    machine = place.machine(run)
    c = context_of(run, machine)
    work = run.workload
    rows = 1 + max(0, work.drafts)
    depth = (work.depth or 0) + work.generated_tokens // 2
    distinct = measured_distinct(run, rows)
    counts = step_counts(run.model, run.quant, depth, rows, work.concurrency, distinct=distinct)
    parts = _weight_parts(run, machine, c, counts, "decode")
    parts += _kv_parts(run, machine, c, counts, depth)
    parts += _overhead_parts(run, machine, c, rows)
    parts += _row_parts(run, machine, c, counts, rows * work.concurrency)
    parts += link_parts(run, machine, c, rows * work.concurrency)
    if work.drafts:
        parts += _draft_parts(run, machine, c)
    if _interleaves(run, c):
        # Every sequence that joins is prefilled while the others wait.
        share = (work.concurrency - 1) / work.generated_tokens
        alone = place.alone(run)
        for p in prefill_parts(alone):
            parts.append(_scaled(p, share, "prefill of others", c.features("join", "family")))
    return _with(parts, age_effects(c, "decode"))


def measured_distinct(run: RunConfig, rows: int) -> float | None:
    """Distinct experts per layer of a step as measured, None where nothing was measured.

    Rows of one sequence are neighbours, whose experts were counted; sequences are independent of
    each other, so that an expert is left out by all of them with the product of the chances.
    """
    found, experts = run.workload.distinct_experts, run.model.experts
    if not found or not experts or rows > len(found):
        return None
    left_out = 1.0 - found[rows - 1] / experts
    return float(experts * (1.0 - left_out**run.workload.concurrency))


def _interleaves(run: RunConfig, c: Context) -> bool:
    w = run.workload
    known = w.prompt_tokens > 0 and w.generated_tokens > 0
    return c.group == "server" and w.concurrency > 1 and known


def _with(parts: list[Part], features: Features) -> list[Part]:
    if not features:
        return parts
    return [replace(p, features=p.features + features) for p in parts]


def _scaled(p: Part, share: float, name: str, extra: Features) -> Part:
    return Part(
        name, p.resource, p.base_s * share, p.features + extra, p.peak_s * share,
        p.bytes * share, p.flop * share, p.arithmetic_s * share,
    )  # fmt: skip


def _weight_parts(
    run: RunConfig, m: Machine, c: Context, counts: StepCounts, phase: str
) -> list[Part]:
    scale = stated_scale(run)
    read = {role: v * scale for role, v in counts.weight_bytes.items()}
    routed = read.pop("routed", 0.0)
    always = sum(read.values()) * run.placement.attention_groups  # each group reads its own
    efficiency = BANDWIDTH_PRIOR.get(c.device_class, 0.7)
    levels = ("class", "device", "class+group", "engine", "quant", "class+quant")
    effects = c.features("weights", *levels) + _speed(m, c)
    wide = m.bandwidth_bytes_per_s
    on_host, on_disk = routed * run.placement.host_expert_share, routed * run.placement.ssd_share
    layers_on_host = run.placement.host_layer_share
    local = (always * (1 - layers_on_host), (routed - on_host - on_disk) * (1 - layers_on_host))
    parts = [
        Part(
            "weights", "memory bandwidth", local[0] / wide / efficiency, effects,
            local[0] / wide, local[0],
        )
    ]  # fmt: skip
    if local[1] > 0:
        expert_effects = effects + c.features("experts", "class", "device", "family", "class+group")
        base = local[1] / wide / efficiency / 0.85
        parts.append(
            Part("routed experts", "memory bandwidth", base, expert_effects,
                 local[1] / wide, local[1])
        )  # fmt: skip
    return parts + _outside_parts(run, m, c, always, routed)


def _speed(m: Machine, c: Context) -> Features:
    """The faster one device's memory, the smaller the share of it that a step reaches."""
    each = math.log2(m.bandwidth_bytes_per_s / max(1, m.parallel) / 1e12)
    return (("weights/speed", each), (f"weights/speed={c.device_class}", each))


def _outside_parts(
    run: RunConfig, m: Machine, c: Context, always: float, routed: float
) -> list[Part]:
    """Weights used where they lie outside the devices: host memory (computed there) and disk."""
    p = run.placement
    inside = 1 - p.host_layer_share
    experts = routed * p.host_expert_share * inside
    layers = (always + routed) * p.host_layer_share
    host = m.host_bandwidth_bytes_per_s
    parts = []
    if experts > 0:
        t = experts / host
        effects = c.features("host experts", "family", "quant")
        parts.append(Part("host experts", "host memory", t / HOST_PRIOR, effects, t, experts))
        turns = run.model.moe_layers * p.host_expert_share
        base = turns * HAND_OVER_S
        parts.append(Part("hand-over", "overhead", base, c.features("hand-over", "family")))
    if layers > 0:
        t = layers / host
        effects = c.features("host layers", "family")
        parts.append(Part("host layers", "host memory", t / HOST_LAYERS_PRIOR, effects, t, layers))
    on_disk = routed * p.ssd_share
    if on_disk > 0:
        disk = m.ssd_bytes_per_s
        base = on_disk / disk / 0.7
        parts.append(
            Part("disk", "disk", base, c.features("disk", "family"), on_disk / disk, on_disk)
        )
    return parts


def _kv_parts(run: RunConfig, m: Machine, c: Context, counts: StepCounts, depth: int) -> list[Part]:
    size = counts.cache_bytes(kv_value_bytes(run.workload.kv_type))
    if size <= 0:
        return []
    effects = c.features("kv", "class", "device", "class+group")
    effects += ((f"kv/depth={c.device_class}", math.log2(1 + depth / 65536)),)
    if run.workload.kv_type not in ("f16", "bf16"):
        effects += ((f"kv/type={run.workload.kv_type}", 1.0),)
    base = size / m.kv_bandwidth_bytes_per_s
    found = [Part("KV cache", "memory bandwidth", base / 0.55, effects, base, size)]
    if counts.shared_scores:
        # Every query head meets the same key, so that even one row may compute longer than it
        # reads; what the reads do not hide remains.
        flop = 2 * counts.shared_scores
        t = flop / m.flop("fp16") / SCORES_PRIOR
        share = counts.shared_values_read / max(1.0, counts.kv_values_read)
        left = t**2 / (t + share * base / 0.55)
        limit = flop / m.best_flop(bits_per_weight(run.quant.default))
        found.append(
            Part("shared scores", "compute", left, c.features("shared scores", "class"), limit,
                 flop=flop)
        )  # fmt: skip
    return found


def _overhead_parts(run: RunConfig, m: Machine, c: Context, rows: int) -> list[Part]:
    per_layer = OVERHEAD_PRIOR.get(c.group, 80e-6)
    effects = c.features("overhead", "class", "device", "class+group", "engine")
    base = run.model.layers * per_layer + run.model.moe_layers * MOE_OVERHEAD
    base += launches_s(run.model, c.device_class)
    width = math.log2(run.model.hidden_size / 4096)
    effects += (("overhead/width", width),)
    if m.dies > 1:  # a launch starts on both and waits for both
        effects += ((f"overhead/dies={c.device_class}", 1.0),)
    effects += tuple((f"overhead/kind={k}", 1.0) for k in run.model.kinds if k != "gqa")
    if m.parallel > 1:
        effects += ((f"overhead/parallel={c.group}", 1.0),)
    parts = [Part("overhead", "overhead", base, effects)]
    sequences = run.workload.concurrency
    if sequences > 1:
        base = 60e-6 * (sequences - 1) ** 0.75
        parts.append(Part("scheduling", "overhead", base, c.features("sequence", "family")))
    if rows > 1:
        base = 0.2 * (rows - 1) * run.model.layers * per_layer
        effects = c.features("verify", "family", "class+group")
        parts.append(Part("verification", "overhead", base, effects))
    return parts


def _row_parts(run: RunConfig, m: Machine, c: Context, counts: StepCounts, rows: int) -> list[Part]:
    """Arithmetic of the rows after the first, as far as the reads do not hide it.

    Servers batch the rows into matrix products: with reads R and arithmetic A, A A / (A + R)
    remains, nothing while reads rule and all of A once arithmetic does. Other engines decode a
    few rows with the kernels of one row, whose arithmetic does not hide.
    """
    if rows <= 1:
        return []
    flop = counts.flop * (rows - 1) / rows
    how = products(run, m)
    arithmetic = flop / how.peak / (BATCH_SHARE * how.share)
    reads = sum(counts.weight_bytes.values()) * stated_scale(run) / m.bandwidth_bytes_per_s
    effects = c.features("rows", "class", "class+group")
    base = arithmetic**2 / (arithmetic + reads) if c.group == "server" else arithmetic
    limit = flop / m.best_flop(bits_per_weight(run.quant.default))
    return [Part("arithmetic", "compute", base, effects, limit, flop=flop)]


def _draft_parts(run: RunConfig, m: Machine, c: Context) -> list[Part]:
    drafts = run.workload.drafts
    size = draft_bytes(run.model, run.quant, drafts)
    if not size:  # a model without MTP layers of known size: a small share of the trunk
        size = drafts * 0.03 * run.model.active_parameters
    size *= run.placement.attention_groups
    base = size / m.bandwidth_bytes_per_s
    per_layer = OVERHEAD_PRIOR.get(c.group, 80e-6)
    return [
        Part("drafts", "memory bandwidth", base / 0.6, c.features("drafts", "family"), base, size),
        Part("draft overhead", "overhead", drafts * 6 * per_layer,
             c.features("draft overhead", "family")),
    ]  # fmt: skip


def prefill_parts(run: RunConfig) -> list[Part]:
    """The parts of computing the whole prompt of one sequence."""
    machine = place.machine(run)
    c = context_of(run, machine, machine.device_class)
    prompt = max(1, run.workload.prompt_tokens or 512)
    depth = run.workload.depth or 0
    chunk = place.chunk_tokens(run, prompt, c.family)
    chunks = math.ceil(prompt / chunk)
    unfold = run.engine.engine.latent_prompts == "heads"
    counts = step_counts(run.model, run.quant, depth, prompt, logit_rows=chunks, unfold=unfold)
    whole = run.placement.host_expert_share == run.placement.host_layer_share == 0
    speedup = machine.pipeline(chunks) if whole else 1.0  # else one at a time (llama-context.cpp)
    parts = _compute_parts(run, machine, c, counts, min(chunk, prompt), speedup)
    per_chunk = step_counts(run.model, run.quant, depth, min(chunk, prompt), logit_rows=1)
    streams = _stream_parts(run, machine, c, per_chunk, chunks / speedup)
    if any(p.name == "host experts" for p in streams):  # computed there and not on the device
        kept = 1 - run.placement.host_expert_share
        parts = [_scaled(p, kept, p.name, ()) if p.name == "routed experts" else p for p in parts]
    parts += streams
    per_layer = OVERHEAD_PRIOR.get(c.group, 80e-6)
    base = chunks * run.model.layers * per_layer
    effects = c.features("prefill overhead", "class", "class+group")
    parts.append(Part("overhead", "overhead", base, effects))
    parts += [
        _scaled(p, chunks, p.name, c.features("prefill links"))
        for p in link_parts(run, machine, c, min(chunk, prompt))
    ]
    return _with(parts, age_effects(c, "prefill"))


def _compute_parts(
    run: RunConfig, m: Machine, c: Context, counts: StepCounts, chunk: int, speedup: float
) -> list[Part]:
    adds = dict(counts.multiply_adds)
    scores, routed = adds.pop("scores", 0.0), adds.pop("routed", 0.0)
    dense = sum(adds.values())
    how = products(run, m)
    peak, share = how.peak * speedup, how.share
    best = m.best_flop(bits_per_weight(run.quant.default))
    levels = ("class", "device", "class+group", "engine", "quant", "class+quant")
    effects = c.features("compute", *levels)
    on_host = run.placement.host_layer_share
    parts = []
    if dense > 0:
        t = 2 * dense / peak
        limit = 2 * dense / best
        parts.append(Part("matrices", "compute", t / share, effects, limit, flop=2 * dense))
    if routed > 0:
        t = 2 * routed / peak
        each = math.log2(max(0.25, chunk * run.model.top_k / run.model.experts) / 64)
        extra = c.features("expert compute", "class", "class+group", "quant")
        extra += (("expert compute/tokens", each),)
        extra += ((f"expert compute/tokens={c.device_class}", each),)
        base, limit = t / share / 0.6, 2 * routed / best
        parts.append(
            Part("routed experts", "compute", base, effects + extra, limit, flop=2 * routed)
        )
    if scores > 0:
        t = 2 * scores / m.flop("fp16") / speedup
        effects = c.features("scores", "class", "device", "class+group")
        limit = 2 * scores / best
        parts.append(
            Part("attention", "compute", t / SCORES_PRIOR, effects, limit, flop=2 * scores)
        )
    tile = run.engine.engine.index_tile
    if tile and counts.index_scores:
        # float32 queries of all heads come from memory again for every tile of keys
        size = 4.0 * counts.index_scores / tile
        t = size / m.bandwidth_bytes_per_s / speedup
        effects = c.features("index queries")
        parts.append(Part("indexer queries", "memory bandwidth", t / QUERY_PRIOR, effects, t, size))
    if on_host > 0:
        t = 2 * (dense + routed) * on_host / m.host_flop_per_s
        parts.append(Part("host arithmetic", "compute", t / 0.3, c.features("host compute"), t))
    return parts


def _stream_parts(
    run: RunConfig, m: Machine, c: Context, chunk: StepCounts, times: float
) -> list[Part]:
    """Weights read once per chunk: from the device's memory, over the host link, from disk."""
    scale = stated_scale(run)
    read = {role: v * scale for role, v in chunk.weight_bytes.items()}
    routed = read.get("routed", 0.0) * times
    total = sum(read.values()) * times
    host = routed * run.placement.host_expert_share
    disk = routed * run.placement.ssd_share
    t = (total - host - disk) / m.bandwidth_bytes_per_s
    parts = [Part("weight reads", "memory bandwidth", t / 0.7, c.features("stream", "class"), t,
                  total - host - disk)]  # fmt: skip
    if products(run, m).unpacked:
        written = (
            UNPACKED_BYTES * run.model.parameters * times * (1 - run.placement.host_layer_share)
        )
        t = written / m.bandwidth_bytes_per_s
        effects = c.features("unpack")
        parts.append(Part("unpacked weights", "memory bandwidth", t / 0.7, effects, t, written))
    if host > 0:
        parts += _host_prompt_parts(run, m, c, chunk, host, times)
    if disk > 0:
        t = disk / m.ssd_bytes_per_s
        parts.append(Part("disk", "disk", t / 0.7, c.features("disk", "family"), t, disk))
    return parts


def _host_prompt_parts(
    run: RunConfig, m: Machine, c: Context, chunk: StepCounts, host: float, times: float
) -> list[Part]:
    """Experts in host memory: sent to the device once per chunk, or computed by the host.

    Sending is read-and-pack by the processor, then the link: one after the other (published tables
    for 1 to 8 cards on one host fit the sum, not the slower of the two). llama.cpp keeps them in
    page-locked memory, from where the link fetches them as they are. Few prompt tokens are cheaper
    to compute where the experts lie.
    """
    share = run.placement.host_expert_share
    link, pack = host / m.host_link_bytes_per_s, host / m.host_bandwidth_bytes_per_s
    flop = 2 * chunk.multiply_adds.get("routed", 0.0) * times * share
    arithmetic = flop / m.host_flop_per_s
    computed = arithmetic + pack / HOST_PRIOR
    direct = c.family == "llama.cpp"
    if computed < link / LINK_PRIOR + (0 if direct else pack / PACK_PRIOR):
        effects = c.features("host compute", "family")
        return [
            Part("host experts", "host memory", computed, effects, pack, host, flop, arithmetic)
        ]
    sent, packed = c.features("host stream", "family"), c.features("host pack", "family")
    parts = [Part("host link", "links", link / LINK_PRIOR, sent, link, host)]
    if direct:
        return parts
    return [
        *parts,
        Part("host memory", "host memory", pack / PACK_PRIOR, packed, pack, host),
    ]

"""The memory ledger: weights, KV cache, buffers, MTP, reserve; and what is left.

KV bytes follow the engine's policy: where sliding layers are capped (llama.cpp) they hold window +
micro-batch rows, elsewhere the full context. All sizes in bytes of the whole machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.model import ModelShape
from hwmodel.operations import STATE_BYTES, mtp_bytes
from hwmodel.placement import attention_width
from hwmodel.quant import block_bytes, role_bytes, weight_bytes
from hwmodel.run import RunConfig
from refimpl.errors import InputError

# KV cache types: storage type of `hwmodel.quant.BLOCKS`.
KV_TYPES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "fp8": "FP8", "q8_0": "Q8_0", "q5_1": "Q5_1",
    "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "int8": "FP8",
}  # fmt: skip


def kv_value_bytes(kv_type: str) -> float:
    """Bytes of one K or V value in the cache.

    Raises:
        InputError: no such type; the message lists them.
    """
    storage = KV_TYPES.get(kv_type.lower())
    if storage is None:
        raise InputError(f"KV type '{kv_type}' is not known; use one of {', '.join(KV_TYPES)}")
    return float(block_bytes(storage, 256)) / 256


def kv_rows(window: int | None, context: int, micro_batch: int, sliding_cache: str) -> int:
    """Positions that a layer's cache holds for one sequence of `context` tokens."""
    if window is None or sliding_cache == "full":
        return context
    return 0 if window == 0 else min(context, window + micro_batch)


def kv_bytes(
    model: ModelShape,
    context: int,
    kv_type: str = "f16",
    sliding_cache: str = "window",
    micro_batch: int = 512,
    sequences: int = 1,
    share: int = 1,
) -> float:
    """Bytes allocated for the KV cache of `sequences` sequences of `context` tokens.

    Args:
        share: devices that a sequence's attention is split over; where these are more than the
            KV heads, each head is kept on several of them, and a latent on all (SGLang and vLLM:
            what data-parallel attention avoids, lmsys.org/blog/2024-12-04-sglang-v0-4).
    """
    values = states = 0.0
    for g in model.attention:
        rows = kv_rows(None if g.selected else g.window, context, micro_batch, sliding_cache)
        values += g.layers * g.kv_values * rows / g.compress * max(1.0, share / g.kv_heads)
        states += g.layers * g.state_values
    return sequences * (values * kv_value_bytes(kv_type) + STATE_BYTES * states)


def stated_scale(run: RunConfig) -> float:
    """Factor from computed to stated weight bytes.

    1 where nothing is stated, or where a known model's file differs by no more than 6 %: such
    files carry a vision tower, MTP layers or a wider head that a text token does not read.
    """
    if not run.weights_bytes or run.weights_bytes <= 0:
        return 1.0
    computed = weight_bytes(run.model, run.quant)
    ratio = run.weights_bytes / computed
    return 1.0 if run.model.certain and abs(ratio - 1) <= 0.06 else ratio


@dataclass(frozen=True)
class Ledger:
    """Where the memory goes, bytes over all devices of the run.

    `host_bytes` and `disk_bytes` are the weights placed outside the devices. `margin_bytes` is
    negative where the run does not fit at the devices' default limit, `raised_margin_bytes` with
    their documented limit raise (equal to `margin_bytes` where there is none).
    """

    weights_bytes: float
    kv_bytes: float
    compute_bytes: float
    mtp_bytes: float
    reserve_bytes: float
    usable_bytes: float
    margin_bytes: float
    raised_margin_bytes: float
    host_bytes: float = 0.0
    disk_bytes: float = 0.0

    @property
    def used_bytes(self) -> float:
        """Everything the engine asks the devices for."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.mtp_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits at the default limit."""
        return self.margin_bytes >= 0


def compute_bytes(model: ModelShape, context: int, micro_batch: int, vocab: int) -> float:
    """Buffers of one micro-batch: logits, hidden rows, feed-forward rows and attention masks.

    Float32 logits and eight float32 rows as wide as the model per token, one 16-bit mask of the
    context per attention kind (llama.cpp's graph reserve, flash attention).
    """
    rows = min(micro_batch, context)
    masks = len({g.window for g in model.attention})
    wide = 8 * model.hidden_size + vocab
    return 4.0 * rows * wide + 2.0 * masks * rows * context


def ledger(run: RunConfig, context: int) -> Ledger:
    """The memory of a run with room for `context` tokens per sequence."""
    work, engine = run.workload, run.engine.engine
    micro_batch = work.micro_batch or engine.micro_batch
    scale = stated_scale(run)
    by_role = {r: v * scale for r, v in role_bytes(run.model, run.quant).items() if r != "mtp"}
    total = sum(by_role.values())
    routed = by_role.get("routed", 0.0)
    place = run.placement
    total += (total - routed) * (place.attention_groups - 1)
    disk = routed * place.ssd_share
    host = routed * place.host_expert_share + (total - routed) * place.host_layer_share
    host += (routed - routed * place.host_expert_share) * place.host_layer_share
    share = attention_width(run)
    kv = kv_bytes(
        run.model, context, work.kv_type, engine.sliding_cache, micro_batch, work.concurrency, share
    )
    vocab = sum(t.elements for t in run.model.tensors if t.kind == "embedding")
    buffers = compute_bytes(run.model, context, micro_batch, vocab // run.model.hidden_size)
    n = max(1, run.device_count)
    extra = getattr(engine, "context_bytes", 0.0) * n
    drafts = min(work.drafts, run.model.mtp_layers)
    mtp = mtp_bytes(run.model, run.quant, drafts) * place.attention_groups
    mtp += kv_bytes(_mtp_cache(run.model), context, work.kv_type, "window", 8) * drafts
    taken = getattr(engine, "memory_fraction", 1.0)  # vLLM and SGLang take a share of each device
    usable = sum(
        d.count * min(d.device.usable_bytes, taken * d.device.memory_bytes) for d in run.devices
    )
    raised = sum(
        d.count
        * min(
            getattr(d.device, "raised_usable_bytes", None) or d.device.usable_bytes,
            taken * d.device.memory_bytes,
        )
        for d in run.devices
    )
    memory = sum(d.count * d.device.memory_bytes for d in run.devices)
    weights = total - host - disk
    used = weights + kv + buffers + extra + mtp
    return Ledger(
        weights_bytes=weights,
        kv_bytes=kv,
        compute_bytes=buffers + extra,
        mtp_bytes=mtp,
        reserve_bytes=memory - usable,
        usable_bytes=usable,
        margin_bytes=usable - used,
        raised_margin_bytes=raised - used,
        host_bytes=host,
        disk_bytes=disk,
    )


def _mtp_cache(model: ModelShape) -> ModelShape:
    """One MTP layer as a model of its own, for its cache: a sliding layer of the trunk's kind."""
    import dataclasses

    sliding = [g for g in model.attention if g.window] or list(model.attention)
    one = dataclasses.replace(sliding[0], layers=1)
    return dataclasses.replace(model, attention=(one,))

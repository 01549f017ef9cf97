"""Placement: which devices hold what, whether a split is legal, and the machine it amounts to.

Kinds: one device; layer split (capacity, not speed, at one sequence); tensor and expert parallel
(speed, and two all-reduces per layer); routed experts or whole layers in host memory; experts
streamed from disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from hwmodel.model import ModelShape
from hwmodel.quant import Quant
from hwmodel.run import DeviceLike, RunConfig, Split, Workload
from refimpl.errors import InputError

# What a host is taken for when a run offloads to it and does not describe it: a desktop with two
# channels of DDR5-6000 (64 GB/s of 96 sustained), and PCIe 4.0 x16.
DEFAULT_HOST_BYTES_PER_S = 96e9
DEFAULT_HOST_LINK_BYTES_PER_S = 32e9
DEFAULT_LINK_BYTES_PER_S = 32e9
DEFAULT_SSD_BYTES_PER_S = 5e9
HOST_FLOP_PER_BYTE = 10.0  # a host's arithmetic goes with its memory channels
FP8_BLOCK = 128  # width of the scale blocks of the FP8 experts


@dataclass(frozen=True)
class Machine:
    """The devices of a run as the time model sees them.

    `bandwidth_bytes_per_s` is the rate at which one token's weights can be read at the
    datasheet's peak: the sum over devices that work at once, the harmonic mean over devices that
    work in turn. `parallel` devices split every matrix; `stages` devices work in turn;
    each is one chip of `dies` dies.
    """

    device_class: str
    device_name: str
    bandwidth_bytes_per_s: float
    kv_bandwidth_bytes_per_s: float
    flop_per_s: Mapping[str, float]
    parallel: int
    stages: int
    dies: int
    link_kind: str
    link_bytes_per_s: float
    host_bandwidth_bytes_per_s: float
    host_link_bytes_per_s: float
    ssd_bytes_per_s: float
    host_flop_per_s: float

    def flop(self, dtype: str) -> float:
        """Dense peak for a type, or the next wider type that the device has."""
        order = {
            "fp4": ("fp4", "fp8", "fp16", "bf16", "fp32"),
            "fp8": ("fp8", "fp16", "bf16", "fp32"),
            "fp16": ("fp16", "bf16", "fp32"),
        }
        for name in order.get(dtype, ("fp16", "bf16", "fp32")):
            found = self.flop_per_s.get(name)
            if found:
                return found
        return 20.0 * self.bandwidth_bytes_per_s

    def best_flop(self, bits: float) -> float:
        """Highest dense peak that any arithmetic on weights of `bits` bits could use, all devices
        at work: the physical limit, whatever the engine's kernels use."""
        usable = [v for k, v in self.flop_per_s.items() if bits <= 5 or k not in ("fp4", "int4")]
        return max([*usable, self.flop("fp16")]) * self.stages

    def pipeline(self, chunks: int) -> float:
        """Speed-up of `chunks` prompt chunks that follow each other through the stages.

        Half of the ideal gain of a pipeline, which is what published runs on 2 to 8 cards
        reach.
        """
        ideal = chunks * self.stages / (chunks + self.stages - 1)
        return 1 + (ideal - 1) / 2


def machine(run: RunConfig) -> Machine:
    """The machine of a run.

    Raises:
        InputError: no device is known.
    """
    if not run.devices:
        raise InputError("the run names no device with a known memory bandwidth")
    p, n = run.placement, run.device_count
    first = max(run.devices, key=lambda d: d.count * d.device.memory_bytes).device
    at_once = p.split in ("tensor", "expert") and n > 1
    total = sum(d.count * d.device.memory_bytes for d in run.devices)
    in_turn = 1 / sum(
        d.count * d.device.memory_bytes / total / d.device.bandwidth_bytes_per_s
        for d in run.devices
    )
    summed = sum(d.count * d.device.bandwidth_bytes_per_s for d in run.devices)
    if first.device_class == "cpu" and run.engine.engine.family == "llama.cpp":
        in_turn /= sockets(first)
    wide = summed if at_once else in_turn
    kv_width = min(1.0, kv_heads(run.model) / attention_width(run)) if at_once else 1.0
    flop = {k: v * (n if at_once else 1) for k, v in first.flop_per_s.items()}
    link = p.host_link_bytes_per_s or first.host_link_bytes_per_s or DEFAULT_HOST_LINK_BYTES_PER_S
    host = p.host_bandwidth_bytes_per_s or DEFAULT_HOST_BYTES_PER_S
    return Machine(
        device_class=first.device_class,
        device_name=first.name,
        bandwidth_bytes_per_s=wide,
        kv_bandwidth_bytes_per_s=wide * kv_width,
        flop_per_s=flop,
        parallel=n if at_once else 1,
        stages=1 if at_once else n,
        dies=dies(first),
        link_kind=p.link_kind or _link_kind(first),
        link_bytes_per_s=p.link_bytes_per_s or first.link_bytes_per_s or DEFAULT_LINK_BYTES_PER_S,
        host_bandwidth_bytes_per_s=host,
        host_link_bytes_per_s=link * (n if at_once else 1),
        ssd_bytes_per_s=p.ssd_bytes_per_s or DEFAULT_SSD_BYTES_PER_S,
        host_flop_per_s=HOST_FLOP_PER_BYTE * host,
    )


def sockets(device: DeviceLike) -> int:
    """Processors of a CPU machine, from the `-2s` of its name.

    llama.cpp without NUMA copies reads at the speed of one socket (ktransformers' comparison on
    two Xeon 6454S, github.com/kvcache-ai/ktransformers).
    """
    tail = device.name.rsplit("-", 1)[-1]
    return int(tail[:-1]) if tail[:-1].isdigit() and tail.endswith("s") else 1


def dies(device: DeviceLike) -> int:
    """Dies of a chip that programs see as one GPU: two in Apple's Ultra, which joins two Max."""
    return 2 if device.device_class == "apple" and "ultra" in device.name else 1


def attention_width(run: RunConfig) -> int:
    """Devices that one sequence's attention is split over: 1 where they work in turn."""
    at_once = run.placement.split in ("tensor", "expert")
    return max(1, run.device_count // run.placement.attention_groups) if at_once else 1


def kv_heads(model: ModelShape) -> int:
    """KV heads of the layers whose cache grows with the context: 1 for a latent, which tensor
    parallelism cannot deal out, so that every device keeps and reads all of it."""
    growing = [g for g in model.attention if g.kv_values and (g.window is None or g.selected)]
    return max(1, min((g.kv_heads for g in growing or model.attention), default=1))


def _link_kind(device: DeviceLike) -> str:
    kind = str(getattr(device, "link_kind", "")).lower()
    for known in ("nvlink", "xgmi", "pcie"):
        if known in kind:
            return known
    return "network" if kind else "pcie"


def chunk_tokens(run: RunConfig, prompt: int, family: str) -> int:
    """Prompt tokens computed together: the stated micro-batch, else the engine's own.

    Engines that stream experts layer by layer take the whole prompt as one chunk.
    """
    if run.workload.micro_batch:
        return max(1, run.workload.micro_batch)
    if family == "ktransformers" and run.placement.host_expert_share > 0:
        return prompt
    return max(1, run.engine.engine.micro_batch)


def alone(run: RunConfig) -> RunConfig:
    """The same run with one sequence and an empty cache, as a prompt that joins is computed."""
    work = Workload(
        prompt_tokens=run.workload.prompt_tokens,
        micro_batch=run.workload.micro_batch,
        kv_type=run.workload.kv_type,
    )
    return dataclasses.replace(run, workload=work)


def refusal(model: ModelShape, quant: Quant, split: Split, count: int) -> str | None:
    """Why a split over `count` devices cannot run, None where it can.

    The FP8 experts carry one scale per 128 x 128 block, so their width over the tensor-parallel
    degree must be a multiple of 128; query heads must divide evenly, and KV heads evenly or be
    replicated evenly (vLLM recipe of Step 3.5 Flash).
    """
    if count < 1:
        return f"{count} devices is not a number of devices"
    if split == "single" and count > 1:
        return f"one device was asked for and {count} given"
    if split == "layer" and count > model.layers:
        return f"{count} devices for {model.layers} layers"
    if split == "expert" and (not model.experts or model.experts % count):
        return f"{model.experts} experts do not divide by {count}"
    if split != "tensor" or count == 1:
        return None
    heads = model.query_heads
    bad = [h for h in heads if h % count]
    if bad:
        return f"{bad[0]} query heads do not divide by {count}"
    kv = kv_heads(model)
    if kv % count and count % kv:
        return f"{kv} KV heads neither divide by {count} nor replicate evenly"
    width = model.expert_width
    if quant.default == "FP8_BLOCK" and width and (width % count or width // count % FP8_BLOCK):
        return (
            f"FP8 experts are {width} wide; over {count} devices that is {width / count:g}, "
            f"not a multiple of the {FP8_BLOCK}-wide scale blocks"
        )
    return None


def legal_counts(model: ModelShape, quant: Quant, split: Split, most: int = 8) -> tuple[int, ...]:
    """Device counts up to `most` that a split can use."""
    return tuple(n for n in range(1, most + 1) if refusal(model, quant, split, n) is None)

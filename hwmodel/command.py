"""The command line that starts an engine as a plan describes it.

The spelling of every setting comes from the engine's file (`[flags]`); here is only which settings
a configuration needs. Settings that equal the engine's default are left out, so that the line is
as short as it can be and still exact.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from hwmodel.engines import Engine
from hwmodel.model import STEP_TITLE
from hwmodel.run import Placement

# KV type as the cost model names it -> as the engine spells it
_KV_SPELLING = {"vllm": {"fp8": "fp8"}, "sglang": {"fp8": "fp8_e5m2"}}
MTP_FILE = "Step-3.5-Flash-MTP-Q8_0.gguf"
SINGLE = Placement()
_LIMIT_PER_GROUP = ("vllm",)  # vLLM limits the sequences of each data-parallel rank, SGLang all
_Add = Callable[..., None]


@dataclass(frozen=True)
class Launch:
    """What a command line has to say.

    Attributes:
        context: tokens of each sequence.
        host_layers: how many layers keep their routed experts in host memory (0: none, None:
            all of them).
        hosts: machines; more than one only where devices are alone in theirs.
        layer_shares: layers on each device where a layer split must not be even.
        file: the checkpoint to load, where it is given.
        model: title of the model, for the name of a file that nobody published.
        holds_mtp: whether the checkpoint holds the MTP layers, so that no other file is needed.
        numa: whether the processor that computes has memory on several sockets.
    """

    engine: Engine
    backend: str
    quant: str
    context: int
    count: int = 1
    placement: Placement = SINGLE
    kv_type: str = "f16"
    sequences: int = 1
    drafts: int = 0
    micro_batch: int | None = None
    host_layers: int | None = 0
    hosts: int = 1
    layer_shares: tuple[int, ...] = ()
    file: str = ""
    model: str = STEP_TITLE
    holds_mtp: bool = False
    numa: bool = False


def weights_name(engine: Engine, quant: str, file: str = "", model: str = STEP_TITLE) -> str:
    """What stands after the model flag: a repository, or the name of a local file."""
    if file:
        return file
    if "safetensors" in engine.formats and quant in engine.repositories:
        return engine.repositories[quant]
    if quant in engine.files:
        return engine.files[quant]
    suffix = ".gguf" if "gguf" in engine.formats else ""
    return f"{model.replace(' ', '-')}-{quant}{suffix}"


def build_command(launch: Launch) -> str:
    """The command as one line for a POSIX shell."""
    engine = launch.engine
    words = [engine.flags.get("program", engine.name)]

    def add(flag: str, value: object = "", **more: object) -> None:
        spelling = engine.flags.get(flag)
        if spelling:
            following = value + 1 if isinstance(value, int) else ""
            words.append(spelling.format(value=value, next=following, **more))

    add("model", shlex.quote(weights_name(engine, launch.quant, launch.file, launch.model)))
    # llama.cpp divides its context among the sequences, the servers give it to each
    shared = "gguf" in engine.formats
    add("context", launch.context * (launch.sequences if shared else 1))
    _add_memory(launch, add)
    _add_split(launch, add)
    if launch.kv_type != engine.kv_types[0]:
        spelled = _KV_SPELLING.get(engine.name, {}).get(launch.kv_type, launch.kv_type)
        add("kv_type", spelled)
    groups = launch.placement.attention_groups if engine.name in _LIMIT_PER_GROUP else 1
    add("sequences", -(-launch.sequences // groups))
    if launch.micro_batch and launch.micro_batch != engine.micro_batch:
        add("batch", max(2048, launch.micro_batch))
        add("micro_batch", launch.micro_batch)
    if launch.drafts:
        add("drafts", launch.drafts)
        if not launch.holds_mtp:
            add("draft_model", MTP_FILE)
        if launch.backend == "cpu":
            add("draft_polling")
    add("template")
    return " ".join(words)


def _add_memory(launch: Launch, add: _Add) -> None:
    if launch.backend != "cpu":
        add("gpu_layers", "all")
        add("flash_attention")
    if launch.engine.memory_fraction < 1:
        add("memory", f"{launch.engine.memory_fraction:g}")
    if launch.host_layers is None:
        add("host_experts")
    elif launch.host_layers:
        add("host_expert_layers", launch.host_layers)
    if launch.numa:
        add("numa")
    if launch.placement.ssd_share:
        # what the GPU maps must stay in memory; the processor's experts may leave it
        if launch.backend != "cpu" and launch.host_layers == 0:
            add("host_experts")
        add("stream")


def _add_split(launch: Launch, add: _Add) -> None:
    if launch.count == 1:
        return
    split = launch.placement.split
    if split == "layer":
        add("split_layer")
        if launch.layer_shares:
            add("layer_shares", ",".join(map(str, launch.layer_shares)))
        if launch.hosts > 1:
            add("remote", ",".join(f"host{i}:50052" for i in range(2, launch.hosts + 1)))
    elif (groups := launch.placement.attention_groups) > 1:
        local = max(1, groups // launch.hosts)
        add("expert_groups", groups, width=launch.count // groups, count=launch.count, local=local)
        if launch.hosts > 1:
            add("group_machines", launch.hosts)
    elif split in ("tensor", "expert"):
        add(split, launch.count)
        if launch.hosts > 1:
            add("machines", launch.hosts)

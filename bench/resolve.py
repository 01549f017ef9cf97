"""From a run record to the configuration that the cost model predicts.

Reads configuration columns only; measured columns are never looked at. What no registry knows is
named in `RunConfig.unknown` and prediction goes on from what the row states. A row without a
usable device or without a size of its weights raises, and the comparison declines it by name.
"""

from __future__ import annotations

import dataclasses
import re

from bench.runs import RunRecord
from hwmodel import names
from hwmodel.catalogue import load_model
from hwmodel.devices import LOCAL, Device, is_own, load_device
from hwmodel.engines import Engine, load_engine
from hwmodel.errors import RequestError
from hwmodel.model import ModelShape, shape_from_totals
from hwmodel.quant import Quant, closest_quant, load_quant
from hwmodel.run import (
    DeviceCount,
    EngineChoice,
    Placement,
    Quantity,
    RunConfig,
    Split,
    Workload,
)
from refimpl.benchmark.host import cpu_name
from refimpl.errors import RefimplError

# What a processor is called in the column `offload`, with the device file of its memory.
HOSTS: tuple[tuple[str, str], ...] = (
    (r"8488c", "xeon-8488c-2s"),
    (r"6454s", "xeon-6454s-2s"),
    (r"epyc\s*9355", "epyc-9355-2s"),
    (r"epyc\s*9965", "epyc-9965-1s"),
    (r"9654", "epyc-9654-2s"),
    (r"12\s*ch|12-channel", "server-ddr5-12ch"),
    (r"8\s*ch\w* ddr4|epyc (7|rome|milan)", "server-ddr4-8ch"),
    (r"server|xeon|epyc|8\s*ch", "server-ddr5-8ch"),
    (r"ddr4", "desktop-ddr4"),
    (r"", "desktop-ddr5"),
)
LINKS: tuple[tuple[str, str], ...] = (
    (r"nvlink|nvswitch|nvl\d", "nvlink"),
    (r"xgmi|infinity", "xgmi"),
    (r"roce|rdma|ethernet|gbe|infiniband|thunderbolt|tb5|tb4|network|usb4", "network"),
    (r"pcie", "pcie"),
)
_SAME_SIZE = 1.5  # published totals of one model differ by less: MTP layers, rounding


def resolve(record: RunRecord, quantity: Quantity = "decode_tok_s") -> RunConfig:
    """The configuration of a row, for one quantity.

    A prompt measured in a row whose depth equals its length started from an empty cache
    (llama-batched-bench decodes at depth = prompt), so its own depth is 0.

    Raises:
        RequestError: the device is not one known thing, or the weights have no known size.
    """
    unknown: list[str] = []
    devices = _devices(record, unknown)
    engine = _engine(record, devices, unknown)
    model = _model(record, unknown)
    quant, weights = _quant(record, model, engine, unknown)
    workload = _workload(record, engine.engine.kv_types[0])
    if quantity != "decode_tok_s" and (workload.depth or 0) <= workload.prompt_tokens:
        workload = dataclasses.replace(workload, depth=0)
    return RunConfig(
        model=model,
        quant=quant,
        devices=devices,
        engine=engine,
        placement=_placement(record, devices, engine, model, weights),
        workload=workload,
        weights_bytes=weights,
        unknown=tuple(unknown),
    )


def _devices(record: RunRecord, unknown: list[str]) -> tuple[DeviceCount, ...]:
    count = max(1, round(record.n_devices or 1))
    if record.device.strip().lower() == LOCAL:
        _check_host(record)
        return (DeviceCount(load_device(LOCAL), count),)
    if is_own(record.device):
        return (DeviceCount(load_device(record.device), count),)
    name = names.canonical("device", record.device)
    if name is not None:
        if not name.exact:
            unknown.append(f"device '{record.device}': {name.note or 'not certain'}")
        return (DeviceCount(load_device(name.id), count),)
    mixed = _mixed_devices(record.device)
    if mixed:
        return mixed
    why = names.why_unknown("device", record.device)
    if why.startswith("unknown"):
        why += "; 'hwmodel devices list' has the names, or state a device file"
    raise RequestError(why)


def _check_host(record: RunRecord) -> None:
    """Refuse a row of `local` that came from another machine: this host's device is not its."""
    measured_on = record.extra.get("host", "").rpartition(",")[0]
    if measured_on and measured_on != cpu_name():
        raise RequestError(
            f"device 'local' was '{measured_on}' where the row was measured, here it is "
            f"'{cpu_name()}'; 'bench import FILE --device NAME --out FILE' says what it is"
        )


def _mixed_devices(text: str) -> tuple[DeviceCount, ...]:
    """`4x MI50-32GB + 2x MI50-16GB` as counts of known devices; empty if none is known."""
    found: dict[str, int] = {}
    parts = re.split(r"\s*(?:\+|,| and )\s*", re.sub(r"(?i)^\s*(mixed|mix of)\s+", "", text))
    if len(parts) < 2:
        return ()
    for part in parts:
        match = re.match(r"(\d+)\s*x\s*(.+)", part)
        count, label = (int(match[1]), match[2]) if match else (1, part)
        bare = re.sub(r"(?i)-?\s*\d+\s*gb$", "", label).strip()
        name = next(
            filter(None, (names.canonical("device", t) for t in (label, bare, f"rtx {bare}"))),
            None,
        )
        if name is not None:
            found[name.id] = found.get(name.id, 0) + count
    return tuple(DeviceCount(load_device(n), c) for n, c in found.items())


def _engine(
    record: RunRecord, devices: tuple[DeviceCount, ...], unknown: list[str]
) -> EngineChoice:
    name = names.canonical("engine", record.engine) if record.engine else None
    if name is None:
        engine = load_engine("unspecified")
        if record.engine:
            unknown.append(names.why_unknown("engine", record.engine))
        else:
            unknown.append("no engine is stated")
    else:
        engine = load_engine(name.id)
        if not name.exact:
            unknown.append(f"engine '{record.engine}': {name.note}")
    backend = record.backend_id or _default_backend(engine, devices)
    return EngineChoice(engine, backend, record.engine_version, record.date)


def _default_backend(engine: Engine, devices: tuple[DeviceCount, ...]) -> str:
    device = devices[0].device
    can = device.api if isinstance(device, Device) else ()
    return next((b for b in can if b in engine.backends), can[0] if can else "")


def _model(record: RunRecord, unknown: list[str]) -> ModelShape:
    name = names.canonical("model", record.model)
    if record.drafts is None:
        unknown.append(f"mtp '{record.mtp}' states no number of drafts: taken as 1")
    for text in ([name.id] if name is not None else []) + [record.model]:
        try:
            known = load_model(text)
        except RefimplError:
            continue
        if _is_of_size(known, record.total_params_b):
            return known
    total = record.total_params_b or record.active_params_b
    if not total:
        raise RequestError(
            names.why_unknown("model", record.model) + ", and no parameters are stated"
        )
    active = min(total, record.active_params_b or total)
    unknown.append(
        f"model '{record.model}' of this size is not in the registry: shape guessed from "
        f"{total:g} B parameters"
    )
    return shape_from_totals(record.model, total * 1e9, active * 1e9)


def _is_of_size(model: ModelShape, total_params_b: float | None) -> bool:
    """Whether a row can mean this model: a small one of the same architecture, or one with most
    of its experts cut out, is stated with other parameters."""
    ratio = 1.0 if not total_params_b else total_params_b * 1e9 / model.parameters
    return 1 / _SAME_SIZE < ratio < _SAME_SIZE


def _quant(
    record: RunRecord, model: ModelShape, engine: EngineChoice, unknown: list[str]
) -> tuple[Quant, float | None]:
    weights = record.weights_gb * 1e9 if record.weights_gb else None
    name = names.canonical("quant", record.quant)
    if name is None:
        if weights is None:
            raise RequestError(
                names.why_unknown("quant", record.quant) + ", and no weights_gb is stated"
            )
        quant = closest_quant(8 * weights / model.parameters)
        why = names.why_unknown("quant", record.quant)
        unknown.append(
            f"{why}: taken as {quant.name} scaled to {8 * weights / model.parameters:.2f} bits"
        )
        return quant, weights
    if not name.exact and not (name.id == "MXFP4-BF16" and model.name.startswith("gpt-oss")):
        unknown.append(f"quant '{record.quant}': {name.note}")  # gpt-oss exists as MXFP4 alone
    return load_quant(_published_form(name.id, model, engine)), weights


def _published_form(name: str, model: ModelShape, engine: EngineChoice) -> str:
    """The form in which a type is published for a model: which tensors stay in 16 bits."""
    if name == "FP8" and model.name.startswith("step-"):
        return "FP8-experts"
    if name == "INT4" and model.name.startswith("kimi-k2"):
        return "INT4-experts"
    if name == "MXFP4" and engine.engine.family != "llama.cpp":
        return "MXFP4-BF16"
    if name == "MXFP4-BF16" and not model.name.startswith("gpt-oss"):
        return "NVFP4"
    if name == "Q2_K" and engine.engine.name == "ds4":
        return "IQ2-experts"
    return name


_KV = re.compile(r"(?i)\b(f16|bf16|fp16|fp8|q8_0|q5_1|q5_0|q4_1|q4_0)(?:/\w+)?\s+kv\b")
_UBATCH = re.compile(r"(?i)(?:^|[\s,;-])ub(?:atch)?[\s=]+(\d{2,6})\b")


def _workload(record: RunRecord, kv_default: str) -> Workload:
    prompt = round(record.prompt_tokens or 0)
    text = f"{record.interconnect}; {record.notes}"
    kv = record.kv_type.lower() or _first(_KV, text).lower()
    stated = _first(_UBATCH, text)
    micro = round(record.micro_batch) if record.micro_batch else (int(stated) if stated else None)
    drafts = record.drafts
    return Workload(
        prompt_tokens=prompt or (micro or 0),
        depth=None if record.context_depth is None else round(record.context_depth),
        generated_tokens=round(record.gen_tokens or 0),
        concurrency=max(1, round(record.batch_concurrency or 1)),
        micro_batch=micro,
        kv_type={"fp16": "f16", "": kv_default}.get(kv, kv),
        drafts=1 if drafts is None else drafts,
    )


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _placement(
    record: RunRecord,
    devices: tuple[DeviceCount, ...],
    engine: EngineChoice,
    model: ModelShape,
    weights: float | None,
) -> Placement:
    text = f"{record.interconnect} {record.device}".lower()
    link = next((kind for pattern, kind in LINKS if re.search(pattern, text)), "")
    count = sum(d.count for d in devices)
    placement = Placement(split=_split(record.interconnect, engine, count), link_kind=link)
    device = devices[0].device
    if link == "network":
        speed = getattr(device, "network_bytes_per_s", None)
        placement = dataclasses.replace(placement, link_bytes_per_s=speed)
    experts, layers = _offload(record.offload, devices, model, weights)
    if not experts and not layers:
        return placement
    host = next(d for pattern, d in HOSTS if re.search(pattern, record.offload.lower()))
    memory = load_device(host)
    return dataclasses.replace(
        placement,
        host_expert_share=experts,
        host_layer_share=layers,
        host_bandwidth_bytes_per_s=memory.bandwidth_bytes_per_s,
    )


def _split(interconnect: str, engine: EngineChoice, count: int) -> Split:
    text = interconnect.lower()
    if count <= 1:
        return "single"
    if re.search(r"\btp\d|tensor", text):
        return "tensor"
    if re.search(r"layer|pipeline|\bpp\d", text):
        return "layer"
    if re.search(r"\bep\d|expert", text):
        return "expert"
    splits = getattr(engine.engine, "splits", ("tensor",))
    return "tensor" if "tensor" in splits and engine.engine.family != "llama.cpp" else "layer"


def _offload(
    text: str, devices: tuple[DeviceCount, ...], model: ModelShape, weights: float | None
) -> tuple[float, float]:
    """Shares of the routed experts and of whole layers in host memory, from the offload column."""
    text = text.lower()
    if text in ("", "none", "no", "gpu", "full gpu") or "cpu only" in text:
        return 0.0, 0.0
    found = re.search(r"n-cpu-moe\s*(\d+)(?:\s*-\s*(\d+))?", text)
    if found and model.moe_layers:
        low = int(found[1])
        high = int(found[2]) if found[2] else low
        return min(1.0, (low + high) / 2 / model.moe_layers), 0.0
    kept = re.search(r"(\d+)/(\d+) experts per layer on gpu", text)
    if kept:
        return 1.0 - min(1.0, int(kept[1]) / max(1, int(kept[2]))), 0.0
    share = re.search(r"(\d+(?:\.\d+)?)\s*% (?:on )?(gpu|cpu)", text)
    if share:
        on_gpu = float(share[1]) / 100 if share[2] == "gpu" else 1 - float(share[1]) / 100
        return 0.0, 1.0 - min(1.0, on_gpu)
    if re.search(r"cpu-moe|cmoe|experts on cpu|exps=cpu|ot.*cpu", text):
        return 1.0, 0.0
    if re.search(r"partial experts|experts", text):
        return 0.5, 0.0
    if re.search(r"layer split|gpu\+cpu|partial offload|ngl", text):
        room = sum(d.count * d.device.usable_bytes for d in devices)
        need = (weights or 0.55 * model.parameters) * 1.1
        return 0.0, max(0.0, min(1.0, 1 - room / need))
    return 0.0, 0.0

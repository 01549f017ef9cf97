"""What a plan is asked: options read, checked, and turned into devices, engines and quant types.

Every mistake ends in one sentence (`RequestError`, `UnknownNameError`): what was found, what was
expected, what to do.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hwmodel import names
from hwmodel.devices import Device, load_device
from hwmodel.engines import Engine, engine_names, for_other_model, load_engine
from hwmodel.errors import RequestError, UnknownNameError, check_range
from hwmodel.model import ModelShape
from hwmodel.quant import QUANTS, Quant, load_quant
from hwmodel.quantity import Quantity
from hwmodel.run import Split
from hwmodel.statistics_file import read_stats

DEFAULT_CONTEXT = 32768
MAX_COUNT = 8  # searched when no count is given
MAX_ASKED_COUNT = 1024
MAX_CONCURRENCY = 4096
DEFAULT_HOST = "desktop-ddr5"
SYSTEM_BYTES = 4e9  # what the host's system keeps of its RAM
# names that mean something else for this model: its FP8 repository quantises the experts alone,
# its Int4 repository is a GGUF
MODEL_QUANTS = {"FP8": "FP8-experts", "INT4": "Q4_K_S"}


@dataclass(frozen=True)
class PlanRequest:
    """A checked request.

    Attributes:
        context: tokens of each sequence that the cache must hold.
        quant, engine, count, split: None where the search is free.
        weights: the checkpoint that `quant` names, where it is a file.
        ram_bytes: host memory that experts may use, None where offloading is not wanted.
        host: whose memory that is; its bandwidth decides the speed.
        acceptance: chance that each draft is accepted, from a statistics file.
        distinct_experts: distinct experts of 1, 2, ... neighbouring tokens, from the same.
        min_decode: tokens/s of each sequence wanted at the full context.
        max_price: dollars for all devices together.
    """

    device: Device
    model: ModelShape
    context: int = DEFAULT_CONTEXT
    concurrency: int = 1
    quant: str | None = None
    weights: Quant | None = None
    engine: Engine | None = None
    count: int | None = None
    split: Split | None = None
    ram_bytes: float | None = None
    host: Device | None = None
    acceptance: tuple[float, ...] | None = None
    distinct_experts: tuple[float, ...] | None = None
    stats_file: str = ""
    min_decode: float | None = None
    max_price: float | None = None

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines to search: the one asked for, else all that run on the device."""
        if self.engine is not None:
            return (self.engine,)
        found = (engine_of(n, self.model) for n in engine_names(for_plan=True))
        return tuple(e for e in found if backend_of(e, self.device))

    def kind(self, quant: str) -> Quant:
        """The quant type of that name, or the sizes read from the file of that name."""
        if self.weights is not None and quant == self.weights.name:
            return self.weights
        return load_quant(quant)

    def can_load(self, engine: Engine, quant: str) -> bool:
        """Whether an engine can load a quant type on the device, or the file that stands for
        one."""
        if self.weights is not None and quant == self.weights.name:
            able = _reads(engine, self.weights)
        else:
            able = quant in engine.quants
        return able and not self.lacks_fp8(engine, quant)

    def lacks_fp8(self, engine: Engine, quant: str) -> bool:
        """Whether the type is FP8 and the engine wants FP8 arithmetic that the device has not."""
        if self.kind(quant).family != "fp8" or "flop.fp8_per_s" in self.device.quantities:
            return False
        return backend_of(engine, self.device) in engine.fp8_without_rate


def engine_of(name: str, model: ModelShape) -> Engine:
    """An engine by name as it runs a model.

    Raises:
        UnknownNameError: no such engine.
    """
    engine = load_engine(name)
    return engine if model.is_step else for_other_model(engine)


def backend_of(engine: Engine, device: Device) -> str:
    """The first of the device's backends that the engine has, empty where there is none or where
    the engine does not run on this device all the same."""
    if device.name in engine.unsupported:
        return ""
    return next((b for b in device.api if b in engine.backends), "")


def make_request(
    device: str,
    model: ModelShape,
    context: str | int | None = None,
    concurrency: int = 1,
    quant: str | None = None,
    engine: str | None = None,
    count: int | None = None,
    split: Split | None = None,
    ram_gb: float | None = None,
    host: str | None = None,
    stats: str | None = None,
    min_decode: float | None = None,
    max_price: float | None = None,
) -> PlanRequest:
    """A request from the texts and numbers that a user typed; without `context` the usual one, or
    all that the model has.

    Raises:
        UnknownNameError: no such device, engine or quant type.
        DeviceFileError: a device file is not valid.
        RequestError: a number is absurd, or the options contradict each other.
    """
    found = load_device(device)
    chosen = _engine(engine, model, found)
    weights = _weights(quant, model, chosen, found)
    kind = _quant(quant, model, chosen) if weights is None else weights.name
    _check_numbers(found, concurrency, count, ram_gb, min_decode, max_price)
    ram = None if ram_gb is None else ram_gb * 2**30
    if ram is not None and (found.is_cpu or found.device_class == "apple"):
        found = with_memory(found, ram)
    helper = _helper(found, ram, host)
    accepted, distinct = read_stats(stats, model) if stats else (None, None)
    return PlanRequest(
        device=found,
        model=model,
        context=min(DEFAULT_CONTEXT, model.max_context)
        if context is None
        else parse_context(context, model),
        concurrency=concurrency,
        quant=kind,
        weights=weights,
        engine=chosen,
        count=count,
        split=split,
        ram_bytes=ram,
        host=helper,
        acceptance=accepted,
        distinct_experts=distinct,
        stats_file=stats or "",
        min_decode=min_decode,
        max_price=max_price,
    )


def _check_numbers(device: Device, concurrency: int, count: int | None, ram_gb: float | None,
                   min_decode: float | None, max_price: float | None) -> None:  # fmt: skip
    check_range("--concurrency", concurrency, 1, MAX_CONCURRENCY)
    check_range("--count", count, 1, MAX_ASKED_COUNT)
    check_range("--ram", ram_gb, 0, 1e5, "GB")
    check_range("--min-decode", min_decode, 0, 1e6, "tokens/s")
    check_range("--max-price", max_price, 0, 1e9, "dollars")
    if max_price is not None and device.price_usd is None:
        raise RequestError(
            f"--max-price: no price is known for {device.name}; add [price] buy_usd to its file"
        )


def _engine(text: str | None, model: ModelShape, device: Device) -> Engine | None:
    if text is None:
        return None
    engine = engine_of(text, model)
    if not engine.in_plan and not (engine.quants and engine.flags):
        usable = ", ".join(engine_names(for_plan=True))
        raise RequestError(f"a plan cannot be made for {engine.title}; engines: {usable}")
    if not backend_of(engine, device):
        able = [load_engine(n) for n in engine_names(for_plan=True)]
        fitting = ", ".join(e.name for e in able if backend_of(e, device)) or "none"
        why = (
            f"does not support {device.name}"
            if device.name in engine.unsupported
            else f"runs on {', '.join(engine.backends)}, "
            f"{device.name} offers {', '.join(device.api)}"
        )
        raise RequestError(f"{engine.title} {why}; engines for it: {fitting}")
    return engine


def _weights(
    text: str | None, model: ModelShape, engine: Engine | None, device: Device
) -> Quant | None:
    """Sizes read from a checkpoint where `--quant` is a path: it exists or looks like one."""
    if text is None or names.canonical("quant", text) is not None:
        return None
    path = Path(text)
    looks = text.endswith(".gguf") or "/" in text or os.sep in text or path.is_dir()
    try:
        if not looks and not path.is_file():
            return None
    except (OSError, ValueError) as error:
        raise RequestError(f"--quant {text[:60]!r} is no path: {error}") from error
    from hwmodel.weights_file import read_weights

    _, found = read_weights(path, model)
    able = [engine] if engine is not None else [load_engine(n) for n in engine_names(for_plan=True)]
    if not any(_reads(e, found) and backend_of(e, device) for e in able):
        who = engine.title if engine is not None else f"no engine on {device.name}"
        form = "a GGUF file" if is_gguf(found) else "a Hugging Face folder"
        raise RequestError(
            f"--quant {text}: {who} {'cannot' if engine is not None else 'can'} load {form}"
        )
    return found


def is_gguf(file: Quant) -> bool:
    """Whether sizes read from a checkpoint are those of a GGUF file, not of a folder."""
    return not Path(file.name).is_dir()


def _reads(engine: Engine, file: Quant) -> bool:
    return ("gguf" if is_gguf(file) else "safetensors") in engine.formats


def _quant(text: str | None, model: ModelShape, engine: Engine | None) -> str | None:
    if text is None:
        return None
    name = names.canonical("quant", text)
    if name is None:
        near = names.suggest("quant", text)
        raise UnknownNameError("quant type", text, near)
    kind = MODEL_QUANTS.get(name.id, name.id) if model.is_step else name.id
    if kind not in QUANTS:
        raise UnknownNameError("quant type", text, names.suggest("quant", text))
    if engine is not None and kind not in engine.quants:
        known = ", ".join(engine.quants)
        raise RequestError(f"{engine.title} cannot load {kind} of this model; it loads {known}")
    return kind


def _helper(device: Device, ram: float | None, host: str | None) -> Device | None:
    """The processor whose memory holds experts beside a card."""
    if ram is not None and not device.unified:
        helper = load_device(host or DEFAULT_HOST)
        if not helper.is_cpu:
            raise RequestError(f"--host {helper.name} is no processor; see 'hwmodel devices list'")
        return helper
    if host is not None:
        raise RequestError("--host needs --ram and a device with memory of its own")
    return None


def parse_context(text: str | int, model: ModelShape) -> int:
    """A number of tokens: `32768`, `32K`, `128k`.

    Raises:
        RequestError: no such number, or more than the model was made for.
    """
    match = re.fullmatch(r"\s*(\d{1,12})\s*([kK]i?)?\s*", str(text))
    if match is None:
        raise RequestError(f"--context is {text!r}, expected tokens such as 32768 or 32K")
    tokens = int(match[1]) * (1024 if match[2] else 1)
    if not 1 <= tokens <= model.max_context:
        raise RequestError(
            f"--context is {tokens}, expected 1 to {model.max_context} (the longest context of "
            f"{model.name})"
        )
    return tokens


def with_memory(device: Device, total_bytes: float) -> Device:
    """The same processor or Mac with so much memory, as `--ram` states it.

    A Mac gives the GPU three quarters of its memory (two thirds up to 32 GiB), and with the
    setting all but 8 GiB (4 up to 24 GiB).

    Raises:
        RequestError: less than the operating system keeps.
    """
    if total_bytes <= 2 * SYSTEM_BYTES:
        raise RequestError(f"--ram is {total_bytes / 2**30:g} GB, expected at least 8")
    if total_bytes == device.memory_bytes:
        return device
    kept = {k: q for k, q in device.quantities.items() if not k.startswith("memory.")}
    texts = dict(device.texts)
    kept["memory.total_bytes"] = Quantity(total_bytes, "--ram", "now")
    if device.is_cpu:
        system = Quantity(SYSTEM_BYTES, "unverified", "now", "operating system")
        kept["memory.reserve_bytes"] = system
    else:
        gib = total_bytes / 2**30
        share = 0.75 if gib > 32 else 2 / 3
        rule = "https://github.com/ggml-org/llama.cpp/discussions/2182"
        kept["memory.usable_bytes"] = Quantity(share * total_bytes, rule, "2026-11")
        raised = int(1024 * (gib - (8 if gib > 24 else 4)))
        kept["memory.raised_usable_bytes"] = Quantity(raised * 2**20, "unverified", "now")
        texts["memory.raise_how"] = f"sudo sysctl iogpu.wired_limit_mb={raised}"
    title = f"{device.title.split(',')[0]}, {total_bytes / 2**30:.0f} GB"
    return dataclasses.replace(device, quantities=kept, texts=texts, title=title)

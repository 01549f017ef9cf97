"""Engines: what each inference engine can do with the model, and how one tells it to.

One TOML file per engine in `hwmodel/engines/`, every number with a source (`hwmodel.quantity`).
`sliding_cache` says what the engine allocates for a sliding-window layer: `window` (window +
micro-batch rows, as llama.cpp) or `full` (every position of the context). `[efficiency.BACKEND]`
holds, by quant family of `hwmodel.quant`, the share of the datasheet bandwidth that decoding
reaches before per-layer overhead, as far as anybody published it; `hwmodel engines show` prints
them for readers, while the estimator starts from `hwmodel.timing` and learns the rest from runs.
`[unsupported]` names devices that have one of the backends and yet cannot run the engine, and
backends on which FP8 needs a device with FP8 arithmetic.
`[flags]` holds the spelling of each setting, with `{value}` for its value (`{next}`: one more).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hwmodel import names
from hwmodel.devices import read_sources, read_toml
from hwmodel.errors import DeviceFileError, UnknownNameError
from hwmodel.quantity import Quantity, read_quantity

SPLITS = ("single", "layer", "tensor", "expert")
SLIDING_CACHES = ("window", "full")

_REQUIRED = ("name", "title", "backends", "sliding_cache", "splits", "max_drafts")
_TOP = {
    "schema", "name", "title", "family", "version", "date", "backends", "formats", "quants",
    "published", "kv_types", "sliding_cache", "splits", "host_experts", "ssd_streaming",
    "max_drafts", "plan", "notes", "sources", "memory", "overhead", "efficiency", "flags",
    "files", "repositories", "latent_prompts", "kernels", "unsupported",
}  # fmt: skip
_MEMORY = ("micro_batch", "context_bytes", "fraction")
_OVERHEAD = ("per_layer_s",)
_KERNELS = ("index_tile",)
_UNSUPPORTED = ("devices", "fp8_without_rate", "source")
LATENT_PROMPTS = ("latent", "heads")
_FLAGS = (
    "program", "model", "context", "micro_batch", "batch", "kv_type", "gpu_layers",
    "flash_attention", "sequences", "split_layer", "layer_shares", "remote", "tensor", "expert",
    "machines", "expert_groups", "group_machines",
    "memory", "host_experts", "host_expert_layers", "numa", "stream", "drafts", "draft_model",
    "draft_polling", "template",
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """One inference engine.

    Attributes:
        name, title: canonical name and what people call it.
        family: engines that share their kernels.
        version, date: what the facts were read from.
        backends: what it runs on.
        formats: files it reads (`gguf`, `safetensors`, `mlx`).
        quants: canonical quant types of Step 3.5 Flash that it can load.
        published: those of them whose files can be downloaded; a plan searches these.
        kv_types: types of the KV cache, the default first.
        sliding_cache: `window` or `full`, see the module.
        splits: ways to share a model among devices that it supports.
        host_experts: it can keep routed experts in host memory.
        ssd_streaming: it can run with weights that stay on disk (memory map).
        max_drafts: longest MTP draft it supports, 0 for none.
        in_plan: whether a plan may recommend it.
        unsupported: names of devices that have one of its backends and yet cannot run it.
        fp8_without_rate: backends on which FP8 weights need a device with FP8 arithmetic.
        latent_prompts: how prompts meet a latent cache (MLA): every head the `latent` itself, or
            `heads` with keys and values multiplied out, which costs a third of the arithmetic.
        quantities: numbers with their source, by dotted key such as `memory.micro_batch`.
        flags: spelling of each setting on the command line.
        files: name of the file or folder of a quant type's weights.
        repositories: where the weights of a quant type are published.
    """

    name: str
    title: str
    family: str
    version: str
    date: str
    backends: tuple[str, ...]
    formats: tuple[str, ...]
    quants: tuple[str, ...]
    published: tuple[str, ...]
    kv_types: tuple[str, ...]
    sliding_cache: str
    splits: tuple[str, ...]
    host_experts: bool
    ssd_streaming: bool
    max_drafts: int
    in_plan: bool
    notes: str
    quantities: Mapping[str, Quantity]
    flags: Mapping[str, str]
    files: Mapping[str, str]
    repositories: Mapping[str, str]
    file: str
    latent_prompts: str = "latent"
    unsupported: tuple[str, ...] = ()
    fp8_without_rate: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Title with the version and the month that its facts are of."""
        version = f" {self.version}" if self.version else ""
        dated = self.date and "(" not in self.version
        return f"{self.title}{version}" + (f" ({self.date})" if dated else "")

    @property
    def micro_batch(self) -> int:
        """Prompt tokens computed together when nothing else is said."""
        return int(self.quantities["memory.micro_batch"].value)

    @property
    def context_bytes(self) -> float:
        """Memory per device for libraries, graphs and activations that no tensor accounts for."""
        found = self.quantities.get("memory.context_bytes")
        return 0.0 if found is None else found.value

    @property
    def index_tile(self) -> int:
        """Keys that an indexer scores per reading of a prompt's queries; 0 where these stay."""
        found = self.quantities.get("kernels.index_tile")
        return 0 if found is None else int(found.value)

    @property
    def memory_fraction(self) -> float:
        """Share of a device's memory that the engine takes (1 where it takes what it needs)."""
        found = self.quantities.get("memory.fraction")
        return 1.0 if found is None else found.value

    def unverified(self) -> tuple[str, ...]:
        """Dotted keys of the numbers nobody has checked, sorted."""
        return tuple(sorted(k for k, q in self.quantities.items() if not q.is_verified))


# Types that people convert any model to, from the best to the smallest.
COMMUNITY_GGUF = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K",
)  # fmt: skip
_STEP_FLAGS = ("drafts", "draft_model", "draft_polling")


def for_other_model(engine: Engine) -> Engine:
    """The engine as it runs a model of another maker: without what its file says of Step's.

    Step's FP8 repository quantises the experts alone, others' all matrices; drafting with MTP
    heads is spelled and supported model by model, and is left out.
    """
    gguf = "gguf" in engine.formats
    dropped = _STEP_FLAGS if gguf else (*_STEP_FLAGS, "template")

    def own(quants: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("FP8" if q == "FP8-experts" else q for q in quants)

    published = tuple(q for q in COMMUNITY_GGUF if q in engine.quants) if gguf else ()
    return replace(
        engine,
        quants=own(engine.quants),
        published=published or own(engine.published),
        max_drafts=0,
        flags={k: v for k, v in engine.flags.items() if k not in dropped},
        files={},
        repositories={},
    )


def _folder() -> Path:
    return Path(__file__).parent / "engines"


def engine_names(for_plan: bool = False) -> tuple[str, ...]:
    """Names of all engines, sorted; with `for_plan` those that a plan may recommend."""
    found = tuple(sorted(p.stem for p in _folder().glob("*.toml")))
    return tuple(n for n in found if load_engine(n).in_plan) if for_plan else found


@lru_cache(maxsize=64)
def load_engine(name: str) -> Engine:
    """An engine by any of its names, or by the path of its file.

    Raises:
        UnknownNameError: no such name; the nearest ones are offered.
        DeviceFileError: the file is not valid.
    """
    if name.endswith(".toml"):
        return parse_engine(read_toml(Path(name)), name)
    found = names.canonical("engine", name)
    if found is None:
        raise UnknownNameError("engine", name, names.suggest("engine", name))
    path = _folder() / f"{found.id}.toml"
    return parse_engine(read_toml(path), path)


def parse_engine(raw: Mapping[str, Any], file: Path | str) -> Engine:
    """An engine from its TOML table, checked.

    Raises:
        DeviceFileError: an unknown key, a missing one, or a number without a source.
    """
    _check(raw, file)
    sources = read_sources(raw, file)
    return Engine(
        name=raw["name"],
        title=raw["title"],
        family=raw.get("family", ""),
        version=raw.get("version", ""),
        date=raw.get("date", ""),
        backends=tuple(raw["backends"]),
        formats=tuple(raw.get("formats", ())),
        quants=tuple(raw.get("quants", ())),
        published=tuple(raw.get("published", ())),
        kv_types=tuple(raw.get("kv_types", ("f16",))),
        sliding_cache=raw["sliding_cache"],
        splits=tuple(raw["splits"]),
        host_experts=bool(raw.get("host_experts", False)),
        ssd_streaming=bool(raw.get("ssd_streaming", False)),
        max_drafts=int(raw["max_drafts"]),
        in_plan=bool(raw.get("plan", True)),
        notes=raw.get("notes", ""),
        quantities=_quantities(raw, file, sources),
        flags=raw.get("flags", {}),
        files=raw.get("files", {}),
        repositories=raw.get("repositories", {}),
        file=str(file),
        latent_prompts=raw.get("latent_prompts", "latent"),
        unsupported=tuple(raw.get("unsupported", {}).get("devices", ())),
        fp8_without_rate=tuple(raw.get("unsupported", {}).get("fp8_without_rate", ())),
    )


def _quantities(
    raw: Mapping[str, Any], file: Path | str, sources: Mapping[str, str]
) -> dict[str, Quantity]:
    found: dict[str, Quantity] = {}
    known_keys = (("memory", _MEMORY), ("overhead", _OVERHEAD), ("kernels", _KERNELS))
    for section, known in known_keys:
        for key, entry in raw.get(section, {}).items():
            if key not in known:
                raise DeviceFileError(f"{file}: unknown key '{section}.{key}'")
            found[f"{section}.{key}"] = read_quantity(file, f"{section}.{key}", entry, sources)
    for backend, table in raw.get("efficiency", {}).items():
        for family, entry in table.items():
            key = f"efficiency.{backend}.{family}"
            found[key] = read_quantity(file, key, entry, sources)
            if not 0 < found[key].value <= 1:
                raise DeviceFileError(f"{file}: '{key}' is no share between 0 and 1")
    if found.get("memory.micro_batch", Quantity(0, "", "")).value < 1:
        raise DeviceFileError(f"{file}: 'memory.micro_batch' is missing or below 1")
    return found


def _check(raw: Mapping[str, Any], file: Path | str) -> None:
    if raw.get("schema") != 1:
        raise DeviceFileError(f"{file}: 'schema' is {raw.get('schema')!r}, expected 1")
    extra = sorted(set(raw) - _TOP)
    if extra:
        raise DeviceFileError(f"{file}: unknown key '{extra[0]}'")
    for name in _REQUIRED:
        if name not in raw:
            raise DeviceFileError(f"{file}: '{name}' is missing")
    if raw["sliding_cache"] not in SLIDING_CACHES:
        raise DeviceFileError(f"{file}: 'sliding_cache' must be one of {', '.join(SLIDING_CACHES)}")
    if raw.get("latent_prompts", "latent") not in LATENT_PROMPTS:
        raise DeviceFileError(
            f"{file}: 'latent_prompts' must be one of {', '.join(LATENT_PROMPTS)}"
        )
    for split in raw["splits"]:
        if split not in SPLITS:
            raise DeviceFileError(f"{file}: split {split!r} is none of {', '.join(SPLITS)}")
    for backend in raw["backends"]:
        if names.canonical("backend", backend) is None:
            raise DeviceFileError(f"{file}: unknown backend {backend!r}")
    unsupported = raw.get("unsupported", {})
    for key in unsupported:
        if key not in _UNSUPPORTED:
            raise DeviceFileError(f"{file}: unknown key 'unsupported.{key}'")
    if unsupported and unsupported.get("source") not in raw.get("sources", {}):
        raise DeviceFileError(f"{file}: 'unsupported' has no source of [sources]")
    for flag in raw.get("flags", {}):
        if flag not in _FLAGS:
            raise DeviceFileError(f"{file}: unknown flag '{flag}'")

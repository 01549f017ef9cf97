"""What is asked and what is answered: the configuration of one run and the estimate of its speed.

A `RunConfig` holds everything that `hwmodel.predict.predict` may look at, and nothing that was
measured in the run: model, quantisation, devices, placement, engine and workload. All values are
SI units, named in the field (`_bytes`, `_s`, `_bytes_per_s`, `_flop_per_s`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from hwmodel.model import ModelShape
    from hwmodel.quant import Quant

Quantity = Literal["decode_tok_s", "prefill_tok_s", "ttft_s"]
QUANTITIES: tuple[Quantity, ...] = ("decode_tok_s", "prefill_tok_s", "ttft_s")
Status = Literal["calibrated", "held_out", "extrapolated", "declined"]
Split = Literal["single", "layer", "tensor", "expert"]


class DeviceLike(Protocol):
    """What the predictor reads of a device (`hwmodel.devices.Device` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def device_class(self) -> str: ...
    @property
    def memory_bytes(self) -> float: ...
    @property
    def usable_bytes(self) -> float: ...
    @property
    def bandwidth_bytes_per_s(self) -> float: ...
    @property
    def measured_bandwidth_bytes_per_s(self) -> float | None: ...
    @property
    def flop_per_s(self) -> Mapping[str, float]:
        """Dense peak by type: `fp32`, `fp16`, `bf16`, `fp8`, `int8`, `fp4`."""
        ...

    @property
    def link_bytes_per_s(self) -> float | None:
        """Device to device, one direction; None where the device has no peer link."""
        ...

    @property
    def host_link_bytes_per_s(self) -> float | None:
        """Host memory to device, one direction; None for unified memory and CPUs."""
        ...


class EngineLike(Protocol):
    """What the predictor reads of an engine (`hwmodel.engines.Engine` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str:
        """Engines that share their kernels."""
        ...

    @property
    def sliding_cache(self) -> str:
        """`window` (sliding layers hold window + micro-batch rows) or `full`."""
        ...

    @property
    def micro_batch(self) -> int:
        """Prompt tokens computed together when the run does not state it."""
        ...

    @property
    def kv_types(self) -> tuple[str, ...]:
        """Types of the KV cache, the default first."""
        ...

    @property
    def latent_prompts(self) -> str:
        """How prompts meet a latent cache: `latent` or `heads`."""
        ...

    @property
    def index_tile(self) -> int:
        """Keys that an indexer scores per reading of a prompt's queries, 0 if read once."""
        ...


@dataclass(frozen=True)
class Workload:
    """What the engine is asked to do.

    `depth` is the number of tokens already in the KV cache while decode (or the prompt) is
    measured; None means that it was not stated and is taken as short, with a wider band.
    `concurrency` counts sequences decoded together. `micro_batch` None means the engine's own.
    `acceptance` holds the chance that the draft at each position is accepted, given that all
    before it were; None means the built-in figures. `distinct_experts` holds the mean number of
    distinct experts per MoE layer of 1, 2, ... neighbouring tokens of one sequence, as measured;
    None means the expectation under even, independent routing.
    """

    prompt_tokens: int = 0
    depth: int | None = 0
    generated_tokens: int = 0
    concurrency: int = 1
    micro_batch: int | None = None
    kv_type: str = "f16"
    drafts: int = 0
    acceptance: tuple[float, ...] | None = None
    distinct_experts: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Placement:
    """Where the weights live.

    `split` says how several devices share the model; with `attention_groups` above 1 only the
    routed experts are spread over all of them, and each group of devices holds everything else
    and its own sequences (data-parallel attention); `link_kind` (`nvlink`, `pcie`, `xgmi`,
    `network`) and `link_bytes_per_s` describe the path between them (empty, None: their own).
    `host_expert_share` is the share (0..1) of the routed experts kept in host memory and
    `host_layer_share` the share of whole layers there; `ssd_share` is the share of the routed
    experts that must be read from disk when used. A host computes its own experts during decode
    and streams them over the host link during prefill.
    """

    split: Split = "single"
    attention_groups: int = 1
    link_kind: str = ""
    link_bytes_per_s: float | None = None
    host_expert_share: float = 0.0
    host_layer_share: float = 0.0
    host_bandwidth_bytes_per_s: float | None = None
    host_link_bytes_per_s: float | None = None
    ssd_share: float = 0.0
    ssd_bytes_per_s: float | None = None


@dataclass(frozen=True)
class DeviceCount:
    """So many of one device; a machine with unlike devices is a tuple of several."""

    device: DeviceLike
    count: int = 1


@dataclass(frozen=True)
class EngineChoice:
    """An engine as run: `backend` is `cuda`, `metal`, `vulkan`, `rocm`, `cpu` or empty when
    unknown; `version` as the engine spells it; `date` an ISO date (or its beginning) of the
    build or of the report."""

    engine: EngineLike
    backend: str = ""
    version: str = ""
    date: str = ""


@dataclass(frozen=True)
class RunConfig:
    """One run to predict.

    Attributes:
        model: sizes of the model (`hwmodel.model`).
        quant: type or mixture of the weights (`hwmodel.quant`).
        devices: empty when the hardware is not known (the estimate is then declined).
        weights_bytes: stated size of the weight file, which goes before quant x parameters.
        unknown: one sentence for each name of the run that no registry knows; any entry makes
            the estimate an extrapolation with a wider band.
    """

    model: ModelShape
    quant: Quant
    devices: tuple[DeviceCount, ...]
    engine: EngineChoice
    placement: Placement = Placement()
    workload: Workload = Workload()
    weights_bytes: float | None = None
    unknown: tuple[str, ...] = ()

    @property
    def device_count(self) -> int:
        """Number of devices over all kinds."""
        return sum(d.count for d in self.devices)


@dataclass(frozen=True)
class Term:
    """One part of a step: the time it takes and the bytes and multiply-adds x 2 behind it."""

    name: str
    seconds: float
    bytes: float = 0.0
    flop: float = 0.0


@dataclass(frozen=True)
class NearestRun:
    """The measured run of the fit that resembles a configuration most.

    `error` is predicted / measured - 1; `held_out` says that a refit without its sweep made it.
    """

    id: str
    description: str
    measured: float
    predicted: float
    held_out: bool
    source: str = ""

    @property
    def error(self) -> float:
        """Relative error of the prediction of that run."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True)
class Estimate:
    """An answer of the cost model.

    `value`, `low`, `high` and `roofline` are in `unit` (`tok/s`, or `s` for ttft_s) and None when
    the estimate is declined. `roofline` is the value at the datasheet's peaks without any
    overhead. `limiting` names the resource whose terms take most of the time.
    """

    quantity: Quantity
    unit: str
    value: float | None
    low: float | None
    high: float | None
    roofline: float | None
    limiting: str
    terms: tuple[Term, ...]
    status: Status
    reason: str = ""
    nearest: NearestRun | None = None
    provenance: tuple[str, ...] = ()

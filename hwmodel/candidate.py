"""One configuration that a plan considers: its memory, its speed, its quality, its layer shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, lru_cache

from hwmodel.devices import Device
from hwmodel.engines import Engine
from hwmodel.memory import Ledger, ledger
from hwmodel.model import ModelShape
from hwmodel.predict import predict
from hwmodel.quality import QualityCost, quality_cost
from hwmodel.quant import Quant, role_bytes, weight_bytes
from hwmodel.run import Estimate, RunConfig

# Increase of perplexity up to which a type belongs to a tier; 0 and 1 are good enough to stop at.
TIERS = (0.01, 0.06, 0.10, 0.20, 0.45)
GOOD_TIER = 1


@dataclass(frozen=True)
class Candidate:
    """One configuration.

    Attributes:
        host_layers: layers whose experts are in host memory.
        ram_bytes: memory that was allowed for experts, where some are outside the devices'.
        host: whose memory that is, where the devices have memory of their own.
    """

    run: RunConfig
    context: int
    backend: str
    host_layers: int = 0
    ram_bytes: float | None = None
    host: Device | None = None

    @cached_property
    def memory(self) -> Ledger:
        """Where the memory goes with room for the whole context."""
        return ledger(self.run, self.context)

    @property
    def device(self) -> Device:
        """The device, of which `count` are used."""
        found = self.run.devices[0].device
        assert isinstance(found, Device)
        return found

    @property
    def engine(self) -> Engine:
        """The engine."""
        found = self.run.engine.engine
        assert isinstance(found, Engine)
        return found

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.run.device_count

    @cached_property
    def quality(self) -> QualityCost:
        """What the quant type costs."""
        return quality_of(self.run.model, self.run.quant)

    @property
    def tier(self) -> int:
        """Quality tier, 0 the best."""
        return tier_of(self.quality)

    @cached_property
    def layer_shares(self) -> tuple[int, ...]:
        """Layers on each device of a layer split, so that the largest share is as small as it can
        be; layers whose experts are in host memory come first and weigh little."""
        n, layers = self.count, self.run.model.layers
        if self.run.placement.split != "layer" or n == 1:
            return (layers,)
        weights = _layer_bytes(self)
        low, high = max(weights), sum(weights)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if len(_deal(weights, middle)) <= n else (middle, high)
        found = _deal(weights, high)
        return (*found, *[0] * (n - len(found)))

    @cached_property
    def share_problem(self) -> str:
        """Why the largest share of a layer split does not fit its device, empty if it does."""
        if len(self.layer_shares) == 1:
            return ""
        weights, need, start = _layer_bytes(self), 0.0, 0
        for layers in self.layer_shares:
            need = max(need, sum(weights[start : start + layers]))
            start += layers
        own = self.engine.context_bytes
        need += self.memory.compute_bytes - own * (self.count - 1)
        have = self.device.raised_usable_bytes or self.device.usable_bytes
        if need <= have:
            return ""
        return f"the largest share needs {need / 1e9:.1f} GB of {have / 1e9:.1f} GB on one device"

    @property
    def devices_usd(self) -> float | None:
        """Price of the devices, None if unknown; a server or a desktop around cards is not in it
        (`cost.terms_of` adds it)."""
        each = self.device.price_usd
        return None if each is None else each * self.count

    @property
    def is_offloaded(self) -> bool:
        """Some experts are outside the devices' memory."""
        place = self.run.placement
        return place.ssd_share > 0 or place.host_expert_share > 0

    @property
    def fits(self) -> bool:
        """It fits as the machine comes."""
        return self.memory.margin_bytes >= 0 and not self.share_problem

    @property
    def holds(self) -> bool:
        """It fits, if need be with the documented setting."""
        return self.memory.raised_margin_bytes >= 0 and not self.share_problem

    def at(self, **changes: object) -> RunConfig:
        """The run with another workload, such as `depth=2048`."""
        work = dataclasses.replace(self.run.workload, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(self.run, workload=work)

    @cached_property
    def decode(self) -> Estimate:
        """Speed with the context full, without drafts."""
        return predict(self.at(depth=self.context, drafts=0), "decode_tok_s")


def _layer_bytes(c: Candidate) -> list[float]:
    """Bytes of each layer on the devices: cache and weights spread evenly, experts where they are.

    Embedding, head and MTP layers are spread like everything else; that errs by less than a layer.
    """
    m, model = c.memory, c.run.model
    routed = role_bytes(model, c.run.quant).get("routed", 0.0)
    place = c.run.placement
    on_devices = routed * (1 - place.host_expert_share - place.ssd_share)
    rest = (m.weights_bytes - on_devices + m.kv_bytes + m.mtp_bytes) / model.layers
    heavy = max(1, model.moe_layers - c.host_layers)
    light = model.layers - heavy
    return [rest] * light + [rest + on_devices / heavy] * heavy


def _deal(weights: list[float], room: float) -> list[int]:
    """Layers per device when each device takes as many as its room allows."""
    found, used = [0], 0.0
    for weight in weights:
        if used + weight > room and found[-1]:
            found.append(0)
            used = 0.0
        found[-1] += 1
        used += weight
    return found


@lru_cache(maxsize=256)
def quality_of(model: ModelShape, quant: Quant) -> QualityCost:
    """What a quant type or a file costs on this model, from its bits per weight."""
    name = quant.default if quant.file else quant.name
    found = quality_cost(name, 8 * weight_bytes(model, quant) / model.parameters)
    if model.is_step or not found.source:
        return found
    return dataclasses.replace(found, basis=f"{found.basis} of Step 3.5 Flash")


def tier_of(quality: QualityCost) -> int:
    """Quality tier, 0 the best; types whose loss nobody measured but that keep 8 bits are 0."""
    loss = quality.perplexity_increase
    if loss is None:
        return 0
    return next((i for i, limit in enumerate(TIERS) if loss <= limit), len(TIERS))

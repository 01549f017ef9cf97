"""Effects: what a run is looked up by when fitted efficiencies are applied to it.

An effect has a name such as `weights/class=apple`: the part of a step it changes, the level, and
which member of that level. Levels go from all runs over device class, engine group and family to
the single device; never down to a run, a sweep or a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.placement import Machine
from hwmodel.run import RunConfig

REFERENCE_MONTH = 2026 * 12 + 7  # builds are compared with August 2026
Features = tuple[tuple[str, float], ...]

# Engine families (`Engine.family`) that schedule and launch alike.
GROUPS: dict[str, str] = {
    "vllm": "server", "sglang": "server", "tensorrt-llm": "server", "atom": "server",
    "hosted": "server",
}  # fmt: skip
# Below this a server card has graphics memory, above it HBM.
GRAPHICS_MEMORY_BYTES_PER_S = 1.2e12


@dataclass(frozen=True)
class Context:
    """What the effects of a run are looked up by."""

    device_class: str
    device: str
    family: str
    group: str
    engine: str
    backend: str
    quant: str
    age_years: float  # age of the build before the reference month, 0..2
    early: float  # 1 for a build of the month the architecture appeared, 0 four months later

    def features(self, part: str, *levels: str) -> Features:
        """The effects of a part on the levels asked for, and on all runs (`all`)."""
        known = {
            "class": self.device_class,
            "device": self.device,
            "family": self.family,
            "engine": self.engine,
            "backend": f"{self.family}/{self.backend}" if self.backend else "",
            "quant": self.quant,
            "group": self.group if self.group != self.family else "",
            "class+group": f"{self.device_class}+{self.group}",
            "class+quant": f"{self.device_class}+{self.quant}",
            "group+quant": f"{self.group}+{self.quant}",
        }
        found = [(f"{part}/all", 1.0)]
        found += [(f"{part}/{level}={known[level]}", 1.0) for level in levels if known[level]]
        return tuple(found)


def months_of(date: str) -> int | None:
    """`2026-02-13` or `2026-02` as a number of months; `2025` is its middle; None if unreadable."""
    digits = date.strip()
    if len(digits) < 4 or not digits[:4].isdigit():
        return None
    month = digits[5:7]
    return int(digits[:4]) * 12 + (int(month) - 1 if month.isdigit() else 6)


def kernel_class(machine: Machine) -> str:
    """The device class whose efficiencies apply.

    A server card with graphics memory instead of HBM (L40S, L4, A10, A40) behaves like the
    consumer card of its generation.
    """
    each = machine.bandwidth_bytes_per_s / max(1, machine.parallel)
    if machine.device_class == "nvidia-datacenter" and each < GRAPHICS_MEMORY_BYTES_PER_S:
        return "nvidia-consumer"
    return machine.device_class


def context_of(run: RunConfig, machine: Machine, device_class: str = "") -> Context:
    """The levels of a run; its date decides how old the build is."""
    month = months_of(run.engine.date)
    family = run.engine.engine.family or "other"
    age = 0.0 if month is None else min(24, max(0, REFERENCE_MONTH - month)) / 12
    released = months_of(run.model.released)
    early = 0.0
    if month is not None and released is not None:
        early = min(1.0, max(0.0, 1 - (month - released) / 4))
    return Context(
        device_class=device_class or kernel_class(machine),
        device=machine.device_name,
        family=family,
        group=GROUPS.get(family, family),
        engine=run.engine.engine.name,
        backend=run.engine.backend,
        quant=run.quant.family,
        age_years=age,
        early=early,
    )


def age_effects(c: Context, part: str) -> Features:
    """Effects of an old build, and of one from the months in which the architecture was new."""
    found: list[tuple[str, float]] = []
    if c.age_years:
        found.append((f"{part}/age={c.group}", c.age_years))
    if c.early:
        found += [(f"{part}/early={c.group}", c.early)]
        found += [(f"{part}/early={c.device_class}+{c.group}", c.early)]
    return tuple(found)

"""A part of a step: what takes time, at which prior efficiency, under which effects."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.effects import Features


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        base_s: seconds at the prior efficiency.
        peak_s: seconds at the datasheet's peak (0 for overheads).
        arithmetic_s: seconds of its operations alone where a host computes what it reads: a second
            limit beside `peak_s`, already in `base_s`.
        features: names and values of the effects that change `base_s`.
    """

    name: str
    resource: str
    base_s: float
    features: Features
    peak_s: float = 0.0
    bytes: float = 0.0
    flop: float = 0.0
    arithmetic_s: float = 0.0

"""What a quant type costs in quality, as far as anybody has measured it on this model.

Six published mixtures of Step 3.5 Flash (`data/quality.toml`) give perplexity against bits per
weight; a type between two of them is interpolated (logarithm of the increase, linear in bits), one
outside of them is extrapolated and said to be so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hwmodel.devices import read_sources, read_toml
from hwmodel.quantity import read_quantity

_FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class QualityCost:
    """`perplexity_increase` is relative (0.05 = 5 % worse), None where nothing can be said."""

    perplexity_increase: float | None
    basis: str
    source: str = ""

    def text(self) -> str:
        """One clause, such as `perplexity about +4.9 %`."""
        if self.perplexity_increase is None:
            return self.basis
        if self.perplexity_increase == 0:
            return "no loss (the model's own type)"
        percent = 100 * self.perplexity_increase
        shown = f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"
        return f"perplexity about +{shown} % ({self.basis})"


@lru_cache(maxsize=1)
def _points() -> tuple[tuple[float, float, str, str], ...]:
    path = Path(__file__).parent / "data" / "quality.toml"
    raw = read_toml(path)
    sources = read_sources(raw, path)
    found = []
    for entry in raw["points"]:
        bits = read_quantity(path, "bits", entry["bits"], sources)
        loss = read_quantity(path, "perplexity_increase", entry["perplexity_increase"], sources)
        found.append((bits.value, loss.value, entry["name"], loss.source))
    return tuple(sorted(found))


def quality_cost(quant: str, bits_per_weight: float) -> QualityCost:
    """The cost of a quant type that stores the model at so many bits per weight."""
    if quant in _FLOAT_TYPES:
        return QualityCost(0.0, "the model's own type")
    if quant.startswith("FP8"):
        return QualityCost(None, "8-bit floats by the vendor, no published perplexity")
    points = _points()
    source = points[0][3]
    below = [p for p in points if p[0] <= bits_per_weight]
    above = [p for p in points if p[0] >= bits_per_weight]
    if below and above:
        low, high = below[-1], above[0]
        basis = f"between measured mixtures of {low[0]:g} and {high[0]:g} bits"
        if low == high:
            return QualityCost(low[1], f"measured mixture of {low[0]:g} bits", source)
    elif below:
        return QualityCost(points[-1][1], f"at most that of {points[-1][0]:g} bits", source)
    else:
        low, high = points[0], points[1]
        basis = f"extrapolated below {points[0][0]:g} bits"
    share = (bits_per_weight - low[0]) / (high[0] - low[0])
    loss = math.exp(math.log(low[1]) + share * (math.log(high[1]) - math.log(low[1])))
    return QualityCost(loss, basis, source)

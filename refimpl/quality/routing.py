"""What the routers do on a text: load of the experts, neighbours that share them, margins.

Axes: T tokens, L MoE layers, E experts, k experts per token, N neighbouring tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.backend import Array
from refimpl.quality.clustered import Measured, mean, quantile

NEIGHBOURS = 8
TOP_SHARE = 0.1


class Routing:
    """Collects (T, k) selections and (T,) margins of every MoE layer, window by window."""

    def __init__(self, layers: Sequence[int], experts: int, top_k: int) -> None:
        self.layers, self.experts, self.top_k = tuple(layers), experts, top_k
        self.counts = np.zeros((len(layers), experts), dtype=np.int64)  # (L, E)
        self._distinct: list[list[Array]] = [[] for _ in range(NEIGHBOURS)]
        self._margins: list[Array] = []

    def add(self, chosen: Sequence[Array], margins: Sequence[Array]) -> None:
        """One window: a (T, k) and a (T,) per MoE layer."""
        for i, rows in enumerate(chosen):
            self.counts[i] += np.bincount(rows.reshape(-1), minlength=self.experts)
        for n in range(1, min(NEIGHBOURS, len(chosen[0])) + 1):
            each = np.stack([distinct(rows, n, self.experts) for rows in chosen])  # (L, T-n+1)
            self._distinct[n - 1].append(each.mean(axis=0))
        self._margins.append(np.stack(margins).astype(np.float64).reshape(-1))

    def distinct_experts(self) -> list[Measured]:
        """Mean distinct experts per layer of 1..8 neighbouring tokens."""
        return [mean(windows) for windows in self._distinct if windows]

    def independent(self) -> dict[str, list[float]]:
        """The same if tokens chose independently: each expert with its measured load, and all
        alike. Expert e is used by one of n tokens with chance 1 - (1 - p_e)^n, p_e being the
        share of tokens that chose it."""
        share = self.counts * self.top_k / self.counts.sum(axis=1, keepdims=True)  # (L, E)
        n = np.arange(1, NEIGHBOURS + 1)
        uniform = self.experts * (1 - (1 - self.top_k / self.experts) ** n)
        loaded = [float((1 - (1 - share) ** i).sum(axis=1).mean()) for i in n]
        return {"measured_load": loaded, "uniform": [float(x) for x in uniform]}

    def layer_figures(self) -> list[dict[str, Any]]:
        """Per layer: imbalance (largest load over the mean one), entropy over log E, share of the
        busiest tenth of the experts, experts never used."""
        top = max(1, round(TOP_SHARE * self.experts))
        most = max(2, self.experts)  # a single expert has no entropy
        out = []
        for layer, counts in zip(self.layers, self.counts, strict=True):
            p = counts / counts.sum()
            used = p[p > 0]
            out.append(
                {
                    "layer": layer,
                    "imbalance": float(p.max() * self.experts),
                    "entropy_share": float(-(used * np.log(used)).sum() / np.log(most)),
                    "busiest_tenth_share": float(np.sort(p)[-top:].sum()),
                    "unused": int((counts == 0).sum()),
                }
            )
        return out

    def margins(self) -> dict[str, Any]:
        """Gap between the k-th and the next biased score, over all layers and tokens."""
        m = self._margins
        return {
            "mean": mean(m).to_json(),
            **{f"p{round(100 * q):02d}": quantile(m, q).to_json() for q in (0.01, 0.1, 0.5)},
        }


def distinct(chosen: Array, n: int, experts: int) -> Array:
    """Distinct experts among each run of n neighbouring tokens: (T, k) -> (T - n + 1,)."""
    used = np.zeros((len(chosen), experts), dtype=bool)
    np.put_along_axis(used, chosen, True, axis=1)
    runs = used[: len(used) - n + 1].copy()
    for i in range(1, n):
        runs |= used[i : len(used) - n + 1 + i]
    return runs.sum(axis=1)

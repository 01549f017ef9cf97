"""The router: which experts a token uses, and with which weights.

Axes: T rows, E experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.reference.attention import sigmoid
from refimpl.reference.numerics import Array
from refimpl.reference.variant import NORMATIVE, Variant

_RENORMALISATION_EPS = 1e-20  # added to the sum of the selected scores (vendor's model code)
_LLAMACPP_FLOOR = 2.0**-14  # llama.cpp: max(sum, floor) instead (llama-graph.cpp)


@dataclass(frozen=True)
class Routing:
    """Experts (T, k) in ascending index, their weights (T, k), and the margin (T,).

    The margin is the k-th minus the (k+1)-th largest of score + bias: how far the choice is
    from changing; 1.0 where all experts are selected.
    """

    experts: Array
    weights: Array
    margin: Array


def route(
    logits: Array, bias: Array, top_k: int, scale: float, variant: Variant = NORMATIVE
) -> Routing:
    """Sigmoid scores; the bias selects, the unbiased scores weigh: (T, E), (E,) -> Routing.

    Weights are renormalised over the selected experts and multiplied by
    `moe_router_scaling_factor`. Ties go to the lower index.
    """
    scores = _softmax(logits) if variant.router_softmax else sigmoid(logits)  # (T, E)
    biased = scores if variant.router_bias_ignored else scores + bias  # (T, E)
    order = np.argsort(-biased, axis=-1, kind="stable")  # (T, E)
    experts = np.sort(order[:, :top_k], axis=-1)  # (T, k)
    weighing = biased if variant.router_bias_in_weights else scores
    weights = np.take_along_axis(weighing, experts, axis=-1)  # (T, k)
    if not variant.router_not_renormalised:
        total = weights.sum(axis=-1, keepdims=True)
        if variant.router_llamacpp_floor:
            weights = weights / np.maximum(total, weights.dtype.type(_LLAMACPP_FLOOR))
        else:
            weights = weights / (total + weights.dtype.type(_RENORMALISATION_EPS))
    if not variant.router_unscaled:
        weights = weights * weights.dtype.type(scale)
    ranked = np.take_along_axis(biased, order, axis=-1)
    margin = np.ones(len(logits), dtype=scores.dtype)
    if top_k < logits.shape[-1]:
        margin = ranked[:, top_k - 1] - ranked[:, top_k]
    return Routing(experts, weights, margin)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

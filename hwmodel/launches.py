"""Kernels of a decoding step that no plain layer of attention and experts has."""

from __future__ import annotations

from hwmodel.model import ModelShape

# Launches of one row that no plain layer has, each beside the matrices' own: hyper-connections
# (norm, mix, split, collapse and expand around two sublayers; github.com/antirez/ds4/pull/1042),
# pooling of keys (projection, position, store, norm, rotation), an indexer (queries, rotation,
# transform, weights, scores, selection), gates on heads (product, sigmoid, scaling). A queued
# launch takes about 10 us on Apple's GPUs (github.com/antirez/ds4/pull/846); elsewhere half, what
# OVERHEAD_PRIOR is per launch; a processor calls a function.
RESIDUAL_LAUNCHES, POOL_LAUNCHES, INDEX_LAUNCHES, GATE_LAUNCHES = 10, 5, 6, 3
LAUNCH_S = {"apple": 10e-6, "cpu": 0.0}


def launches_s(model: ModelShape, device_class: str) -> float:
    """Seconds of a step that such launches take before any run is seen."""
    return extra_launches(model) * LAUNCH_S.get(device_class, 5e-6)


def extra_launches(model: ModelShape) -> int:
    """Launches of a step beyond those of plain layers of attention and experts."""
    found = RESIDUAL_LAUNCHES * sum(t.role == "residual" and not t.mtp for t in model.tensors)
    for g in model.attention:
        found += INDEX_LAUNCHES * g.layers if g.indexer else 0
        found += POOL_LAUNCHES * g.layers if g.compress > 1 and not g.indexer else 0
    if model.kinds == ("gqa",) and not any(g.indexer for g in model.attention):
        found += GATE_LAUNCHES * sum(t.kind == "attn_other" and not t.mtp for t in model.tensors)
    return found

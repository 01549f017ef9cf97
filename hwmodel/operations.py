"""What one step computes and reads, by role: multiply-adds, weight bytes, KV values.

Counts are facts. They follow the tensors of `hwmodel.model` and equal what an instrumented run of
the reference counts (`refimpl.reference.trace.Trace`) when the number of distinct experts is given
as it was; with the formula for even routing they are its expectation. A step is T rows (query
positions) of one sequence, appended at a depth; several sequences share the weights of a step.

Axes: T rows of the step, S sequences; a row at position p sees min(window, p + 1) keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from hwmodel.model import AttentionGroup, ModelShape
from hwmodel.quant import Quant, role_bytes, tensor_bytes

SCORES = "scores"
_NO_PRODUCT = ("norm", "bias", "embedding", "table")
STATE_BYTES = 4  # engines keep the state of linear attention in float32


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step.

    `multiply_adds` and `weight_bytes` by role (`scores` is QK and PV over visible keys);
    `kv_values_read` are the K and V values that any query of the step can see, `written` those
    appended. Multiply by the bytes of the KV type. `state_bytes` are those that linear attention
    reads and writes. `shared_scores` and `shared_values_read` are the parts of scores and reads in
    which all query heads meet one key (latents and indexers); `index_scores` those of indexers.
    """

    multiply_adds: Mapping[str, float]
    weight_bytes: Mapping[str, float]
    kv_values_read: float
    kv_values_written: float
    state_bytes: float = 0.0
    shared_scores: float = 0.0
    shared_values_read: float = 0.0
    index_scores: float = 0.0

    def cache_bytes(self, value_bytes: float) -> float:
        """Bytes that a step moves for what it remembers: KV values of `value_bytes`, states."""
        return self.kv_values_read * value_bytes + self.state_bytes

    @property
    def flop(self) -> float:
        """Floating-point operations: two per multiply-add."""
        return 2.0 * sum(self.multiply_adds.values())


def visible_pairs(depth: int, rows: int, window: int | None) -> int:
    """Number of (query, key) pairs of `rows` queries at positions depth, depth+1, ..."""
    if window is None:
        return rows * depth + rows * (rows + 1) // 2
    if window <= 0:
        return 0
    growing = min(rows, max(0, window - depth))  # rows that do not fill the window yet
    return growing * depth + growing * (growing + 1) // 2 + (rows - growing) * window


def visible_rows(depth: int, rows: int, window: int | None) -> int:
    """Cached positions that any of the step's queries sees, its own rows included."""
    if window is None:
        return depth + rows
    return 0 if window <= 0 else min(depth + rows, window + rows - 1)


def step_counts(
    model: ModelShape,
    quant: Quant,
    depth: int,
    rows: int,
    sequences: int = 1,
    logit_rows: int | None = None,
    distinct: float | None = None,
    distinct_tokens: int | None = None,
    unfold: bool = False,
) -> StepCounts:
    """Counts of a step of `rows` rows for each of `sequences` sequences at one depth.

    Args:
        logit_rows: rows that go through the output head (None: every row, as in decode;
            prefill of a chunk needs 1).
        distinct: distinct experts per MoE layer that the step touches (None: expectation under
            even, independent routing).
        distinct_tokens: different token ids of the step, whose embedding rows are read.
        unfold: latents are multiplied out into each head's own keys and values before they are
            scored (prompts; the product itself is `kv_b_proj`, which every row passes anyway).
    """
    total = rows * sequences
    heads = total if logit_rows is None else logit_rows * sequences
    per_row = _matrix_elements(model)
    adds: dict[str, float] = {}
    for role, elements in per_row.items():
        adds[role] = elements * (heads if role == "head" else total)
    groups = tuple(_unfolded(g) for g in model.attention) if unfold else model.attention
    adds[SCORES] = sequences * _scores(groups, depth, rows)
    shared = tuple(g for g in groups if g.kv_heads == 1)
    indexers = tuple(g for g in groups if g.indexer)
    stored = role_bytes(model, quant)
    read = {r: v for r, v in stored.items() if r not in ("mtp", "embedding", "routed")}
    if model.experts:
        if distinct is None:
            distinct = model.distinct_experts(total)
        read["routed"] = stored.get("routed", 0.0) * distinct / model.experts
    if model.tied_embedding:
        read["head"] = read.get("head", 0.0) + stored["embedding"]
    elif "embedding" in stored:
        vocabulary = _vocabulary(model)
        tokens = total if distinct_tokens is None else distinct_tokens
        read["embedding"] = stored["embedding"] * min(1.0, tokens / vocabulary)
    return StepCounts(
        multiply_adds=adds,
        weight_bytes=read,
        kv_values_read=sequences * _kv(model.attention, depth, rows),
        kv_values_written=total * sum(g.layers * g.kv_values / g.compress for g in model.attention),
        state_bytes=2.0 * STATE_BYTES * sequences * _states(model.attention),
        shared_scores=sequences * _scores(shared, depth, rows),
        shared_values_read=sequences * _kv(shared, depth, rows),
        index_scores=sequences * _scores(indexers, depth, rows),
    )


def _unfolded(g: AttentionGroup) -> AttentionGroup:
    if g.unfolded is None:
        return g
    qk, pv = g.unfolded
    return replace(g, qk_values=qk, pv_values=pv, kv_heads=g.qk_values // g.kv_values)


def _scores(groups: tuple[AttentionGroup, ...], depth: int, rows: int) -> float:
    return sum(
        g.layers * (g.qk_values + g.pv_values) * visible_pairs(depth, rows, g.window) / g.compress
        for g in groups
    )


def _kv(groups: tuple[AttentionGroup, ...], depth: int, rows: int) -> float:
    return sum(
        g.layers * g.kv_values * visible_rows(depth, rows, g.window) / g.compress for g in groups
    )


def _states(groups: tuple[AttentionGroup, ...]) -> int:
    return sum(g.layers * g.state_values for g in groups)


def _vocabulary(model: ModelShape) -> int:
    """Rows of all tables that a token looks one row up in."""
    table = sum(t.elements for t in model.tensors if t.role == "embedding")
    return max(1, table // model.hidden_size)


@lru_cache(maxsize=512)
def _matrix_elements(model: ModelShape) -> Mapping[str, float]:
    """Multiply-adds per row and role: the elements of the matrices that a row meets."""
    found: dict[str, float] = {}
    for t in model.tensors:
        if t.mtp or t.kind in _NO_PRODUCT:
            continue
        share = model.top_k / model.experts if t.role == "routed" else 1.0
        found[t.role] = found.get(t.role, 0.0) + t.elements * share
    if model.tied_embedding:
        table = sum(t.elements for t in model.tensors if t.kind == "embedding")
        found["head"] = found.get("head", 0.0) + table
    return found


@lru_cache(maxsize=512)
def draft_bytes(model: ModelShape, quant: Quant, drafts: int) -> float:
    """Stored bytes that making `drafts` drafts reads, one after the other.

    Each draft runs one MTP layer with its head; where there are fewer layers than drafts the last
    runs again. Layers without a head of their own use the trunk's; of routed experts a token reads
    its share.
    """
    own, trunk_head = _mtp_layers(model, quant)
    if not own or drafts <= 0:
        return 0.0
    used = [own[min(i, len(own) - 1)] for i in range(drafts)]
    return sum(
        layer.get("head", trunk_head)
        + sum(v for role, v in layer.items() if role not in ("routed", "head"))
        + layer.get("routed", 0.0) * model.top_k / max(1, model.experts)
        for layer in used
    )


def mtp_bytes(model: ModelShape, quant: Quant, drafts: int) -> float:
    """Stored bytes of the MTP layers that `drafts` drafts need in memory."""
    own, _ = _mtp_layers(model, quant)
    return sum(sum(layer.values()) for layer in own[: max(0, drafts)])


@lru_cache(maxsize=512)
def _mtp_layers(model: ModelShape, quant: Quant) -> tuple[list[dict[str, float]], float]:
    """Stored bytes by role of each MTP layer, and of the trunk's head."""
    found: dict[int, dict[str, float]] = {}
    head = table = 0.0
    for t, size in zip(model.tensors, tensor_bytes(model, quant), strict=True):
        if t.mtp:
            layer = found.setdefault(t.layer, {})
            layer[t.role] = layer.get(t.role, 0.0) + float(size)
        elif t.kind == "head":
            head += float(size)
        elif t.kind == "embedding":
            table += float(size)
    return [found[i] for i in sorted(found)], head or table

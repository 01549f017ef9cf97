"""Sizes of a model: tensors by kind and layer, attention and experts, as the cost model counts.

Step 3.5 Flash comes tensor by tensor from `refimpl.inventory` (`step_shape`); other models from
`hwmodel.catalogue`, and one that nobody described from its totals alone (`shape_from_totals`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property

from refimpl.config import ModelConfig
from refimpl.inventory import TensorSpec, inventory

STEP_NAME, STEP_TITLE, STEP_SOURCE = "step-3.5-flash", "Step 3.5 Flash", "refimpl.inventory"


@dataclass(frozen=True)
class TensorCount:
    """One tensor, or several alike of one layer: what it is for and how many values it holds.

    `kind` is what llama.cpp's mixtures ask for (attn_q, attn_k, attn_v, attn_o, attn_other,
    ffn_gate, ffn_up, ffn_down, router, norm, bias, embedding, head, other); `role` as in
    `refimpl.inventory`.
    """

    kind: str
    role: str
    layer: int
    elements: int
    mtp: bool = False


@dataclass(frozen=True)
class AttentionGroup:
    """Layers with the same attention.

    `kv_values` is what one entry of one layer's cache holds (2 x KV heads x head_dim, or the
    latent of MLA); `qk_values` and `pv_values` are the multiply-adds per query, layer and visible
    entry of QK and PV; `window` counts visible tokens, None for all earlier ones, 0 for linear
    attention, which reads and writes `state_values` float32 values per step instead. `selected`
    says that the window is not of the latest tokens but of those that an indexer picks: the cache
    keeps all of them. `compress` tokens share one entry. `kv_heads` are the heads that tensor
    parallelism can deal out; a latent is one, so that every device needs all of it. `unfolded`
    are QK and PV per query and key of a latent that is multiplied out into a key and a value of
    each head (None where that cannot be or saves nothing). `indexer` marks the small attention
    that only scores: its keys are kept beside those of the layer it serves.
    """

    layers: int
    kv_values: int
    qk_values: int
    pv_values: int
    window: int | None = None
    state_values: int = 0
    selected: bool = False
    compress: int = 1
    kv_heads: int = 8
    unfolded: tuple[int, int] | None = None
    indexer: bool = False


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What the cost model knows of a model.

    `certain` is False where the shape was guessed from totals. `tensors` holds the trunk and,
    marked `mtp`, the layers for speculative decoding. `released` is the month in which engines
    began to support the architecture; `query_heads` lists the numbers that occur,
    `kinds` the kinds of attention (`gqa`, `mla`, `compressed`, `linear`).
    """

    name: str
    layers: int
    hidden_size: int
    tensors: tuple[TensorCount, ...] = field(repr=False)
    attention: tuple[AttentionGroup, ...]
    experts: int = 0
    top_k: int = 0
    moe_layers: int = 0
    gqa: int = 8
    max_context: int = 0
    tied_embedding: bool = False
    mtp_layers: int = 0
    certain: bool = True
    source: str = ""
    released: str = ""
    query_heads: tuple[int, ...] = ()
    expert_width: int = 0
    kinds: tuple[str, ...] = ("gqa",)

    @property
    def is_step(self) -> bool:
        """Counted from Step's own inventory: what its vendor published applies."""
        return self.source == STEP_SOURCE

    @property
    def title(self) -> str:
        """The name as people write it."""
        return STEP_TITLE if self.name == STEP_NAME else self.name

    @cached_property
    def parameters(self) -> int:
        """Parameters of the trunk (MTP layers not counted)."""
        return sum(t.elements for t in self.tensors if not t.mtp)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters one token uses, the output head included and the embedding table not."""
        biases = sum(t.elements for t in self.tensors if t.kind == "bias" and not t.mtp)
        return round(sum(self.active_by_role.values())) - biases

    @cached_property
    def parameters_by_role(self) -> dict[str, int]:
        """Parameters of the trunk by role."""
        found: dict[str, int] = {}
        for t in self.tensors:
            if not t.mtp:
                found[t.role] = found.get(t.role, 0) + t.elements
        return found

    @cached_property
    def active_by_role(self) -> dict[str, float]:
        """Parameters that one token multiplies with or adds, by role."""
        found = {r: float(n) for r, n in self.parameters_by_role.items() if r != "embedding"}
        if self.tied_embedding:
            found["head"] = found.get("head", 0.0) + self.parameters_by_role.get("embedding", 0)
        if self.experts:
            found["routed"] = found.get("routed", 0.0) * self.top_k / self.experts
        return found

    def distinct_experts(self, tokens: float) -> float:
        """Expected distinct experts per layer for `tokens` tokens under even, independent
        routing: E (1 - (1 - k / E)^n) (performance notes of the model's report)."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens)


_KINDS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_o",
    "g_proj": "attn_other", "router": "router", "router_bias": "bias",
    "embed_tokens": "embedding", "lm_head": "head", "shared_head.output": "other",
}  # fmt: skip


def _kind(t: TensorSpec) -> str:
    if t.key in _KINDS:
        return _KINDS[t.key]
    if len(t.shape) == 1:
        return "norm"
    last = t.key.split(".")[-1].removesuffix("_proj")
    return f"ffn_{last}" if last in ("gate", "up", "down") else "other"


def shape_of_config(config: ModelConfig, name: str = STEP_NAME) -> ModelShape:
    """The shape of a Step configuration, counted tensor by tensor from the inventory."""
    tensors = tuple(
        TensorCount(
            kind=_kind(t),
            role=t.part if t.role == "mtp" else t.role,
            layer=-1 if t.layer is None else t.layer,
            elements=t.elements,
            mtp=t.role == "mtp",
        )
        for t in inventory(config)
    )
    groups: dict[tuple[int, int, int, int | None], int] = {}
    heads: dict[tuple[int, int, int, int | None], int] = {}
    for s in config.trunk:
        values = s.num_attention_groups * s.head_dim
        work = s.num_attention_heads * s.head_dim
        key = (2 * values, work, work, s.window)
        groups[key] = groups.get(key, 0) + 1
        heads[key] = s.num_attention_groups
    attention = tuple(AttentionGroup(n, *key, kv_heads=heads[key]) for key, n in groups.items())
    return ModelShape(
        name=name,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        tensors=tensors,
        attention=attention,
        experts=config.moe_num_experts if config.moe_layers else 0,
        top_k=config.moe_top_k if config.moe_layers else 0,
        moe_layers=len(config.moe_layers),
        gqa=config.num_attention_heads // config.num_attention_groups,
        max_context=config.max_position_embeddings,
        mtp_layers=config.num_nextn_predict_layers,
        source=STEP_SOURCE,
        released="2026-02",
        query_heads=tuple(sorted({s.num_attention_heads for s in config.trunk})),
        expert_width=config.moe_intermediate_size if config.moe_layers else 0,
    )


@cache
def step_shape() -> ModelShape:
    """Step 3.5 Flash as published (the text model of Step 3.7 Flash is the same)."""
    from refimpl.config import published

    return shape_of_config(published())


def shape_from_totals(name: str, total: float, active: float) -> ModelShape:
    """A plausible shape for a model of which only the totals (parameters) are stated.

    Depth and width follow the trend of published models (32 layers at 8 B dense, 126 at 405 B;
    about 45 layers at 10 B active for mixtures of experts); 8 KV heads of 128; for a mixture
    40 % of the active parameters are always read and 8 experts are chosen per token.
    """
    moe = active < 0.8 * total
    if moe:
        layers = max(8, round(45 * (active / 10e9) ** 0.2))
    else:
        layers = max(8, round(32 * (total / 8e9) ** 0.36))
    body = 0.4 * active if moe else total
    hidden = max(256, 128 * round(math.sqrt(active / layers / 11.0) / 128))
    tensors = [TensorCount("ffn_up", "dense", i, round(0.9 * body / layers)) for i in range(layers)]
    tensors.append(TensorCount("head", "head", -1, round(0.1 * body)))
    experts = top_k = 0
    if moe:
        top_k = 8
        routed = total - body
        experts = max(top_k + 1, round(top_k * routed / (active - body)))
        tensors += [
            TensorCount("ffn_up", "routed", i, round(routed / layers)) for i in range(layers)
        ]
    work = hidden
    return ModelShape(
        name=name,
        layers=layers,
        hidden_size=hidden,
        tensors=tuple(tensors),
        attention=(AttentionGroup(layers, 2 * 8 * 128, work, work),),
        experts=experts,
        top_k=top_k,
        moe_layers=layers if moe else 0,
        max_context=131072,
        certain=False,
        source="guessed from total and active parameters",
    )


def totals(shapes: Iterable[ModelShape]) -> dict[str, tuple[int, int]]:
    """Total and active parameters by name, for tables."""
    return {s.name: (s.parameters, s.active_parameters) for s in shapes}

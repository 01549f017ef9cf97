"""Sizes of the models: tensors by kind and layer, attention and experts, as the cost model counts.

Step 3.5 Flash comes tensor by tensor from `refimpl.inventory`. Its neighbours in the published
runs come from the facts in `hwmodel/models/*.json`, and a model that no file knows from its total
and active parameters alone (`shape_from_totals`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any

from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.inventory import TensorSpec, inventory


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

    `kv_values` is what one token adds to the cache of one layer (2 x KV heads x head_dim, or the
    latent of MLA); `qk_values` and `pv_values` are the multiply-adds per query, layer and visible
    key of QK and PV; `window` counts visible keys, None for all earlier ones, 0 for linear
    attention, which reads `state_values` per token instead.
    """

    layers: int
    kv_values: int
    qk_values: int
    pv_values: int
    window: int | None = None
    state_values: int = 0


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What the cost model knows of a model.

    `certain` is False where the shape was guessed from totals. `tensors` holds the trunk and,
    marked `mtp`, the layers for speculative decoding. `released` is the month in which engines
    began to support the architecture; `query_heads` lists the numbers that occur,
    `kinds` the kinds of attention (`gqa`, `mla`, `linear`).
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


def shape_of_config(config: ModelConfig, name: str = "step-3.5-flash") -> ModelShape:
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
    for s in config.trunk:
        values = s.num_attention_groups * s.head_dim
        work = s.num_attention_heads * s.head_dim
        key = (2 * values, work, work, s.window)
        groups[key] = groups.get(key, 0) + 1
    attention = tuple(AttentionGroup(n, *key) for key, n in groups.items())
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
        source="refimpl.inventory",
        released="2026-02",
        query_heads=tuple(sorted({s.num_attention_heads for s in config.trunk})),
        expert_width=config.moe_intermediate_size if config.moe_layers else 0,
    )


@cache
def step_shape() -> ModelShape:
    """Step 3.5 Flash as published (the text model of Step 3.7 Flash is the same)."""
    from refimpl.config import published

    return shape_of_config(published())


@cache
def _facts() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(resources.files("hwmodel").joinpath("models").iterdir(), key=str):
        if entry.name.endswith(".json"):
            for item in json.loads(entry.read_text(encoding="utf-8"))["models"]:
                found[item["name"]] = item
    return found


def model_names() -> tuple[str, ...]:
    """Canonical names of all models whose shape is known."""
    return ("step-3.5-flash", "step-3.7-flash", *_facts())


def model_aliases() -> dict[str, str]:
    """Other spellings found in model cards and runs, each with its canonical name."""
    return {a: item["name"] for item in _facts().values() for a in item.get("aliases", ())}


def _key(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


@cache
def _by_key() -> dict[str, str]:
    found = {_key(alias): name for alias, name in model_aliases().items()}
    return found | {_key(name): name for name in model_names()}


@cache
def load_model(name: str) -> ModelShape:
    """The shape of a model by name or by any spelling listed with its facts.

    Raises:
        InputError: no such model; the message lists the nearest names.
    """
    known = _by_key().get(_key(name))
    if known in ("step-3.5-flash", "step-3.7-flash"):
        return step_shape()
    facts = _facts().get(known or "")
    if facts is None:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, model_names(), n=4, cutoff=0.2))
        raise InputError(f"model '{name}' is not known; nearest: {near or 'step-3.5-flash'}")
    return shape_of_facts(facts)


def shape_of_facts(facts: Mapping[str, Any]) -> ModelShape:
    """The shape of a model described as in `hwmodel/models/*.json` (format: models/README)."""
    hidden, layers = facts["hidden_size"], facts["layers"]
    moe = facts.get("moe")
    tensors = [TensorCount("embedding", "embedding", -1, facts["vocab_size"] * hidden)]
    if not facts.get("tied_embedding"):
        tensors.append(TensorCount("head", "head", -1, facts["vocab_size"] * hidden))
    attention: list[AttentionGroup] = []
    layer = 0
    for group in facts["attention"]:
        attention.append(_attention_group(group))
        for _ in range(group["layers"]):
            tensors += _attention_tensors(group, hidden, layer % layers)
            layer += 1
    tensors += _ffn_tensors(facts, hidden, layers)
    tensors.append(TensorCount("norm", "norm", -1, (2 * layers + 1) * hidden))
    first = facts["attention"][0]
    return ModelShape(
        name=facts["name"],
        layers=layers,
        hidden_size=hidden,
        tensors=tuple(tensors),
        attention=tuple(attention),
        experts=moe["experts"] if moe else 0,
        top_k=moe["top_k"] if moe else 0,
        moe_layers=moe["layers"] if moe else 0,
        gqa=max(1, first.get("query_heads", 8) // max(1, first.get("kv_heads", 1))),
        max_context=facts.get("max_context", 131072),
        tied_embedding=bool(facts.get("tied_embedding")),
        source=facts.get("source", ""),
        released=facts.get("released", ""),
        query_heads=tuple(
            sorted({g["query_heads"] for g in facts["attention"] if "query_heads" in g})
        ),
        expert_width=moe["width"] if moe else 0,
        kinds=tuple(dict.fromkeys(g["type"] for g in facts["attention"])),
    )


def _attention_group(g: Mapping[str, Any]) -> AttentionGroup:
    if g["type"] == "linear":
        return AttentionGroup(g["layers"], 0, 0, 0, 0, state_values=g.get("state_values", 0))
    if g["type"] == "mla":
        work_qk = g["query_heads"] * g["latent"]
        work_pv = g["query_heads"] * g["latent"]
        return AttentionGroup(g["layers"], g["latent"], work_qk, work_pv, g.get("window"))
    d = g["head_dim"]
    work = g.get("work_values", g["query_heads"] * d)
    values = g.get("kv_values", 2 * g["kv_heads"] * d)
    return AttentionGroup(g["layers"], values, work, work, g.get("window"))


def _attention_tensors(g: Mapping[str, Any], hidden: int, layer: int) -> list[TensorCount]:
    if "parameters" in g:
        return [TensorCount("attn_other", "attention", layer, g["parameters"])]
    q, kv = g["query_heads"] * g["head_dim"], g["kv_heads"] * g["head_dim"]
    gated = 2 if g.get("gated") else 1
    return [
        TensorCount("attn_q", "attention", layer, hidden * q * gated),
        TensorCount("attn_k", "attention", layer, hidden * kv),
        TensorCount("attn_v", "attention", layer, hidden * kv),
        TensorCount("attn_o", "attention", layer, hidden * q),
    ]


def _ffn_tensors(facts: Mapping[str, Any], hidden: int, layers: int) -> list[TensorCount]:
    found: list[TensorCount] = []
    moe, dense = facts.get("moe"), facts.get("dense")
    gated = facts.get("ffn_matrices", 3) == 3

    def triple(role: str, layer: int, elements: int) -> list[TensorCount]:
        kinds = ("ffn_gate", "ffn_up", "ffn_down") if gated else ("ffn_up", "ffn_down")
        return [TensorCount(kind, role, layer, elements) for kind in kinds]

    if dense:
        for layer in range(dense["layers"]):
            found += triple("dense", layer, hidden * dense["width"])
    if moe:
        start = max(0, layers - moe["layers"])
        for layer in range(start, start + moe["layers"]):
            found.append(TensorCount("router", "router", layer, hidden * moe["experts"]))
            found += triple("routed", layer, moe["experts"] * hidden * moe["width"])
            if moe.get("shared_width"):
                found += triple("shared", layer, hidden * moe["shared_width"])
    return found


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

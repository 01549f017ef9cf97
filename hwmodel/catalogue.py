"""The models by name, and the shape of a model described by its facts.

Facts are a JSON object (one for each neighbour of Step 3.5 Flash in `hwmodel/models/*.json`, or as
`hwmodel.hf_config` reads them from a `config.json`): the sizes of a decoder in the spelling of
`shape_of_facts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hwmodel.errors import UnknownNameError
from hwmodel.model import AttentionGroup, ModelShape, TensorCount, step_shape

STEP_NAMES = ("step-3.5-flash", "step-3.7-flash")


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
    return (*STEP_NAMES, *_facts())


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
        UnknownNameError: no such model; the message lists the nearest names.
    """
    known = _by_key().get(_key(name))
    if known in STEP_NAMES:
        return step_shape()
    facts = _facts().get(known or "")
    if facts is None:
        import difflib

        near = difflib.get_close_matches(name.lower(), model_names(), n=3, cutoff=0.4)
        raise UnknownNameError("model", name, tuple(near))
    return shape_of_facts(facts)


def find_model(text: str) -> ModelShape:
    """The shape of a model by name, by its `config.json` (or the folder of one), or by GGUF file.

    Raises:
        UnknownNameError: neither a known name nor a file.
        RequestError, ConfigError, CheckpointError: the file cannot be used.
    """
    path = Path(text)
    if _by_key().get(_key(text)) is None and (path.exists() or "/" in text or path.suffix):
        from hwmodel.hf_config import read_model

        return read_model(path)
    return load_model(text)


def shape_of_facts(facts: Mapping[str, Any]) -> ModelShape:
    """The shape of a model from its facts.

    Keys: `name`, `hidden_size`, `vocab_size`, `layers`, `attention` (groups of layers, see
    `_attention_groups`), `dense` (`layers`, `width`), `moe` (`layers`, `experts`, `top_k`,
    `width`, `shared_width`), `mtp` (`layers`, and `width` of a dense layer where it is none of
    experts), `residual` (parameters of hyper-connections per layer), `ngram` (`rows` and `width` of
    a table looked up by n-grams, `parameters` of what projects its rows), `tied_embedding`,
    `ffn_matrices` (3, or 2 without a gate), `max_context`, `source`.
    """
    hidden, layers = facts["hidden_size"], facts["layers"]
    moe = facts.get("moe")
    tensors = [TensorCount("embedding", "embedding", -1, facts["vocab_size"] * hidden)]
    if not facts.get("tied_embedding"):
        tensors.append(TensorCount("head", "head", -1, facts["vocab_size"] * hidden))
    attention: list[AttentionGroup] = []
    layer = 0
    for group in facts["attention"]:
        attention += _attention_groups(group)
        for _ in range(group["layers"]):
            tensors += _attention_tensors(group, hidden, layer % layers)
            layer += 1
    tensors += _ffn_tensors(facts, hidden, layers)
    tensors += _beside_the_layers(facts, layers)
    tensors.append(TensorCount("norm", "norm", -1, (2 * layers + 1) * hidden))
    tensors += _mtp_tensors(facts, hidden, layers)
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
        mtp_layers=facts.get("mtp", {}).get("layers", 0),
        source=facts.get("source", ""),
        released=facts.get("released", ""),
        query_heads=tuple(
            sorted({g["query_heads"] for g in facts["attention"] if "query_heads" in g})
        ),
        expert_width=moe["width"] if moe else 0,
        kinds=tuple(dict.fromkeys(g["type"] for g in facts["attention"])),
    )


def _attention_groups(g: Mapping[str, Any]) -> Iterable[AttentionGroup]:
    """What a group of layers caches and multiplies.

    `gqa`: `query_heads`, `kv_heads`, `head_dim` (and `value_dim` where it differs), `window`.
    `mla`: `query_heads`, `kv_lora`, `rope` (the latent of both is what is cached, and with the
    absorbed form each query head meets it whole). `compressed` (DeepSeek-V4): one vector of
    `head_dim` is key and value of all heads, the latest `window` as they are, earlier ones `ratio`
    to an entry. `linear`: `state_values`. An `indexer` (`heads`, `dim`, `top_k` entries, and
    `compress` where its own keys are pooled) is a small second attention that scores every entry;
    the `top_k` best are read.
    """
    n, index = g["layers"], g.get("indexer")
    pooled = index.get("compress", 1) if index else 1
    if g["type"] == "linear":
        yield AttentionGroup(n, 0, 0, 0, 0, state_values=g.get("state_values", 0))
        return
    window = index["top_k"] if index else g.get("window")
    if g["type"] == "mla":
        heads, latent = g["query_heads"], g["kv_lora"] + g["rope"]
        work = heads * latent, heads * g["kv_lora"]
        own = heads * (g["nope"] + g["rope"]), heads * g["value_dim"]
        yield AttentionGroup(
            n, latent, *work, window, selected=bool(index), kv_heads=1,
            unfolded=None if index else own,
        )  # fmt: skip
    elif g["type"] == "compressed":
        d, ratio = g["head_dim"], g["ratio"]
        work = g["query_heads"] * d, g["query_heads"] * d
        yield AttentionGroup(n, d, *work, g["window"], kv_heads=1)
        if ratio:
            reach = index["top_k"] * ratio if index else None
            yield AttentionGroup(
                n, d, *work, reach, selected=bool(index), compress=ratio, kv_heads=1
            )
            pooled = ratio
    else:
        d, kv = g["head_dim"], g["kv_heads"]
        v = g.get("value_dim", d)
        work = g["query_heads"] * d, g["query_heads"] * v
        yield AttentionGroup(n, kv * (d + v), *work, window, selected=bool(index), kv_heads=kv)
    if index:
        work = index["heads"] * index["dim"], 0
        yield AttentionGroup(
            n, index["dim"], *work, None, compress=pooled, kv_heads=1, indexer=True
        )


def _attention_tensors(g: Mapping[str, Any], hidden: int, layer: int) -> list[TensorCount]:
    """The matrices of one layer: stated as a total (`parameters`), or from the group's sizes."""

    def of(kind: str, elements: int) -> TensorCount:
        return TensorCount(kind, "attention", layer, elements)

    if "parameters" in g:
        return [of("attn_other", g["parameters"])]
    if g["type"] in _MATRICES:
        return [of(kind, elements) for kind, elements in _MATRICES[g["type"]](g, hidden)]
    index = g.get("indexer")
    scoring = hidden * index["dim"] * (index["heads"] + 1) if index else 0
    d, heads, kv = g["head_dim"], g["query_heads"], g["kv_heads"]
    v = g.get("value_dim", d)
    return [
        of("attn_q", hidden * heads * d * (2 if g.get("gated") else 1)),
        of("attn_k", hidden * kv * d),
        of("attn_v", hidden * kv * v),
        of("attn_o", hidden * heads * v),
        *([of("attn_other", scoring)] if scoring else []),
    ]


def _mla_matrices(g: Mapping[str, Any], hidden: int) -> list[tuple[str, int]]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) and the indexer of V3.2."""
    heads, low, kv = g["query_heads"], g.get("q_lora", 0), g["kv_lora"]
    query = heads * (g["nope"] + g["rope"])
    found = [("attn_q", hidden * low + low * query if low else hidden * query)]
    found += [
        ("attn_k", hidden * (kv + g["rope"])),
        ("attn_other", kv * heads * (g["nope"] + g["value_dim"])),
        ("attn_o", heads * g["value_dim"] * hidden),
    ]
    if index := g.get("indexer"):
        size = low * index["heads"] * index["dim"] + hidden * (index["dim"] + index["heads"])
        found.append(("attn_other", size))
    return found


def _compressed_matrices(g: Mapping[str, Any], hidden: int) -> list[tuple[str, int]]:
    """DeepSeek-V4: low-rank queries, one key-value vector, an output projected in groups, and
    what pools `ratio` tokens; a pool that an indexer reads overlaps the one before it, which takes
    two vectors a token (transformers 5.23, models/deepseek_v4)."""
    heads, d, low, ratio = g["query_heads"], g["head_dim"], g["q_lora"], g["ratio"]
    index = g.get("indexer")
    series = 2 if index else 1
    other = series * d * (2 * hidden + ratio) if ratio else 0
    if index:
        other += 2 * index["dim"] * (2 * hidden + ratio)
        other += low * index["heads"] * index["dim"] + hidden * index["heads"]
    found = [
        ("attn_q", hidden * low + low * heads * d),
        ("attn_k", hidden * d),
        ("attn_o", g["o_lora"] * (heads * d + g["o_groups"] * hidden)),
    ]
    return [*found, ("attn_other", other)] if other else found


_MATRICES = {"mla": _mla_matrices, "compressed": _compressed_matrices}


def _beside_the_layers(facts: Mapping[str, Any], layers: int) -> list[TensorCount]:
    """Hyper-connections, which every token passes, and n-gram tables, of which it reads rows."""
    found = []
    if residual := facts.get("residual"):
        found += [TensorCount("other", "residual", layer, residual) for layer in range(layers)]
    if ngram := facts.get("ngram"):
        found.append(TensorCount("table", "embedding", -1, ngram["rows"] * ngram["width"]))
        found.append(TensorCount("other", "dense", 0, ngram["parameters"]))
    return found


def _ffn_tensors(facts: Mapping[str, Any], hidden: int, layers: int) -> list[TensorCount]:
    found: list[TensorCount] = []
    moe, dense = facts.get("moe"), facts.get("dense")
    gated = facts.get("ffn_matrices", 3) == 3
    if dense:
        for layer in range(dense["layers"]):
            found += _triple("dense", layer, hidden * dense["width"], gated)
    if moe:
        start = max(0, layers - moe["layers"])
        for layer in range(start, start + moe["layers"]):
            found += _expert_tensors(moe, hidden, layer, gated)
    return found


def _triple(role: str, layer: int, elements: int, gated: bool) -> list[TensorCount]:
    kinds = ("ffn_gate", "ffn_up", "ffn_down") if gated else ("ffn_up", "ffn_down")
    return [TensorCount(kind, role, layer, elements) for kind in kinds]


def _expert_tensors(
    moe: Mapping[str, Any], hidden: int, layer: int, gated: bool
) -> list[TensorCount]:
    found = [TensorCount("router", "router", layer, hidden * moe["experts"])]
    found += _triple("routed", layer, moe["experts"] * hidden * moe["width"], gated)
    if moe.get("shared_width"):
        found += _triple("shared", layer, hidden * moe["shared_width"], gated)
    return found


def _mtp_tensors(facts: Mapping[str, Any], hidden: int, layers: int) -> list[TensorCount]:
    """The layers that draft: a projection of two hidden states, attention, and a network of
    experts or, with `width`, a dense one; embedding and head are the trunk's (DeepSeek-V3,
    arXiv 2412.19437, section 2.2)."""
    mtp = facts.get("mtp")
    if not mtp:
        return []
    group = next((g for g in reversed(facts["attention"]) if g["type"] != "linear"), None)
    found: list[TensorCount] = []
    for layer in range(layers, layers + mtp["layers"]):
        own = [TensorCount("other", "mtp", layer, 2 * hidden * hidden)]
        if group is not None:
            own += _attention_tensors(group, hidden, layer)
        if "width" in mtp:
            own += _triple("dense", layer, hidden * mtp["width"], True)
        elif facts.get("moe"):
            own += _expert_tensors(facts["moe"], hidden, layer, True)
        found += [TensorCount(t.kind, t.role, t.layer, t.elements, mtp=True) for t in own]
    return found

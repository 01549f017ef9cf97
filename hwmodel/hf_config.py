"""Sizes of any decoder from its Hugging Face `config.json`: dense, GQA, MLA, sliding windows, MoE.

The file becomes the facts of `hwmodel.catalogue.shape_of_facts`. Read by field, not by a list of
models, so that a new model in the spelling of a known family works; what a family leaves to its
code (a default that the file does not state) is in the tables below with the family's
`model_type`. Field names as in transformers 5.23, whose modules the totals are tested against.
What cannot be counted from its fields is refused by name instead of being guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodel.catalogue import shape_of_facts
from hwmodel.errors import RequestError
from hwmodel.model import ModelShape, shape_of_config

Fields = Mapping[str, Any]

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTH = (
    "shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size",
)  # fmt: skip
MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Families whose head is the embedding table unless the file says otherwise.
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2")
# Families without a gate in the feed-forward network.
UNGATED = ("nemotron", "starcoder2", "gpt_neox", "phi", "falcon", "gpt2", "gpt_bigcode", "opt")
# Families whose query projection also makes a gate for the attention output.
GATED_QUERY = (
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe", "qwen4_exp_text",
    "qwen4_exp",
)  # fmt: skip
# Families in which `sliding_window` means every layer, and those in which it means nothing.
ALL_SLIDING = ("mistral", "phi3", "starcoder2")
NO_SLIDING = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "minimax_m2", "glm4_moe")
# Grouped key/value heads of sliding layers that only the family's code states.
SLIDING_KV_HEADS = {"mimo_v2_flash": 8}
MAX_LAYERS = 4096
MAX_PARAMETERS = 1e14
# Families that encode texts, pictures or speech, with the fields that give others of them away.
ENCODERS = (
    "albert", "bart", "bert", "camembert", "clip", "convbert", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "longformer", "modernbert", "mpnet", "nomic_bert", "roberta",
    "siglip", "t5", "umt5", "mt5", "vit", "wav2vec2", "whisper", "xlm-roberta",
)  # fmt: skip


def read_model(path: Path) -> ModelShape:
    """The shape of the model in a `config.json`, in the folder of one, or in a GGUF file.

    Raises:
        RequestError: no such file, or sizes that cannot be counted.
        ConfigError, CheckpointError: Step's own configuration or a GGUF file is not valid.
    """
    from refimpl.config_io import MODEL_TYPES, from_hf, read_config_json

    if path.suffix == ".gguf":
        from hwmodel.weights_file import read_weights

        return read_weights(path)[0]
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise RequestError(f"--model {path}: no such model or file; expected a name, a config.json")
    data = read_config_json(file)
    if data.get("model_type") in MODEL_TYPES:
        return shape_of_config(from_hf(data), path.stem if path.is_file() else path.name)
    name = path.name if path.is_dir() else path.parent.name or path.stem
    shape = shape_of_facts(facts_of(data, name or "model", str(file)))
    if shape.parameters > MAX_PARAMETERS:
        raise RequestError(
            f"config.json of {name}: its sizes make {shape.parameters:.2g} parameters, expected "
            f"{MAX_PARAMETERS:.0e} at most"
        )
    return shape


def facts_of(data: Fields, name: str, source: str = "config.json") -> dict[str, Any]:
    """The facts of `hwmodel.catalogue.shape_of_facts` from a parsed `config.json`.

    Raises:
        RequestError: a field is missing, not a number, or of an architecture not known here.
    """
    nested = data.get("text_config")
    f = _Reader({**data, **nested} if isinstance(nested, Mapping) else data, name)
    if f.family in ENCODERS or f.get("is_encoder_decoder") is True or f.has("type_vocab_size"):
        raise f.refused(f"model_type {f.family!r:.40} is an encoder, expected a decoder")
    layers = f.size("num_hidden_layers", high=MAX_LAYERS)
    compressed = f.family == "deepseek_v4"
    kinds = [] if compressed else _layer_kinds(f, layers)
    facts: dict[str, Any] = {
        "name": name,
        "hidden_size": f.size("hidden_size"),
        "vocab_size": f.size("vocab_size"),
        "layers": layers,
        "attention": _compressed(f, layers) if compressed else _attention(f, kinds),
        "max_context": f.size("max_position_embeddings", "model_max_length", default=131072),
        "tied_embedding": bool(f.get("tie_word_embeddings", f.family in TIED)),
        "ffn_matrices": 2 if f.family in UNGATED else 3,
        "source": source,
    }
    moe = _moe_layers(f, layers)
    if len(moe) < layers:
        width = f.size(
            "intermediate_size_mlp", "dense_intermediate_size", "intermediate_size",
            "ffn_hidden_size",
        )  # fmt: skip
        facts["dense"] = {"layers": layers - len(moe), "width": width}
    if moe:
        facts["moe"] = _moe(f, len(moe))
    if mtp := f.size(*MTP_LAYERS, default=0, low=0):
        facts["mtp"] = {"layers": min(mtp, MAX_LAYERS)}
    return facts | _beside_the_layers(f)


class _Reader:
    """Fields of one `config.json`, checked when they are asked for."""

    def __init__(self, data: Fields, name: str) -> None:
        self.data, self.name = data, name
        self.family = str(data.get("model_type", ""))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def has(self, *keys: str) -> bool:
        return any(self.data.get(k) is not None for k in keys)

    def size(
        self, *keys: str, default: int | None = None, low: int = 1, high: int = 1 << 32
    ) -> int:
        """The first of `keys` that is there, a whole number from `low` to `high`."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise self.refused(f"{key} is {value!r:.60}, expected {low} to {high}")
            return value
        if default is None:
            raise self.refused(f"{' or '.join(keys)} is missing")
        return default

    def per_layer(self, key: str, layers: int) -> Sequence[Any] | None:
        """A list with an entry for each layer (more are cut off: those of MTP layers)."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers:
            raise self.refused(f"{key} is no list of {layers} entries")
        return value[:layers]

    def refused(self, why: str) -> RequestError:
        return RequestError(f"config.json of {self.name}: {why}")


_KINDS = {
    "full_attention": "full", "indexed_attention": "full", "global": "full",
    "sliding_attention": "sliding", "local": "sliding", "chunked_attention": "sliding",
    "linear_attention": "linear", "minimax_m3_sparse": "sparse",
}  # fmt: skip


def _layer_kinds(f: _Reader, layers: int) -> list[str]:
    """Full, sparse, sliding or linear attention of each layer."""
    sparse = f.get("sparse_attention_config", {})
    marks = sparse.get("sparse_attention_freq") if isinstance(sparse, Mapping) else None
    if isinstance(marks, list) and len(marks) >= layers and not f.has("layer_types"):
        return ["sparse" if mark else "full" for mark in marks[:layers]]
    named = f.per_layer("layer_types", layers)
    if named is not None:
        unknown = sorted({str(n) for n in named} - set(_KINDS))
        if unknown:
            raise f.refused(f"layer_types has {unknown[0]!r}, whose sizes are not known here")
        return [_KINDS[n] for n in named]
    for key in ("layers_block_type", "hybrid_override_pattern", "attn_type_list", "ssm_cfg"):
        pattern = f.get(key)
        if pattern and not (isinstance(pattern, list) and all(p == 1 for p in pattern)):
            raise f.refused(f"{key} mixes in layers whose sizes are not known here")
    pattern = f.per_layer("hybrid_layer_pattern", layers)
    if pattern is not None:
        return ["sliding" if p else "full" for p in pattern]
    if not f.has("sliding_window") or f.family in NO_SLIDING:
        return ["full"] * layers
    if f.family in ALL_SLIDING:
        return ["sliding"] * layers
    every = f.size("sliding_window_pattern", default=2 if f.family == "gemma2" else 0, low=0)
    if every:
        return ["full" if (i + 1) % every == 0 else "sliding" for i in range(layers)]
    raise f.refused("sliding_window is set, but no layer_types says for which layers")


def _attention(f: _Reader, kinds: Sequence[str]) -> list[dict[str, Any]]:
    makers = {"full": _full, "sparse": _sparse, "sliding": _sliding, "linear": _linear}
    return [{**makers[kind](f), "layers": kinds.count(kind)} for kind in makers if kind in kinds]


def _full(f: _Reader) -> dict[str, Any]:
    if f.has("kv_lora_rank"):
        return _mla(f)
    heads = f.size("num_attention_heads")
    d = f.size("head_dim", default=f.size("hidden_size") // heads)
    return _pooled_indexer(f) | {
        "type": "gqa",
        "query_heads": heads,
        "kv_heads": f.size("num_key_value_heads", default=heads),
        "head_dim": d,
        "value_dim": f.size("v_head_dim", default=d),
        "gated": f.family in GATED_QUERY or bool(f.get("attn_output_gate", False)),
    }


def _pooled_indexer(f: _Reader) -> dict[str, Any]:
    """The indexer of Qwen4's full layers: pooled keys, a budget of tokens (Qwen3.8-Flash-Next)."""
    if not f.has("indexer_n_heads"):
        return {}
    return {
        "indexer": {
            "heads": f.size("indexer_n_heads"),
            "dim": f.size("indexer_head_dim"),
            "top_k": f.size("indexer_budget"),
            "compress": f.size("indexer_compress_ratio"),
        }
    }


def _sparse(f: _Reader) -> dict[str, Any]:
    """MiniMax-M3: blocks of keys chosen by an indexer whose own keys are one head."""
    nested = f.get("sparse_attention_config", {})
    own = _Reader({**f.data, **nested} if isinstance(nested, Mapping) else f.data, f.name)
    blocks = own.size("sparse_topk_blocks", "index_topk_blocks")
    return _full(f) | {
        "indexer": {
            "heads": own.size("sparse_num_index_heads", "index_n_heads"),
            "dim": own.size("sparse_index_dim", "index_head_dim"),
            "top_k": blocks * own.size("sparse_block_size", "index_block_size"),
        }
    }


_RATIOS = {
    "sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128,
}  # fmt: skip


def _compressed(f: _Reader, layers: int) -> list[dict[str, Any]]:
    """DeepSeek-V4: a window in every layer and, by layer, earlier tokens pooled `ratio` to one;
    an indexer selects among the pools of 4."""
    ratios = f.per_layer("compress_ratios", layers)
    if ratios is None:
        named = f.per_layer("layer_types", layers) or []
        rates = f.get("compress_rates", {})
        known = {**_RATIOS, **rates} if isinstance(rates, Mapping) else _RATIOS
        ratios = [known.get(str(n)) for n in named]
    bad = [r for r in ratios if isinstance(r, bool) or not isinstance(r, int) or r < 0]
    if bad or not ratios:
        raise f.refused("compress_ratios or layer_types say no ratio for each layer")
    own = {
        "type": "compressed",
        "query_heads": f.size("num_attention_heads"),
        "head_dim": f.size("head_dim"),
        "q_lora": f.size("q_lora_rank"),
        "window": f.size("sliding_window"),
        "o_groups": f.size("o_groups"),
        "o_lora": f.size("o_lora_rank"),
    }
    found = []
    for ratio in sorted(set(ratios)):
        group = {**own, "ratio": ratio, "layers": ratios.count(ratio)}
        if ratio == min((r for r in ratios if r), default=0) and f.has("index_topk"):
            group |= _indexer(f)
        found.append(group)
    return found


def _indexer(f: _Reader) -> dict[str, Any]:
    return {
        "indexer": {
            "heads": f.size("index_n_heads"),
            "dim": f.size("index_head_dim"),
            "top_k": f.size("index_topk"),
        }
    }


def _beside_the_layers(f: _Reader) -> dict[str, Any]:
    """Hyper-connections of DeepSeek-V4 and Qwen4, and Qwen4's table of n-grams."""
    found: dict[str, Any] = {}
    hidden = f.size("hidden_size")
    if f.has("hc_mult"):
        n = f.size("hc_mult", high=64)
        found["residual"] = 2 * n * (n + 2) * n * hidden
    elif f.has("hc_count"):
        n = f.size("hc_count", high=64)
        found["residual"] = 2 * n * hidden * (2 * f.size("hc_lowrank") + n)
    if ids := f.get("ple_layer_ids"):
        if not isinstance(ids, list):
            raise f.refused(f"ple_layer_ids is {ids!r:.60}, expected a list of layers")
        heads = f.size("heads_per_ngram") * (f.size("ngram_size", low=2) - 1)
        width, n = f.size("ple_embed_dim", default=hidden), f.size("hc_count")
        found["ngram"] = {
            "rows": heads * f.size("ngram_vocab_size_base"),
            "width": width // heads,
            "parameters": len(ids) * width * hidden * (n + 1),
        }
    return found


def _sliding(f: _Reader) -> dict[str, Any]:
    """As full attention, with the window and with what `swa_` fields say otherwise."""
    own = _full(f)
    for key, field in (
        ("query_heads", "swa_num_attention_heads"),
        ("kv_heads", "swa_num_key_value_heads"),
        ("head_dim", "swa_head_dim"),
        ("value_dim", "swa_v_head_dim"),
    ):
        if key in own:
            own[key] = f.size(field, default=own[key])
    if not f.has("swa_num_key_value_heads") and f.family in SLIDING_KV_HEADS:
        own["kv_heads"] = SLIDING_KV_HEADS[f.family]
    own["window"] = f.size("sliding_window_size", "sliding_window", "attention_chunk_size")
    return own


def _mla(f: _Reader) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "mla",
        "query_heads": f.size("num_attention_heads"),
        "q_lora": f.size("q_lora_rank", default=0),
        "kv_lora": f.size("kv_lora_rank"),
        "nope": f.size("qk_nope_head_dim"),
        "rope": f.size("qk_rope_head_dim"),
        "value_dim": f.size("v_head_dim"),
    }
    return found | _indexer(f) if f.has("index_topk") else found


def _linear(f: _Reader) -> dict[str, Any]:
    """Gated delta networks (Qwen3-Next): projections, convolution, and the state they carry."""
    if not f.has("linear_num_value_heads"):
        raise f.refused("its linear attention is of a kind whose sizes are not known here")
    hidden = f.size("hidden_size")
    key_dim, value_dim = f.size("linear_key_head_dim"), f.size("linear_value_head_dim")
    values = f.size("linear_num_value_heads")
    keys = f.size("linear_num_key_heads") * key_dim
    wide = values * value_dim
    kernel = f.size("linear_conv_kernel_dim", default=4)
    projections = hidden * (2 * keys + 2 * wide) + hidden * 2 * values + wide * hidden
    return {
        "type": "linear",
        "parameters": projections + kernel * (2 * keys + wide),
        "state_values": values * key_dim * value_dim,
    }


def _moe_layers(f: _Reader, layers: int) -> list[int]:
    """Indices of the layers with experts."""
    experts = f.size(*EXPERTS, default=0, low=0)
    if experts <= 1:
        return []
    if (named := f.per_layer("mlp_layer_types", layers)) is not None:
        return [i for i, kind in enumerate(named) if kind != "dense"]
    if isinstance(f.get("moe_layers"), list):
        return [i for i in f.get("moe_layers") if isinstance(i, int) and 0 <= i < layers]
    if isinstance(f.get("moe_layer_freq"), list):
        marks = f.per_layer("moe_layer_freq", layers) or []
        return [i for i, mark in enumerate(marks) if mark]
    first = f.size("first_k_dense_replace", "moe_layer_start_index", default=0, low=0)
    last = f.size("moe_layer_end_index", default=layers - 1, low=-1)
    last = layers - 1 if last < 0 else min(last, layers - 1)
    step = f.size(
        "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", default=1, high=layers
    )
    dense = f.get("mlp_only_layers", [])
    dense = dense if isinstance(dense, list) else []
    offset = 0 if f.has("moe_layer_freq") else 1
    return [
        i for i in range(first, last + 1) if i not in dense and (i + offset) % step == 0
    ]  # fmt: skip


def _moe(f: _Reader, layers: int) -> dict[str, Any]:
    width = f.size("moe_intermediate_size", "intermediate_size")
    if f.family in ("llama4", "llama4_text"):
        shared = width  # one, always (transformers, Llama4TextMoe)
    else:
        shared = f.size(*SHARED_WIDTH, default=f.size(*SHARED, default=0, low=0) * width, low=0)
    return {
        "layers": layers,
        "experts": f.size(*EXPERTS),
        "top_k": f.size(*TOP_K),
        "width": width,
        "shared_width": shared,
    }

"""GGUF `step35.*` keys to a configuration and back (as llama.cpp's converter writes them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refimpl.config import FULL, SLIDING, ModelConfig
from refimpl.config_io import GGUF_ARCHITECTURE
from refimpl.errors import CheckpointError, ConfigError

_PREFIX = GGUF_ARCHITECTURE + "."
_SIGMOID_GATING = 2


def from_gguf(
    keys: Mapping[str, Any],
    vocab_size: int,
    moe_layers: Sequence[int] | None = None,
    rope_divisors: Sequence[float] | None = None,
) -> ModelConfig:
    """Build a configuration from GGUF metadata.

    Args:
        keys: metadata by full key; arrays as sequences, numbers as Python numbers.
        vocab_size: rows of `token_embd.weight`.
        moe_layers: layers that have a router tensor; None derives them from
            `leading_dense_block_count` and `moe_every_n_layers`.
        rope_divisors: the values of `rope_freqs.weight` (head_dim / 2), or None.

    Raises:
        CheckpointError: the file is of another architecture.
        ConfigError: a key is missing, has the wrong type or contradicts another.
    """
    _check_architecture(keys)
    r = _Keys(keys)
    trunk, mtp = _layers(r)
    blocks = trunk + mtp
    sliding = r.per_layer("attention.sliding_window_pattern", blocks)
    heads = r.integers("attention.head_count", blocks)
    kinds = [SLIDING if s else FULL for s in sliding]
    _require_sigmoid_gating(r)
    base = r.number("rope.freq_base", 10000.0)
    base_swa = r.number("rope.freq_base_swa", base)
    if moe_layers is None:
        moe_layers = _stated_moe_layers(r, trunk)
    return ModelConfig(
        hidden_size=r.integer("embedding_length"),
        intermediate_size=r.integer("feed_forward_length"),
        num_hidden_layers=trunk,
        num_nextn_predict_layers=mtp,
        vocab_size=vocab_size,
        num_attention_heads=_heads_of(heads, kinds, FULL),
        num_attention_groups=_groups(r, blocks),
        head_dim=_head_dim(r),
        sliding_attention_heads=_heads_of(heads, kinds, SLIDING),
        sliding_window=r.integer("attention.sliding_window"),
        layer_types=tuple(kinds),  # type: ignore[arg-type]
        rope_theta=tuple(base if k == FULL else base_swa for k in kinds),
        partial_rotary_factors=tuple(0.5 if k == FULL else 1.0 for k in kinds),
        rope_divisors=None if rope_divisors is None else tuple(float(d) for d in rope_divisors),
        moe_layers=tuple(moe_layers),
        moe_num_experts=r.integer("expert_count", 0),
        moe_top_k=r.integer("expert_used_count", 0),
        moe_intermediate_size=r.integer("expert_feed_forward_length", 0),
        share_expert_dim=r.integer("expert_shared_feed_forward_length", 0),
        moe_router_scaling_factor=r.number("expert_weights_scale", 1.0),
        swiglu_limits=_limits(r, "swiglu_clamp_exp", blocks),
        swiglu_limits_shared=_limits(r, "swiglu_clamp_shexp", blocks),
        max_position_embeddings=r.integer("context_length"),
        rms_norm_eps=r.number("attention.layer_norm_rms_epsilon", 1e-5),
        bos_token_id=_token(keys, "tokenizer.ggml.bos_token_id", vocab_size),
        eos_token_id=_stop_tokens(keys, vocab_size),
    )


def _check_architecture(keys: Mapping[str, Any]) -> None:
    found = keys.get("general.architecture")
    if not isinstance(found, str) or found != GGUF_ARCHITECTURE:
        raise CheckpointError(
            f"general.architecture is {found!r}, expected '{GGUF_ARCHITECTURE}' "
            "(Step 3.5 / 3.7 Flash)"
        )


def _layers(r: _Keys) -> tuple[int, int]:
    """Layers of the trunk, and MTP layers behind them."""
    blocks, mtp = r.integer("block_count"), r.integer("nextn_predict_layers", 0)
    if not 0 < blocks - mtp <= 4096 or not 0 <= mtp <= 64:
        problem = f"is {blocks} with nextn_predict_layers {mtp}"
        raise ConfigError(_PREFIX + "block_count", problem)
    return blocks - mtp, mtp


def _require_sigmoid_gating(r: _Keys) -> None:
    if r.integer("expert_gating_func", _SIGMOID_GATING) != _SIGMOID_GATING:
        raise ConfigError(_PREFIX + "expert_gating_func", "is not 2 (sigmoid)")


def _groups(r: _Keys, blocks: int) -> int:
    """KV heads, of which every layer has the same number."""
    found = set(r.integers("attention.head_count_kv", blocks))
    if len(found) != 1:
        raise ConfigError(_PREFIX + "attention.head_count_kv", "differs between layers")
    return found.pop()


def _limits(r: _Keys, name: str, blocks: int) -> tuple[float, ...]:
    return tuple(float(v) for v in r.per_layer(name, blocks, 0.0))


def _head_dim(r: _Keys) -> int:
    keys = r.integer("attention.key_length")
    if r.integer("attention.value_length", keys) != keys:
        raise ConfigError(_PREFIX + "attention.value_length", "differs from key_length")
    return keys


def _stated_moe_layers(r: _Keys, trunk: int) -> Sequence[int]:
    first = r.integer("leading_dense_block_count", 0)
    step = max(1, r.integer("moe_every_n_layers", 1))
    return range(first, trunk, step) if r.integer("expert_count", 0) else ()


def to_gguf(c: ModelConfig) -> dict[str, Any]:
    """The `step35.*` keys of a configuration, in the order llama.cpp's converter writes them.

    Values are int (uint32), float (float32), bool, or lists of these. `rope_scaling` has no key:
    it travels as the tensor `rope_freqs.weight`.

    Raises:
        ConfigError: the configuration cannot be expressed in GGUF for this architecture.
    """
    _check_expressible(c)
    keys: dict[str, Any] = {
        "block_count": c.num_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": [s.num_attention_heads for s in c.layers],
        "attention.head_count_kv": [s.num_attention_groups for s in c.layers],
        "rope.freq_base": _theta(c, FULL),
        "rope.freq_base_swa": _theta(c, SLIDING),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "expert_count": c.moe_num_experts,
        "expert_used_count": c.moe_top_k,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.sliding_window": c.sliding_window,
        "attention.sliding_window_pattern": [s.window is not None for s in c.layers],
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.share_expert_dim,
        "expert_gating_func": _SIGMOID_GATING,
        "expert_weights_scale": float(c.moe_router_scaling_factor),
        "expert_weights_norm": True,
        "leading_dense_block_count": c.moe_layers[0] if c.moe_layers else c.num_hidden_layers,
        "moe_every_n_layers": 1,
        "swiglu_clamp_exp": [float(v) for v in c.swiglu_limits],
        "swiglu_clamp_shexp": [float(v) for v in c.swiglu_limits_shared],
    }
    if c.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = c.num_nextn_predict_layers
    return {_PREFIX + name: value for name, value in keys.items()}


def _check_expressible(c: ModelConfig) -> None:
    for s in c.layers:
        expected = 0.5 if s.kind == FULL else 1.0
        if s.rotary_dim != int(s.head_dim * expected):
            raise ConfigError(
                "partial_rotary_factors",
                f"layer {s.index} rotates {s.rotary_dim} of {s.head_dim} lanes; GGUF "
                f"'{GGUF_ARCHITECTURE}' always means {expected} for {s.kind}",
            )
    for kind in (FULL, SLIDING):
        if len({s.rope_theta for s in c.layers if s.kind == kind}) > 1:
            raise ConfigError("rope_theta", f"differs between {kind} layers; GGUF holds one value")
    if (c.rope_scaling or c.rope_divisors) and c.yarn_only_types != (FULL,):
        raise ConfigError("yarn_only_types", "GGUF scales full-attention layers only")


def _theta(c: ModelConfig, kind: str) -> float:
    return next((s.rope_theta for s in c.layers if s.kind == kind), 10000.0)


def _heads_of(heads: list[int], kinds: list[str], kind: str) -> int:
    found = {h for h, k in zip(heads, kinds, strict=True) if k == kind}
    if len(found) > 1:
        problem = f"differs between {kind} layers: {sorted(found)}"
        raise ConfigError(_PREFIX + "attention.head_count", problem)
    return found.pop() if found else heads[0]


def _token(keys: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    value = keys.get(name)
    ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
    return value if ok else None


def _stop_tokens(keys: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = [_token(keys, name, vocab_size) for name in names]
    return tuple(dict.fromkeys(t for t in found if t is not None))


class _Keys:
    """Typed access to `step35.*` metadata; every refusal names the key."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.keys = keys

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.keys.get(_PREFIX + name)
        if value is None:
            if default is None:
                raise ConfigError(_PREFIX + name, "is missing")
            return default
        if name == "expert_feed_forward_length" and _is_list(value) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(_PREFIX + name, f"is {value!r}, expected an integer")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.keys.get(_PREFIX + name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(_PREFIX + name, f"is {value!r}, expected a number")
        return _shortest_float32(float(value))

    def per_layer(self, name: str, n: int, default: float | None = None) -> list[Any]:
        value = self.keys.get(_PREFIX + name)
        if value is None:
            if default is None:
                raise ConfigError(_PREFIX + name, "is missing")
            return [default] * n
        if not _is_list(value):
            value = [value] * n
        if not all(isinstance(v, (int, float)) for v in value):
            raise ConfigError(_PREFIX + name, "is not an array of numbers")
        if len(value) != n:
            raise ConfigError(_PREFIX + name, f"has {len(value)} entries, expected {n}")
        return list(value)

    def integers(self, name: str, n: int) -> list[int]:
        values = self.per_layer(name, n)
        if not all(float(v).is_integer() for v in values):
            raise ConfigError(_PREFIX + name, f"is {values!r}, expected integers")
        return [int(v) for v in values]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shortest_float32(value: float) -> float:
    """The shortest decimal that a float32 key can stand for (9.99999975e-06 -> 1e-05)."""
    import numpy as np

    return float(str(np.float32(value)))

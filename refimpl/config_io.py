"""Configurations from files and back: Hugging Face `config.json` and GGUF `step35.*` keys.

Sources: config.json fields as published with stepfun-ai/Step-3.5-Flash; GGUF keys as written by
llama.cpp's converter for architecture `step35`. Both readers accept the spellings met in the
wild: per-layer lists with or without entries for the MTP layers, one number instead of a list,
`null` or absent optional fields, Step-3.7's nesting under `text_config`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.config import FULL, SLIDING, ModelConfig, RopeScaling
from refimpl.errors import CheckpointError, ConfigError

MODEL_TYPES = ("step3p5", "step3p7", "step3p7_text")
GGUF_ARCHITECTURE = "step35"
MAX_CONFIG_BYTES = 16 << 20


def load_hf_config(path: Path) -> ModelConfig:
    """Read a `config.json` file.

    Raises:
        CheckpointError: the file is missing, too large or not a JSON object.
        ConfigError: a field is missing, has the wrong type or contradicts another.
    """
    return from_hf(read_config_json(path))


def read_config_json(path: Path) -> dict[str, Any]:
    """The object in a `config.json` file, as it is.

    Raises:
        CheckpointError: the file is missing, too large or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is too large for a config.json")
        data = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no {path.name} in this folder (it cannot be read); expected it beside "
            "model*.safetensors, or the path of a .gguf file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object with the model's configuration")
    return data


def from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Build a configuration from the parsed `config.json`.

    Raises:
        ConfigError: names the field that is missing, of the wrong type, or contradictory.
    """
    fields = _Fields(data)
    model_type = data.get("model_type", "step3p5")
    nested = data.get("text_config")
    if isinstance(nested, Mapping):
        fields = _Fields({**data, **nested})
    elif nested is not None:
        raise ConfigError("text_config", f"is {type(nested).__name__}, expected an object")
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConfigError("model_type", f"is {model_type!r}, this program reads {known}")
    return _from_fields(fields)


def _from_fields(f: _Fields) -> ModelConfig:
    trunk = f.integer("num_hidden_layers")
    mtp = f.integer("num_nextn_predict_layers", 0)
    if not 0 < trunk <= 4096 or not 0 <= mtp <= 64:
        raise ConfigError("num_hidden_layers", f"{trunk} trunk and {mtp} MTP layers is not usable")
    kinds = f.layer_types(trunk, mtp)
    n = trunk + mtp
    other = f.mapping("attention_other_setting") or {}
    groups = f.integer("num_attention_groups")
    head_dim = f.integer("head_dim", 128)
    sliding_heads = _Fields(other).integer("num_attention_heads", f.integer("num_attention_heads"))
    for key, expected in (("num_attention_groups", groups), ("head_dim", head_dim)):
        found = other.get(key, expected)
        if found != expected:
            raise ConfigError(
                f"attention_other_setting.{key}",
                f"is {found!r} but full-attention layers use {expected}; both must be equal",
            )
    _refuse_other_mathematics(f)
    _refuse_other_spelling(f)
    default_factors = [0.5 if k == FULL else 1.0 for k in kinds]
    scaling = f.rope_scaling()
    moe_layers = f.moe_layers(trunk)
    return ModelConfig(
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=trunk,
        num_nextn_predict_layers=mtp,
        vocab_size=f.integer("vocab_size"),
        num_attention_heads=f.integer("num_attention_heads"),
        num_attention_groups=groups,
        head_dim=head_dim,
        sliding_attention_heads=sliding_heads,
        sliding_window=f.integer("sliding_window"),
        layer_types=tuple(kinds),  # type: ignore[arg-type]
        rope_theta=f.per_layer("rope_theta", n, trunk, 10000.0),
        partial_rotary_factors=f.per_layer("partial_rotary_factors", n, trunk, default_factors),
        rope_scaling=scaling,
        yarn_only_types=f.strings("yarn_only_types", [FULL]),
        moe_layers=moe_layers,
        moe_num_experts=f.integer("moe_num_experts", 0),
        moe_top_k=f.integer("moe_top_k", 0),
        moe_intermediate_size=f.integer("moe_intermediate_size", 0),
        share_expert_dim=f.integer("share_expert_dim", f.integer("share_expert_dims", 0)),
        moe_router_scaling_factor=f.number("moe_router_scaling_factor", 1.0),
        swiglu_limits=f.per_layer("swiglu_limits", n, trunk, 0.0),
        swiglu_limits_shared=f.per_layer("swiglu_limits_shared", n, trunk, 0.0),
        max_position_embeddings=f.integer(
            "max_position_embeddings", f.integer("max_seq_len", 262144)
        ),
        rms_norm_eps=f.number("rms_norm_eps", 1e-5),
        bos_token_id=f.optional_integer("bos_token_id"),
        eos_token_id=f.token_ids("eos_token_id"),
        torch_dtype=str(f.data.get("torch_dtype") or f.data.get("dtype") or "bfloat16"),
    )


def _refuse_other_mathematics(f: _Fields) -> None:
    """Refuse settings that ask for arithmetic this model family does not have."""
    fixed: dict[str, Any] = {
        "use_head_wise_attn_gate": True,
        "use_qk_norm": True,
        "zero_centered": True,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "sink": False,
        "att_impl_type": "GQA",
        "tie_word_embeddings": False,
    }
    for key, value in fixed.items():
        found = f.data.get(key)
        if found is not None and found != value:
            raise ConfigError(key, f"is {found!r}; only {value!r} is defined for Step 3.5")


def _refuse_other_spelling(f: _Fields) -> None:
    """Refuse RoPE settings that only transformers' newer spelling holds: defaults would stand in
    for them without a word."""
    lacking = [key for key in ("rope_theta", "rope_scaling") if key not in f.data]
    if f.mapping("rope_parameters") and lacking:
        raise ConfigError(
            "rope_parameters",
            f"replaces {' and '.join(lacking)}, which this program reads; take the config.json "
            "published with the checkpoint",
        )


class _Fields:
    """Typed access to a parsed JSON object; every refusal names the field."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise ConfigError(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(key, f"is {value!r}, expected an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.data.get(key) is None else self.integer(key)

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key)
        return default if value is None else _number(key, value)

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(key, f"is {value!r}, expected an object")
        return value

    def strings(self, key: str, default: list[str]) -> tuple[str, ...]:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(key, f"is {value!r}, expected a list of strings")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.data.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(key, f"is {value!r}, expected a token id or a list of them")
        return tuple(ids)

    def per_layer(
        self, key: str, n: int, trunk: int, default: float | Sequence[float]
    ) -> tuple[float, ...]:
        """A number for each of the `n` layers from a scalar, or a list of `trunk` to `n` entries.

        Entries that a trunk-only list lacks for the MTP layers are those of a sliding layer.
        """
        value = self.data.get(key)
        if value is None:
            value = default
        if not isinstance(value, list):
            if isinstance(value, Sequence) and not isinstance(value, str):
                return tuple(float(v) for v in value)
            return (_number(key, value),) * n
        entries = [0.0 if v is None else _number(key, v) for v in value]
        if len(entries) == trunk and n > trunk:
            entries += [self._mtp_default(key, entries)] * (n - trunk)
        if len(entries) < n:
            raise ConfigError(key, f"has {len(entries)} entries, expected {trunk} or {n}")
        return tuple(entries[:n])

    def _mtp_default(self, key: str, entries: list[float]) -> float:
        if key in ("swiglu_limits", "swiglu_limits_shared"):
            return 0.0
        kinds = self.data.get("layer_types") or []
        sliding = [i for i, kind in enumerate(kinds[: len(entries)]) if kind == SLIDING]
        if sliding:
            return entries[sliding[0]]
        return 1.0 if key == "partial_rotary_factors" else 10000.0

    def layer_types(self, trunk: int, mtp: int) -> list[str]:
        value = self.data.get("layer_types")
        if value is None:
            value = [FULL if i % 4 == 0 else SLIDING for i in range(trunk)]
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError("layer_types", "is not a list of layer type names")
        if len(value) == trunk:
            value = value + [SLIDING] * mtp
        if len(value) < trunk + mtp:
            raise ConfigError(
                "layer_types", f"has {len(value)} entries, expected {trunk} or {trunk + mtp}"
            )
        return list(value[: trunk + mtp])

    def moe_layers(self, trunk: int) -> tuple[int, ...]:
        value = self.data.get("moe_layers_enum")
        if value is None or value == "":
            if self.data.get("use_moe") is False or not self.data.get("moe_num_experts"):
                return ()
            offset = self.integer("moe_layer_offset", 0)
            step = self.integer("moe_every_n_layer", 1)
            if step < 1 or offset < 0:
                raise ConfigError("moe_every_n_layer", f"{step} with offset {offset} is no pattern")
            return tuple(range(offset, trunk, step))
        try:
            if isinstance(value, str):
                return tuple(sorted(int(part) for part in value.split(",")))
            return tuple(sorted(int(part) for part in value))
        except (TypeError, ValueError):
            raise ConfigError(
                "moe_layers_enum", f"is {value!r}, expected layer numbers such as '3,4,5'"
            ) from None

    def rope_scaling(self) -> RopeScaling | None:
        value = self.mapping("rope_scaling")
        if not value:
            return None
        kind = value.get("rope_type") or value.get("type") or "default"
        if kind == "default":
            return None
        f = _Fields(value)
        return RopeScaling(
            rope_type=str(kind),
            factor=f.number("factor", 1.0),
            original_max_position_embeddings=f.integer("original_max_position_embeddings", 131072),
            low_freq_factor=f.number("low_freq_factor", 1.0),
            high_freq_factor=f.number("high_freq_factor", 32.0),
        )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(key, f"has entry {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(key, "has a number too large to represent") from None


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """The `config.json` object of a configuration, in the published spelling."""
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_nextn_predict_layers": c.num_nextn_predict_layers,
        "vocab_size": c.vocab_size,
        "max_seq_len": c.max_position_embeddings,
        "max_position_embeddings": c.max_position_embeddings,
        "torch_dtype": c.torch_dtype,
        "tie_word_embeddings": False,
        "num_attention_heads": c.num_attention_heads,
        "num_attention_groups": c.num_attention_groups,
        "head_dim": c.head_dim,
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": c.sliding_attention_heads,
            "num_attention_groups": c.num_attention_groups,
            "head_dim": c.head_dim,
            "true_head_dim": c.head_dim,
        },
        "sliding_window": c.sliding_window,
        "sink": False,
        "layer_types": list(c.layer_types),
        "rope_theta": list(c.rope_theta),
        "partial_rotary_factors": list(c.partial_rotary_factors),
        "rope_scaling": None if c.rope_scaling is None else dataclasses.asdict(c.rope_scaling),
        "yarn_only_types": list(c.yarn_only_types),
        "use_rope_layers": [],
        "use_moe": bool(c.moe_layers),
        "moe_layers_enum": ",".join(str(i) for i in c.moe_layers),
        "moe_num_experts": c.moe_num_experts,
        "moe_top_k": c.moe_top_k,
        "moe_intermediate_size": c.moe_intermediate_size,
        "share_expert_dim": c.share_expert_dim,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": c.moe_router_scaling_factor,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "swiglu_limits": list(c.swiglu_limits),
        "swiglu_limits_shared": list(c.swiglu_limits_shared),
        "zero_centered": True,
        "rms_norm_eps": c.rms_norm_eps,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_id),
    }

"""The model configuration: what `config.json` says, checked, and one `LayerSpec` per layer.

Fields are named as in the published `config.json` of Step 3.5 Flash. Reading and writing the two
file forms (Hugging Face JSON, GGUF keys) is in `refimpl.config_io`; here a configuration is only
held, checked and asked questions. All arrays over layers have `num_layers` entries: the trunk's
`num_hidden_layers` first, then one per multi-token-prediction (MTP) layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

from refimpl.errors import ConfigError

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
LayerKind = Literal["full_attention", "sliding_attention"]
PER_LAYER_FIELDS = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


@dataclass(frozen=True)
class RopeScaling:
    """llama3-type frequency scaling (`rope_scaling` in config.json); lengths in positions."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float
    rope_type: str = "llama3"


@dataclass(frozen=True)
class LayerSpec:
    """Everything that distinguishes one decoder layer from another.

    `window` counts visible keys including the query itself (None = all earlier positions).
    `rotary_dim` is the number of leading lanes of each head that rotate. A clamp limit of
    infinity means that the SwiGLU of that branch is not clamped.
    """

    index: int
    kind: LayerKind
    is_moe: bool
    is_mtp: bool
    num_attention_heads: int
    num_attention_groups: int
    head_dim: int
    window: int | None
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling | None
    rope_divisors: tuple[float, ...] | None
    swiglu_limit: float
    swiglu_limit_shared: float


@dataclass(frozen=True)
class ModelConfig:
    """A Step 3.5 configuration, fields as in `config.json`.

    `num_attention_heads` belongs to full-attention layers, `sliding_attention_heads` to sliding
    ones (`attention_other_setting.num_attention_heads`). `moe_layers` is `moe_layers_enum` as
    integers. `rope_divisors` replaces `rope_scaling` when a file (GGUF `rope_freqs`) states the
    divisors of the base frequencies directly. A limit of 0 in `swiglu_limits` and
    `swiglu_limits_shared` means no clamp, as in the published file.

    Raises:
        ConfigError: a field contradicts another or is impossible; the message names the field.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_attention_groups: int
    head_dim: int
    sliding_attention_heads: int
    sliding_window: int
    layer_types: tuple[LayerKind, ...]
    rope_theta: tuple[float, ...]
    partial_rotary_factors: tuple[float, ...]
    moe_layers: tuple[int, ...]
    moe_num_experts: int
    moe_top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    moe_router_scaling_factor: float
    swiglu_limits: tuple[float, ...]
    swiglu_limits_shared: tuple[float, ...]
    max_position_embeddings: int
    num_nextn_predict_layers: int = 0
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    yarn_only_types: tuple[str, ...] = (FULL,)
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = field(default=())
    torch_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_layers(self) -> int:
        """Trunk layers plus MTP layers: the length of every per-layer tuple."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One specification per layer, trunk first, MTP layers after it."""
        return tuple(self._layer(i) for i in range(self.num_layers))

    @property
    def trunk(self) -> tuple[LayerSpec, ...]:
        """Specifications of the trunk's layers."""
        return self.layers[: self.num_hidden_layers]

    @property
    def mtp(self) -> tuple[LayerSpec, ...]:
        """Specifications of the MTP layers (empty when the model has none)."""
        return self.layers[self.num_hidden_layers :]

    def without_mtp(self) -> ModelConfig:
        """The same model without its MTP layers, for files that lack them."""
        n = self.num_hidden_layers
        cut = {name: getattr(self, name)[:n] for name in PER_LAYER_FIELDS}
        return dataclasses.replace(self, num_nextn_predict_layers=0, **cut)

    def _layer(self, i: int) -> LayerSpec:
        kind = self.layer_types[i]
        is_mtp = i >= self.num_hidden_layers
        scaled = kind in self.yarn_only_types
        return LayerSpec(
            index=i,
            kind=kind,
            is_moe=i in self.moe_layers,
            is_mtp=is_mtp,
            num_attention_heads=(
                self.num_attention_heads if kind == FULL else self.sliding_attention_heads
            ),
            num_attention_groups=self.num_attention_groups,
            head_dim=self.head_dim,
            window=None if kind == FULL else self.sliding_window,
            rope_theta=self.rope_theta[i],
            rotary_dim=_rotary_dim(self.head_dim, self.partial_rotary_factors[i]),
            rope_scaling=self.rope_scaling if scaled else None,
            rope_divisors=self.rope_divisors if scaled else None,
            swiglu_limit=self.swiglu_limits[i] or math.inf,
            swiglu_limit_shared=self.swiglu_limits_shared[i] or math.inf,
        )


def _rotary_dim(head_dim: int, factor: float) -> int:
    return int(head_dim * factor)


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ConfigError(name, problem)


_MAX_DIMENSION = 1 << 24  # far above any real width; keeps shape products inside 64 bits
_MAX_LAYERS = 4096


def _check(c: ModelConfig) -> None:
    _check_sizes(c)
    _check_per_layer(c)
    _check_attention(c)
    _check_moe(c)
    _check_rope_scaling(c)
    _check_token_ids(c)


def _check_sizes(c: ModelConfig) -> None:
    positive = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "num_attention_groups",
        "head_dim",
        "sliding_attention_heads",
        "sliding_window",
        "max_position_embeddings",
    ]
    for name in positive:
        value = getattr(c, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_DIMENSION,
            name,
            f"is {value!r}, expected an integer between 1 and {_MAX_DIMENSION}",
        )
    for name in ("num_hidden_layers", "num_nextn_predict_layers"):
        value = getattr(c, name)
        _require(
            isinstance(value, int) and 0 <= value <= _MAX_LAYERS,
            name,
            f"is {value!r}, expected at most {_MAX_LAYERS} layers",
        )
    _require(
        math.isfinite(c.rms_norm_eps) and 0 < c.rms_norm_eps < 1,
        "rms_norm_eps",
        f"is {c.rms_norm_eps!r}, expected a small positive number such as 1e-05",
    )


def _check_per_layer(c: ModelConfig) -> None:
    for name in PER_LAYER_FIELDS:
        found = len(getattr(c, name))
        _require(
            found == c.num_layers,
            name,
            f"has {found} entries, expected {c.num_layers} (num_hidden_layers "
            f"{c.num_hidden_layers} + num_nextn_predict_layers {c.num_nextn_predict_layers})",
        )
    for i, kind in enumerate(c.layer_types):
        _require(
            kind in (FULL, SLIDING),
            "layer_types",
            f"entry {i} is {kind!r}, expected '{FULL}' or '{SLIDING}'",
        )
    for i, theta in enumerate(c.rope_theta):
        _require(
            math.isfinite(theta) and theta > 0,
            "rope_theta",
            f"entry {i} is {theta!r}, expected a positive number",
        )
    for i, factor in enumerate(c.partial_rotary_factors):
        lanes = c.head_dim * factor if math.isfinite(factor) else -1.0
        _require(
            0 < factor <= 1 and lanes == int(lanes) and int(lanes) % 2 == 0 and lanes > 0,
            "partial_rotary_factors",
            f"entry {i} is {factor!r}: {factor!r} of head_dim {c.head_dim} "
            "is not an even number of lanes",
        )
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        for i, limit in enumerate(getattr(c, name)):
            _require(
                math.isfinite(limit) and limit >= 0,
                name,
                f"entry {i} is {limit!r}, expected 0 (no clamp) or a positive limit",
            )


def _check_attention(c: ModelConfig) -> None:
    for name in ("num_attention_heads", "sliding_attention_heads"):
        heads = getattr(c, name)
        shown = name if name[0] == "n" else "attention_other_setting.num_attention_heads"
        _require(
            heads % c.num_attention_groups == 0,
            shown,
            f"is {heads}, not a multiple of num_attention_groups {c.num_attention_groups}",
        )


def _check_moe(c: ModelConfig) -> None:
    layers = c.moe_layers
    ordered = all(a < b for a, b in itertools.pairwise(layers))
    _require(ordered, "moe_layers_enum", "lists a layer twice or out of order")
    _require(
        all(0 <= i < c.num_hidden_layers for i in layers),
        "moe_layers_enum",
        f"names layer {max(layers, default=0)}, but the trunk has {c.num_hidden_layers} layers",
    )
    if not layers:
        return
    for name in ["moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"]:
        value = getattr(c, name)
        _require(
            isinstance(value, int) and 0 < value <= _MAX_DIMENSION,
            name,
            f"is {value!r}, expected a positive integer",
        )
    _require(
        c.moe_top_k <= c.moe_num_experts,
        "moe_top_k",
        f"is {c.moe_top_k}, more than moe_num_experts {c.moe_num_experts}",
    )
    _require(
        math.isfinite(c.moe_router_scaling_factor) and c.moe_router_scaling_factor > 0,
        "moe_router_scaling_factor",
        f"is {c.moe_router_scaling_factor!r}, expected a positive number",
    )


def _check_rope_scaling(c: ModelConfig) -> None:
    for kind in c.yarn_only_types:
        _require(kind in (FULL, SLIDING), "yarn_only_types", f"names unknown layer type {kind!r}")
    if c.rope_divisors is not None:
        ok = all(math.isfinite(d) and d > 0 for d in c.rope_divisors)
        _require(ok, "rope_freqs", "holds a divisor that is not a positive number")
        for spec in c.layers:
            needed = spec.rotary_dim // 2
            if spec.rope_divisors is not None and len(c.rope_divisors) < needed:
                problem = f"has {len(c.rope_divisors)} divisors, layer {spec.index} needs {needed}"
                raise ConfigError("rope_freqs", problem)
    s = c.rope_scaling
    if s is None:
        return
    _require(s.rope_type == "llama3", "rope_scaling", f"type {s.rope_type!r} is not 'llama3'")
    ok = math.isfinite(s.factor) and s.factor >= 1
    _require(ok, "rope_scaling", f"factor {s.factor!r} is not a number of at least 1")
    ok = 0 < s.low_freq_factor < s.high_freq_factor < math.inf
    _require(ok, "rope_scaling", "needs 0 < low_freq_factor < high_freq_factor")
    ok = s.original_max_position_embeddings > 0
    _require(ok, "rope_scaling", "original_max_position_embeddings is not positive")


def _check_token_ids(c: ModelConfig) -> None:
    for token in c.eos_token_id:
        ok = isinstance(token, int) and 0 <= token < c.vocab_size
        _require(ok, "eos_token_id", f"{token!r} is outside the vocabulary of {c.vocab_size}")
    bos = c.bos_token_id
    ok = bos is None or (isinstance(bos, int) and 0 <= bos < c.vocab_size)
    _require(ok, "bos_token_id", f"{bos!r} is outside the vocabulary of {c.vocab_size}")


def published() -> ModelConfig:
    """Step 3.5 Flash as published by StepFun (config.json of stepfun-ai/Step-3.5-Flash)."""
    kinds: tuple[LayerKind, ...] = tuple(
        FULL if i % 4 == 0 and i < 45 else SLIDING for i in range(48)
    )
    limits, limits_shared = [0.0] * 48, [0.0] * 48
    limits[43] = limits[44] = 7.0
    limits_shared[44] = 16.0
    return ModelConfig(
        hidden_size=4096,
        intermediate_size=11264,
        num_hidden_layers=45,
        num_nextn_predict_layers=3,
        vocab_size=128896,
        num_attention_heads=64,
        num_attention_groups=8,
        head_dim=128,
        sliding_attention_heads=96,
        sliding_window=512,
        layer_types=kinds,
        rope_theta=tuple(5e6 if k == FULL else 1e4 for k in kinds),
        partial_rotary_factors=tuple(0.5 if k == FULL else 1.0 for k in kinds),
        rope_scaling=RopeScaling(2.0, 131072, 1.0, 32.0),
        moe_layers=tuple(range(3, 45)),
        moe_num_experts=288,
        moe_top_k=8,
        moe_intermediate_size=1280,
        share_expert_dim=1280,
        moe_router_scaling_factor=3.0,
        swiglu_limits=tuple(limits),
        swiglu_limits_shared=tuple(limits_shared),
        max_position_embeddings=262144,
        bos_token_id=0,
        eos_token_id=(1, 2, 128007),
    )

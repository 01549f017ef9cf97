"""Known mistakes and disagreements, each switchable in one place of the production path.

A `Variant` with all flags off is the normative model. The registry names every row of the
mistake table and every arithmetic disagreement between published implementations; tests prove
that each one breaks the golden comparison, and `golden diagnose` tries them on a user's output.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from refimpl.config import FULL, SLIDING, LayerSpec, ModelConfig

MtpWiring = Literal["chain", "llamacpp", "transformers", "trunk_to_all", "first_block"]


@dataclass(frozen=True)
class Variant:
    """Flags of one deviation; the defaults are the normative model."""

    window_delta: int = 0
    rope_unscaled: bool = False
    rope_scaled_everywhere: bool = False
    rotary_full_on_full: bool = False
    rotary_last_lanes: bool = False
    rope_interleaved: bool = False
    one_theta: bool = False
    one_theta_low: bool = False
    rope_exponent_head_dim: bool = False
    rope_yarn: bool = False
    eps: float | None = None
    norm_offset: float = 0.0
    norm_scale_bf16: bool = False
    gate_off: bool = False
    clamp_routed_off: bool = False
    clamp_shared_off: bool = False
    clamp_swapped: bool = False
    clamp_shared_as_routed: bool = False
    clamp_before_silu: bool = False
    clamp_up_above_only: bool = False
    experts_gate_up_swapped: bool = False
    router_unscaled: bool = False
    router_not_renormalised: bool = False
    router_softmax: bool = False
    router_bias_ignored: bool = False
    router_bias_in_weights: bool = False
    router_llamacpp_floor: bool = False
    router_bf16: bool = False
    router_8bit: bool = False
    experts_bf16: bool = False
    shared_scaled: bool = False
    mtp_wiring: MtpWiring = "chain"
    mtp_main_head: bool = False
    mtp_hidden_first: bool = False

    def layer(self, spec: LayerSpec, config: ModelConfig) -> LayerSpec:
        """The layer as this variant sees it: window, RoPE and clamp settings."""
        changes: dict[str, object] = {}
        if self.window_delta and spec.window is not None:
            changes["window"] = max(1, spec.window + self.window_delta)
        if self.rope_unscaled:
            changes.update(rope_scaling=None, rope_divisors=None)
        if self.rope_scaled_everywhere:
            changes.update(rope_scaling=config.rope_scaling, rope_divisors=config.rope_divisors)
        if self.rotary_full_on_full and spec.kind == FULL:
            changes["rotary_dim"] = spec.head_dim
            changes["rope_divisors"] = None
        if self.one_theta and spec.kind == SLIDING:
            changes["rope_theta"] = max(config.rope_theta)
        if self.one_theta_low and spec.kind == FULL:
            changes["rope_theta"] = min(config.rope_theta)
        if self.rope_exponent_head_dim:
            changes["rope_theta"] = spec.rope_theta ** (spec.rotary_dim / spec.head_dim)
        if self.rope_yarn and (spec.rope_scaling or spec.rope_divisors):
            changes.update(rope_scaling=None, rope_divisors=_yarn_divisors(spec, config))
        changes.update(self._clamps(spec, config))
        return dataclasses.replace(spec, **changes) if changes else spec  # type: ignore[arg-type]

    def _clamps(self, spec: LayerSpec, config: ModelConfig) -> dict[str, object]:
        routed, shared = spec.swiglu_limit, spec.swiglu_limit_shared
        if self.clamp_swapped:
            routed, shared = shared, routed
        if self.clamp_routed_off:
            routed = math.inf
        if self.clamp_shared_off:
            shared = math.inf
        if self.clamp_shared_as_routed and math.isfinite(routed):
            shared = max(config.swiglu_limits_shared) or math.inf
        return {"swiglu_limit": routed, "swiglu_limit_shared": shared}

    def rope_amplitude(self, spec: LayerSpec) -> float:
        """Factor on cos and sin: YaRN's attention scale where it is applied, else 1."""
        if not self.rope_yarn or spec.kind != FULL or spec.rope_divisors is None:
            return 1.0
        return 0.1 * math.log(max(spec.rope_divisors)) + 1.0


def _yarn_divisors(spec: LayerSpec, config: ModelConfig) -> tuple[float, ...]:
    """Divisors of the base frequencies under YaRN (arXiv 2309.00071; beta 32 and 1)."""
    scaling, r = spec.rope_scaling, spec.rotary_dim
    if scaling is not None:
        factor, length = scaling.factor, scaling.original_max_position_embeddings
    else:  # a GGUF file states only what llama3 scaling led to
        factor = max(spec.rope_divisors or (1.0,))
        length = round(config.max_position_embeddings / factor)

    def lane(rotations: float) -> float:
        """The pair of lanes that turns `rotations` times over the original length."""
        return r * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = max(0, math.floor(lane(32.0))), min(r - 1, math.ceil(lane(1.0)))
    span = max(high - low, 1e-3)
    kept = [1.0 - min(1.0, max(0.0, (i - low) / span)) for i in range(r // 2)]
    return tuple(1.0 / (k + (1.0 - k) / factor) for k in kept)


NORMATIVE = Variant()


@dataclass(frozen=True)
class KnownVariant:
    """A registry entry: flags, a phrase that completes "equals the reference with ...", source."""

    flags: Variant
    phrase: str
    source: str


_GH = "https://github.com/"
# What is right is in the vendor's own code; three independent ports agree with it.
_TABLE = "typical of ports; against modeling_step3p5.py of https://hf.co/stepfun-ai/Step-3.5-Flash"


def _known(phrase: str, source: str = _TABLE, **flags: object) -> KnownVariant:
    return KnownVariant(Variant(**flags), phrase, source)  # type: ignore[arg-type]


VARIANTS: dict[str, KnownVariant] = {
    "window_minus_1": _known("window - 1 on sliding layers", window_delta=-1),
    "window_plus_1": _known(
        "window + 1 on sliding layers (513 keys instead of 512)",
        _GH + "zml/zml/pull/763; SGLang and Megatron-Bridge by reading",
        window_delta=1,
    ),
    "no_llama3_scaling": _known("no llama3 frequency scaling", rope_unscaled=True),
    "llama3_scaling_everywhere": _known(
        "llama3 frequency scaling on sliding layers too", rope_scaled_everywhere=True
    ),
    "full_rotary": _known("all lanes rotated on full-attention layers", rotary_full_on_full=True),
    "rotary_last_half": _known(
        "the last lanes rotated instead of the first", rotary_last_lanes=True
    ),
    "interleaved_rope": _known("interleaved RoPE pairs (2i, 2i+1)", rope_interleaved=True),
    "one_theta": _known("the full layers' rope_theta on every layer", one_theta=True),
    "one_theta_low": _known(
        "the sliding layers' rope_theta on every layer",
        "arXiv 2602.10604, table 6 (the value of pre-training)",
        one_theta_low=True,
    ),
    "rope_exponent_head_dim": _known(
        "RoPE exponents over head_dim instead of the rotated lanes",
        rope_exponent_head_dim=True,
    ),
    "yarn": _known(
        "YaRN instead of llama3 frequency scaling",
        "arXiv 2602.10604, section 6.2, against config.json",
        rope_yarn=True,
    ),
    "no_routed_clamp": _known("no clamp on routed experts", clamp_routed_off=True),
    "no_shared_clamp": _known("no clamp on shared experts", clamp_shared_off=True),
    "clamp_lists_swapped": _known(
        "swiglu_limits and swiglu_limits_shared swapped", clamp_swapped=True
    ),
    "clamp_before_silu": _known("the gate branch clamped before silu", clamp_before_silu=True),
    "clamp_up_above_only": _known(
        "the up branch clamped from above only", clamp_up_above_only=True
    ),
    "router_scale_1": _known(
        "routing weights not multiplied by moe_router_scaling_factor",
        _TABLE + "; SGLang's deepep path by reading; ATOM's first version",
        router_unscaled=True,
    ),
    "router_not_renormalised": _known(
        "routing weights not renormalised", router_not_renormalised=True
    ),
    "router_softmax": _known("softmax instead of sigmoid in the router", router_softmax=True),
    "router_bias_ignored": _known("the router's selection bias ignored", router_bias_ignored=True),
    "router_bias_in_weights": _known(
        "the selection bias inside the routing weights", router_bias_in_weights=True
    ),
    "norm_without_plus_1": _known("norm weights used without + 1", norm_offset=-1.0),
    "norm_plus_1_twice": _known("+ 1 applied twice to norm weights", norm_offset=1.0),
    "no_attention_gate": _known("the head-wise attention gate off", gate_off=True),
    "expert_gate_up_swapped": _known(
        "gate and up projections of the experts swapped", experts_gate_up_swapped=True
    ),
    "eps_1e-6": _known(
        "rms_norm_eps 1e-6 instead of 1e-5", _TABLE + "; pypto-lib kernels", eps=1e-6
    ),
    "norm_scale_bf16": _known(
        "1 + w of the norms formed in bf16",
        "mlx-lm, " + _GH + "ml-explore/mlx-lm/pull/836",
        norm_scale_bf16=True,
    ),
    "router_bf16": _known(
        "router logits rounded to bf16",
        "transformers 5.23, " + _GH + "huggingface/transformers/pull/46562; mlx-lm; vLLM's FP8 "
        "path on B200, " + _GH + "vllm-project/recipes/blob/main/StepFun/Step-3.5-Flash.md",
        router_bf16=True,
    ),
    "router_8bit": _known(
        "the router's weights quantised to 8 bits in groups of 64",
        "mlx-lm quantised models, " + _GH + "ml-explore/mlx-lm/pull/836",
        router_8bit=True,
    ),
    "experts_bf16": _known(
        "routed experts computed in bf16 instead of float32",
        "transformers 5.23, " + _GH + "huggingface/transformers/pull/46562",
        experts_bf16=True,
    ),
    "sglang_deepep": _known(
        "router logits rounded to bf16 and routing weights not scaled",
        "SGLang, python/sglang/srt/models/step3p5.py, forward_deepep (by reading)",
        router_bf16=True,
        router_unscaled=True,
    ),
    "router_llamacpp_floor": _known(
        "the routing sum floored at 2^-14 instead of + 1e-20",
        "llama.cpp, src/llama-graph.cpp",
        router_llamacpp_floor=True,
    ),
    "no_clamps": _known(
        "no SwiGLU clamps at all", "ATOM status note", clamp_routed_off=True, clamp_shared_off=True
    ),
    "shared_clamp_as_3.7": _known(
        "Step 3.7's shared-expert clamps (every layer with a routed clamp)",
        "transformers 5.23 step3p7 configuration comment",
        clamp_shared_as_routed=True,
    ),
    "shared_expert_scaled": _known(
        "moe_router_scaling_factor applied to the shared expert too",
        shared_scaled=True,
    ),
    "mtp_transformers": _known(
        "transformers' MTP wiring (normed hidden states, main output head)",
        _GH + "huggingface/transformers/pull/46229",
        mtp_wiring="transformers",
        mtp_main_head=True,
    ),
    "mtp_llamacpp": _known(
        "llama.cpp's MTP wiring (trunk hidden states in every head's prefix)",
        _GH + "ggml-org/llama.cpp/pull/24340",
        mtp_wiring="llamacpp",
    ),
    "mtp_trunk_to_all": _known(
        "the trunk's hidden state fed to every MTP head",
        _GH + "sgl-project/sglang/pull/18564",
        mtp_wiring="trunk_to_all",
    ),
    "mtp_first_block": _known(
        "the first MTP block used for every draft",
        _GH + "ggml-org/llama.cpp/pull/23274",
        mtp_wiring="first_block",
    ),
    "mtp_hidden_first": _known(
        "the MTP layers' input concatenated hidden half first",
        mtp_hidden_first=True,
    ),
    "mtp_main_head": _known(
        "the main output head used by the MTP layers",
        _GH + "NVIDIA-NeMo/Megatron-Bridge/pull/5364",
        mtp_main_head=True,
    ),
}

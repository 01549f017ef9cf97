"""The one tensor table: every tensor of a model, from its configuration.

Loaders check files against this table, the writers and the synthesiser write from it, and the
cost model counts bytes and multiply-adds from it. Checkpoint quirks live here and nowhere else:

* norms are stored zero-centred (`w`, multiply by 1 + w) in Hugging Face files and as `1 + w` in
  GGUF files (`plus_one`); source: `zero_centered` in config.json, llama.cpp conversion/step3.py;
* routed experts are stacked: one 3-D tensor per projection, expert first;
* the MTP heads carry the infix `transformer.` in Hugging Face names only;
* the router's selection bias is a vector named without `.weight`;
* GGUF files hold one extra tensor, `rope_freqs.weight`, with the llama3 divisors.

Shapes are in Hugging Face order, [out, in] (experts: [expert, out, in]); GGUF states them
reversed. Sizes: H hidden_size, I intermediate_size, V vocab_size, q query heads of the layer,
g KV heads, D head_dim, E experts, F moe_intermediate_size, S share_expert_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from refimpl.config import LayerSpec, ModelConfig

Role = Literal[
    "embedding", "attention", "dense", "routed", "shared", "router", "norm", "head", "mtp", "rope"
]
ROLES: tuple[Role, ...] = (
    "embedding", "attention", "dense", "routed", "shared", "router", "norm", "head", "mtp", "rope"
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
        key: short name within its layer, such as `q_proj` or `experts.gate`; unique per layer.
        hf_name, gguf_name: names in the two file formats; `hf_name` is empty for GGUF-only ones.
        shape: Hugging Face order.
        role: what the tensor is for; everything in an MTP layer has the role `mtp`.
        part: the role the tensor would have in a trunk layer (differs from `role` only for mtp).
        layer: layer index, or None for tensors outside the layers.
        plus_one: a norm weight: stored as w in Hugging Face files, as 1 + w in GGUF.
        stays_f32: kept in F32 by GGUF quantisers (norms, router, biases, rope divisors).
    """

    key: str
    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    role: Role
    part: Role
    layer: int | None
    plus_one: bool = False
    stays_f32: bool = False

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """Dimensions as GGUF states them, fastest first."""
        return self.shape[::-1]

    @property
    def is_stacked(self) -> bool:
        """True for the 3-D tensors that hold one matrix per routed expert."""
        return len(self.shape) == 3

    @property
    def is_parameter(self) -> bool:
        """False for the derived table `rope_freqs.weight`, which is no learned parameter."""
        return self.role != "rope"


def inventory(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """All tensors of the Hugging Face checkpoint, in layer order (804 for the published model)."""
    return tuple(_tensors(config))


def gguf_inventory(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """All tensors of the GGUF file: the same plus `rope_freqs.weight` where scaling is used."""
    tensors = inventory(config)
    if config.rope_scaling is None and config.rope_divisors is None:
        return tensors
    rope = TensorSpec(
        "rope_freqs", "", "rope_freqs.weight", (config.head_dim // 2,), "rope", "rope", None,
        stays_f32=True,
    )  # fmt: skip
    return (rope, *tensors)


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    h, v = c.hidden_size, c.vocab_size
    yield TensorSpec(
        "embed_tokens", "model.embed_tokens.weight", "token_embd.weight", (v, h),
        "embedding", "embedding", None,
    )  # fmt: skip
    for spec in c.layers:
        yield from _layer_tensors(c, spec)
    yield TensorSpec(
        "norm", "model.norm.weight", "output_norm.weight", (h,), "norm", "norm", None,
        plus_one=True, stays_f32=True,
    )  # fmt: skip
    yield TensorSpec("lm_head", "lm_head.weight", "output.weight", (v, h), "head", "head", None)


def _layer_tensors(c: ModelConfig, s: LayerSpec) -> Iterator[TensorSpec]:
    h, d = c.hidden_size, s.head_dim
    q, g = s.num_attention_heads * d, s.num_attention_groups * d
    yield _norm(s, "input_layernorm", "attn_norm", h, "norm")
    yield _matrix(s, "q_proj", "self_attn.q_proj", "attn_q", (q, h), "attention")
    yield _matrix(s, "k_proj", "self_attn.k_proj", "attn_k", (g, h), "attention")
    yield _matrix(s, "v_proj", "self_attn.v_proj", "attn_v", (g, h), "attention")
    yield _matrix(s, "o_proj", "self_attn.o_proj", "attn_output", (h, q), "attention")
    gate_shape = (s.num_attention_heads, h)
    yield _matrix(s, "g_proj", "self_attn.g_proj", "attn_gate", gate_shape, "attention")
    yield _norm(s, "q_norm", "attn_q_norm", d, "attention", "self_attn.q_norm")
    yield _norm(s, "k_norm", "attn_k_norm", d, "attention", "self_attn.k_norm")
    yield _norm(s, "post_attention_layernorm", "ffn_norm", h, "norm")
    if s.is_moe:
        yield from _moe_tensors(c, s)
    else:
        i = c.intermediate_size
        yield _matrix(s, "gate_proj", "mlp.gate_proj", "ffn_gate", (i, h), "dense")
        yield _matrix(s, "up_proj", "mlp.up_proj", "ffn_up", (i, h), "dense")
        yield _matrix(s, "down_proj", "mlp.down_proj", "ffn_down", (h, i), "dense")
    if s.is_mtp:
        yield from _mtp_tensors(c, s)


def _moe_tensors(c: ModelConfig, s: LayerSpec) -> Iterator[TensorSpec]:
    h, e, f, w = c.hidden_size, c.moe_num_experts, c.moe_intermediate_size, c.share_expert_dim
    yield _matrix(s, "router", "moe.gate", "ffn_gate_inp", (e, h), "router", stays_f32=True)
    layer = f"model.layers.{s.index}."
    yield TensorSpec(
        "router_bias", layer + "moe.router_bias", f"blk.{s.index}.exp_probs_b.bias", (e,),
        "router", "router", s.index, stays_f32=True,
    )  # fmt: skip
    yield _matrix(s, "experts.gate", "moe.gate_proj", "ffn_gate_exps", (e, f, h), "routed")
    yield _matrix(s, "experts.up", "moe.up_proj", "ffn_up_exps", (e, f, h), "routed")
    yield _matrix(s, "experts.down", "moe.down_proj", "ffn_down_exps", (e, h, f), "routed")
    yield _matrix(s, "shared.gate", "share_expert.gate_proj", "ffn_gate_shexp", (w, h), "shared")
    yield _matrix(s, "shared.up", "share_expert.up_proj", "ffn_up_shexp", (w, h), "shared")
    yield _matrix(s, "shared.down", "share_expert.down_proj", "ffn_down_shexp", (h, w), "shared")


def _mtp_tensors(c: ModelConfig, s: LayerSpec) -> Iterator[TensorSpec]:
    h, v = c.hidden_size, c.vocab_size
    yield _norm(s, "enorm", "nextn.enorm", h, "norm")
    yield _norm(s, "hnorm", "nextn.hnorm", h, "norm")
    yield _matrix(s, "eh_proj", "eh_proj", "nextn.eh_proj", (h, 2 * h), "mtp")
    head = "transformer.shared_head."
    yield _norm(s, "shared_head.norm", "nextn.shared_head_norm", h, "norm", head + "norm")
    yield _matrix(
        s, "shared_head.output", head + "output", "nextn.shared_head_head", (v, h), "head"
    )


def _matrix(
    s: LayerSpec,
    key: str,
    hf: str,
    gguf: str,
    shape: tuple[int, ...],
    part: Role,
    stays_f32: bool = False,
) -> TensorSpec:
    return TensorSpec(
        key=key,
        hf_name=f"model.layers.{s.index}.{hf}.weight",
        gguf_name=f"blk.{s.index}.{gguf}.weight",
        shape=shape,
        role="mtp" if s.is_mtp else part,
        part=part,
        layer=s.index,
        stays_f32=stays_f32,
    )


def _norm(
    s: LayerSpec, key: str, gguf: str, size: int, part: Role, hf: str | None = None
) -> TensorSpec:
    return TensorSpec(
        key=key,
        hf_name=f"model.layers.{s.index}.{hf or key}.weight",
        gguf_name=f"blk.{s.index}.{gguf}.weight",
        shape=(size,),
        role="mtp" if s.is_mtp else part,
        part=part,
        layer=s.index,
        plus_one=True,
        stays_f32=True,
    )


def parameters(config: ModelConfig) -> int:
    """Number of parameters, MTP layers and their heads included."""
    return sum(t.elements for t in inventory(config) if t.is_parameter)


def active_parameters(config: ModelConfig, head: bool = False) -> int:
    """Parameters that one token uses in the trunk.

    The embedding table is never counted (one row is read), the output head only with `head`,
    router selection biases never, and of each layer's routed experts the selected ones.
    """
    total = 0
    for t in inventory(config):
        if t.role in ("embedding", "mtp", "rope") or t.key == "router_bias":
            continue
        if t.role == "head" and not head:
            continue
        if t.role == "routed":
            total += t.elements // config.moe_num_experts * config.moe_top_k
        else:
            total += t.elements
    return total

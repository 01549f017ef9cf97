"""One decoder layer: x + attention(norm(x)), then x + ffn(norm(x)).

Axes: T rows, H hidden_size, n query heads, g KV heads, D head_dim, k experts per token.
"""

from __future__ import annotations

import numpy as np

from refimpl.config import LayerSpec
from refimpl.decoding.kv import LayerCache
from refimpl.reference.attention import attend, sigmoid, visible_pairs, visible_range
from refimpl.reference.ffn import swiglu
from refimpl.reference.moe import route
from refimpl.reference.numerics import Array, round_bf16
from refimpl.reference.weights import Weights, unique_experts


def decoder_layer(w: Weights, spec: LayerSpec, h: Array, positions: Array, kv: LayerCache) -> Array:
    """Residual stream in, residual stream out: (T, H), (T,) -> (T, H)."""
    attention_out = attention(w, spec, w.norm(h, "input_layernorm", spec.index), positions, kv)
    h = w.numerics.at("residual", h + attention_out)
    ffn_out = ffn(w, spec, w.norm(h, "post_attention_layernorm", spec.index))
    if w.trace is not None and not spec.is_mtp:
        w.trace.keep("attn_out", spec.index, attention_out)
        w.trace.keep("ffn_out", spec.index, ffn_out)
    return w.numerics.at("residual", h + ffn_out)


def attention(w: Weights, spec: LayerSpec, a: Array, positions: Array, kv: LayerCache) -> Array:
    """Gated grouped-query attention on normed input: (T, H), (T,) -> (T, H)."""
    q, k, v = project(w, spec, a, positions)
    keys, values, key_positions = kv.extend(k, v)  # (S, g, D), (S, g, D), (S,)
    if w.trace is not None:
        _count_attention(w, spec, positions, key_positions)
    return gated_output(w, spec, a, attend(q, keys, values, positions, key_positions, spec.window))


def project(w: Weights, spec: LayerSpec, a: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Normed, rotated queries and keys, and values: (T, H) -> (T, n, D), (T, g, D), (T, g, D)."""
    i, t, d = spec.index, len(a), spec.head_dim
    q = w.linear(a, "q_proj", i).reshape(t, spec.num_attention_heads, d)
    k = w.linear(a, "k_proj", i).reshape(t, spec.num_attention_groups, d)
    v = w.linear(a, "v_proj", i).reshape(t, spec.num_attention_groups, d)
    q = w.rotate(w.norm(q, "q_norm", i), positions, spec)
    k = w.rotate(w.norm(k, "k_norm", i), positions, spec)
    return q, k, v


def gated_output(w: Weights, spec: LayerSpec, a: Array, heads: Array) -> Array:
    """One sigmoid scalar per head, then the output projection: (T, H), (T, n, D) -> (T, H).

    The gate reads the layer's normed input, like q, k and v.
    """
    at = w.numerics.at
    heads = at("attention", heads)
    gate = at("gate_sigmoid", sigmoid(w.linear(a, "g_proj", spec.index)))  # (T, n)
    if not w.variant.gate_off:
        heads = at("gate_product", heads * gate[:, :, None])
    return w.linear(heads.reshape(len(a), -1), "o_proj", spec.index)


def _count_attention(w: Weights, spec: LayerSpec, positions: Array, key_positions: Array) -> None:
    assert w.trace is not None
    pairs = visible_pairs(positions, key_positions, spec.window)
    role = "mtp" if spec.is_mtp else "scores"
    w.trace.product(role, 2 * pairs * spec.num_attention_heads * spec.head_dim)
    if not spec.is_mtp:
        low, high = visible_range(positions, key_positions, spec.window)
        row = 2 * spec.num_attention_groups * spec.head_dim
        w.trace.kv((high - low) * row, len(positions) * row)


def ffn(w: Weights, spec: LayerSpec, b: Array) -> Array:
    """Dense SwiGLU, or routed experts plus the shared expert: (T, H) -> (T, H)."""
    if not spec.is_moe:
        return dense_ffn(w, spec, b, "")
    shared = dense_ffn(w, spec, b, "shared.")
    if w.variant.shared_scaled:
        shared = shared * shared.dtype.type(w.config.moe_router_scaling_factor)
    return w.numerics.at("ffn_sum", routed_ffn(w, spec, b) + shared)


def dense_ffn(w: Weights, spec: LayerSpec, b: Array, prefix: str) -> Array:
    """down(swiglu(gate(b), up(b))); the clamp is that of `swiglu_limits_shared`."""
    keys = [prefix + name + ("" if prefix else "_proj") for name in ("gate", "up", "down")]
    gate, up = w.linear(b, keys[0], spec.index), w.linear(b, keys[1], spec.index)
    product = swiglu(gate, up, spec.swiglu_limit_shared, w.numerics, w.variant)
    return w.linear(product, keys[2], spec.index)


def routed_ffn(w: Weights, spec: LayerSpec, b: Array) -> Array:
    """Weighted sum over each row's experts, in ascending expert index: (T, H) -> (T, H)."""
    config, at, i = w.config, w.numerics.at, spec.index
    routing = route(
        w.router_logits(b, i),
        w.router_bias(i),
        config.moe_top_k,
        config.moe_router_scaling_factor,
        w.variant,
    )
    if w.trace is not None:
        w.trace.keep("route_idx", i, routing.experts)
        w.trace.keep("route_w", i, routing.weights)
        w.trace.keep("route_margin", i, routing.margin)
    first, second = "experts.gate", "experts.up"
    if w.variant.experts_gate_up_swapped:
        first, second = second, first
    out = np.zeros_like(b)
    for expert in unique_experts(routing.experts):
        rows, slot = np.nonzero(routing.experts == expert)
        x = b[rows]  # (rows, H)
        gate = w.expert_linear(x, first, i, expert)  # (rows, F)
        up = w.expert_linear(x, second, i, expert)
        product = swiglu(gate, up, spec.swiglu_limit, None, w.variant)
        if w.variant.experts_bf16:
            product = round_bf16(product).astype(product.dtype)
        y = w.expert_linear(product, "experts.down", i, expert)  # (rows, H)
        weighted = at("expert_output", y * routing.weights[rows, slot][:, None])
        out[rows] = at("expert_sum", out[rows] + weighted)
    return out

"""Weights as the mathematics asks for them: decoded on demand, multiplied, counted, rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from refimpl.checkpoint.source import WeightSource
from refimpl.config import LayerSpec, ModelConfig
from refimpl.inventory import TensorSpec, inventory
from refimpl.reference.norm import rms_norm
from refimpl.reference.numerics import Array, Numerics, round_bf16, round_groups
from refimpl.reference.rope import angles, frequencies, lanes
from refimpl.reference.trace import Trace
from refimpl.reference.variant import NORMATIVE, Variant


@dataclass
class Weights:
    """A checkpoint seen through one arithmetic and one variant.

    `trace` is None in production; the model sets it for a traced call.
    """

    source: WeightSource
    numerics: Numerics
    variant: Variant = NORMATIVE
    trace: Trace | None = None
    _rope: dict[int, Array] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        return self.source.config

    @cached_property
    def table(self) -> dict[tuple[str, int | None], TensorSpec]:
        """The inventory by (key, layer)."""
        return {(t.key, t.layer): t for t in inventory(self.config)}

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Layer specifications as the variant sees them."""
        return tuple(self.variant.layer(s, self.config) for s in self.config.layers)

    def linear(self, x: Array, key: str, layer: int | None) -> Array:
        """x Wᵀ: (T, in) -> (T, out), rounded at "linear"."""
        product = x @ self.source.matrix(key, layer, self.numerics.dtype).T
        self._count(key, layer, len(x))
        return self.numerics.at("linear", product)

    def router_logits(self, x: Array, layer: int) -> Array:
        """x Wrᵀ, never rounded below float32: (T, H) -> (T, E)."""
        matrix = self.source.matrix("router", layer, self.numerics.dtype)
        if self.variant.router_8bit:
            matrix = round_groups(matrix)
        logits = x @ matrix.T
        self._count("router", layer, len(x))
        if self.variant.router_bf16:
            return round_bf16(logits).astype(logits.dtype)
        return logits

    def router_bias(self, layer: int) -> Array:
        """Selection bias (E,)."""
        self._count("router_bias", layer, 0)
        return self.source.vector("router_bias", layer, self.numerics.dtype)

    def expert_linear(self, x: Array, key: str, layer: int, expert: int) -> Array:
        """x Wᵀ with one expert's matrix: (T, in) -> (T, out), not rounded."""
        product = x @ self.source.expert(key, layer, expert, self.numerics.dtype).T
        self._count(key, layer, len(x), expert)
        if self.variant.experts_bf16:
            return round_bf16(product).astype(product.dtype)
        return product

    def norm(self, x: Array, key: str, layer: int | None) -> Array:
        """Zero-centred RMSNorm over the last axis, rounded at "norm"."""
        scale = self.source.norm_scale(key, layer, self.numerics.dtype)
        scale = scale + scale.dtype.type(self.variant.norm_offset)
        if self.variant.norm_scale_bf16:
            scale = round_bf16(scale).astype(scale.dtype)
        self._count(key, layer, 0)
        eps = self.config.rms_norm_eps if self.variant.eps is None else self.variant.eps
        return self.numerics.at("norm", rms_norm(x, scale, eps))

    def embedding(self, tokens: Array) -> Array:
        """Rows of the embedding table: (T,) -> (T, H)."""
        rows = self.source.rows("embed_tokens", None, tokens.tolist(), self.numerics.dtype)
        if self.trace is not None:
            spec = self.table["embed_tokens", None]
            size = self.source.stored_bytes("embed_tokens", None) // spec.shape[0]
            for token in set(tokens.tolist()):
                self.trace.weights(spec.role, spec.key, None, token, size)
        return self.numerics.at("embedding", rows)

    def rotate(self, x: Array, positions: Array, spec: LayerSpec) -> Array:
        """RoPE on the rotary lanes: (T, n, D), (T,) -> (T, n, D)."""
        freqs = self._rope.setdefault(spec.index, frequencies(spec))
        cos, sin = angles(positions, freqs)  # (T, R/2) each
        amplitude = self.variant.rope_amplitude(spec)
        if amplitude != 1.0:
            cos, sin = amplitude * cos, amplitude * sin
        at, dtype = self.numerics.at, self.numerics.dtype
        cos = at("rope_table", cos.astype(dtype))[:, None, :]  # (T, 1, R/2)
        sin = at("rope_table", sin.astype(dtype))[:, None, :]
        v = self.variant
        first, second = lanes(spec, v.rope_interleaved, v.rotary_last_lanes)
        a, b = x[..., first], x[..., second]  # (T, n, R/2) each
        out = x.copy()
        product, total = "rope_product", "rope_sum"
        out[..., first] = at(total, at(product, a * cos) - at(product, b * sin))
        out[..., second] = at(total, at(product, b * cos) + at(product, a * sin))
        return out

    def _count(self, key: str, layer: int | None, rows: int, expert: int | None = None) -> None:
        if self.trace is None:
            return
        spec = self.table[key, layer]
        size, elements = self.source.stored_bytes(key, layer), spec.elements
        if expert is not None:
            size, elements = size // spec.shape[0], elements // spec.shape[0]
        if rows:
            self.trace.product(spec.role, rows * elements)
        self.trace.weights(spec.role, key, layer, expert, size)


def unique_experts(experts: Array) -> list[int]:
    """Selected experts (T, k) -> ascending list without repeats."""
    return [int(e) for e in np.unique(experts)]

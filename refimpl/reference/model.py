"""The whole model as a backend: embedding, layers, final norm, head, and the MTP layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refimpl.backend import Cache, Step, Tokens
from refimpl.checkpoint.fingerprint import fingerprint
from refimpl.checkpoint.source import WeightSource
from refimpl.checkpoint.step_reads import step_reads
from refimpl.config import LayerSpec, ModelConfig
from refimpl.decoding.kv import (
    SPECULATIVE_ROWS,
    GrowingCache,
    LayerCache,
    RingCache,
    take_tokens,
)
from refimpl.errors import InputError
from refimpl.reference.block import decoder_layer
from refimpl.reference.mtp import MtpCache, draft_chain, mtp_head, teacher_forced
from refimpl.reference.numerics import Array, numerics
from refimpl.reference.trace import Trace
from refimpl.reference.variant import NORMATIVE, Variant
from refimpl.reference.weights import Weights

_MAX_DECODE_ROWS = SPECULATIVE_ROWS + 1


class ReferenceCache:
    """Keys and values of one sequence for the reference: one cache per layer, MTP's included."""

    def __init__(
        self, layers: Iterable[LayerCache], mtp: MtpCache, capacity: int, row: Array
    ) -> None:
        self.layers = list(layers)
        self._row = row
        self.mtp = mtp
        self.capacity = capacity
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens processed by the trunk and not rolled back."""
        return len(self.tokens)

    def rollback(self, n: int) -> None:
        """Forget the trunk's last `n` rows, at most three."""
        if not 0 <= n <= min(SPECULATIVE_ROWS, self.length):
            raise ValueError(f"cannot roll back {n} of {self.length} rows")
        for layer in self.layers:
            layer.rollback(n)
        del self.tokens[self.length - n :]

    def shorten_history(self, keep: int) -> None:
        """See `refimpl.backend.Cache.shorten_history`; the reference leaves nothing out."""

    def export(self) -> dict[str, Array]:
        """tokens (T,), kv.I per trunk layer as `LayerCache.newest`, and `MtpCache.export`."""
        made: dict[str, Array] = {"tokens": np.array(self.tokens, dtype=np.int64)}
        made |= {f"kv.{i}": layer.newest() for i, layer in enumerate(self.layers)}
        return made | self.mtp.export()

    def refill(self, arrays: dict[str, Array]) -> None:
        """Fill this empty cache with what `export` gave.

        Raises:
            InputError: anything that does not fit.
        """
        tokens = take_tokens(arrays, self.capacity)
        for i, layer in enumerate(self.layers):
            layer.refill(len(tokens), arrays, f"kv.{i}")
        self.mtp.refill(arrays, len(tokens), self._row)
        self.tokens = tokens

    def snapshot(self) -> tuple[Any, ...]:
        """See `refimpl.backend.Cache.snapshot`."""
        return len(self.tokens), [layer.snapshot() for layer in self.layers], self.mtp.snapshot()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """See `refimpl.backend.Cache.restore`."""
        length, layers, mtp = snapshot
        for layer, held in zip(self.layers, layers, strict=True):
            layer.restore(held)
        self.mtp.restore(mtp)
        del self.tokens[length:]


class ReferenceModel:
    """Step 3.5 in NumPy, exact; implements `refimpl.backend.Backend`.

    Args:
        source: an open checkpoint.
        dtype: `float64`, `float32`, or `bf16` (float32 with the vendor's bf16 roundings).
        variant: a known deviation to reproduce; the normative model by default.
        ring: False keeps all rows on sliding layers too (for tests of the ring).

    Rows of one `decode` call are computed one by one, so that logits have the same bits for any
    number of drafts; chunks of a prompt are computed together.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: str = "float32",
        variant: Variant = NORMATIVE,
        ring: bool = True,
    ) -> None:
        self._weights = Weights(source, numerics(dtype), variant)
        self._ring = ring

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        return self._weights.config

    @property
    def weights(self) -> Weights:
        """The weights with their arithmetic and variant."""
        return self._weights

    def new_cache(self, capacity: int) -> ReferenceCache:
        """An empty cache for at most `capacity` tokens.

        Raises:
            InputError: the capacity is not between 1 and the model's context.
        """
        limit = self.config.max_position_embeddings
        if not 0 < capacity <= limit:
            raise InputError(f"a context of {capacity} tokens is asked for; the model has {limit}")
        n = self.config.num_hidden_layers
        layers = self._weights.layers
        mtp = MtpCache([self._layer_cache(s, capacity) for s in layers[n:]])
        row = np.zeros((1, self.config.hidden_size), self._weights.numerics.dtype)
        trunk = (self._layer_cache(s, capacity) for s in layers[:n])
        return ReferenceCache(trunk, mtp, capacity, row)

    def identity(self) -> dict[str, str]:
        """What the bits of a cache depend on; see `Backend.identity`."""
        w = self._weights
        changed = {k: v for k, v in vars(w.variant).items() if v != getattr(NORMATIVE, k)}
        kind = "" if self._ring else " without rings"
        arithmetic = f"reference {w.numerics.name}{kind}" + (f" {changed}" if changed else "")
        return {"weights": fingerprint(w.source), "arithmetic": arithmetic}

    def _layer_cache(self, spec: LayerSpec, capacity: int) -> LayerCache:
        dtype = self._weights.numerics.dtype
        # A ring longer than the context would never wrap, and a damaged file may ask for any.
        if spec.window is None or not self._ring or spec.window > capacity:
            return GrowingCache(spec.num_attention_groups, spec.head_dim, dtype, capacity)
        return RingCache(spec.num_attention_groups, spec.head_dim, dtype, spec.window)

    def prefill(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        trace: Trace | None = None,
    ) -> Step:
        """Append a chunk of T prompt tokens; logits (1, V), or (T, V) with `all_logits`."""
        ids, cache = self._checked(tokens, cache)
        with _traced(self._weights, trace):
            hidden = self._trunk(ids, cache)
            return Step(self.head(hidden if all_logits else hidden[-1:]), hidden)

    def decode(self, tokens: Tokens, cache: Cache, trace: Trace | None = None) -> Step:
        """Append 1..4 tokens; logits (T, V) of every row."""
        ids, cache = self._checked(tokens, cache)
        if len(ids) > _MAX_DECODE_ROWS:
            raise InputError(f"decode takes 1 to {_MAX_DECODE_ROWS} tokens, not {len(ids)}")
        with _traced(self._weights, trace):
            hidden = [self._trunk(ids[i : i + 1], cache) for i in range(len(ids))]
            logits = [self.head(row) for row in hidden]
        return Step(np.concatenate(logits), np.concatenate(hidden))

    def head(self, hidden: Array) -> Array:
        """Final norm and output head: (T, H) -> (T, V)."""
        final = self._weights.norm(hidden, "norm", None)
        if self._weights.trace is not None:
            self._weights.trace.keep("final", 0, final)
        return self._weights.linear(final, "lm_head", None)

    def draft_cost(self, depth: int) -> float:
        """See `Backend.draft_cost`."""
        return step_reads(self._weights.source).draft_cost(depth)

    def draft(
        self,
        cache: Cache,
        hidden: Array,
        next_tokens: Tokens,
        depth: int,
        choose: Callable[[Array], int],
    ) -> list[int]:
        """Feed verified rows to the MTP layers and draft up to `depth` tokens."""
        assert isinstance(cache, ReferenceCache)
        if not 0 <= depth <= self.config.num_nextn_predict_layers:
            have = self.config.num_nextn_predict_layers
            raise InputError(f"{depth} drafts asked for; the model has {have} MTP layers")
        return draft_chain(
            self._weights, cache.mtp, cache.tokens, hidden, [int(t) for t in next_tokens],
            depth, choose,
        )  # fmt: skip

    def mtp_teacher_forced(self, tokens: Tokens, hidden: Array) -> list[tuple[Array, Array]]:
        """Logits and hidden rows of every MTP layer over a known text.

        `hidden` is the trunk's (T, H) over `tokens`. Entry k holds logits (T-1-k, V) and the
        block's output (T-1-k, H) before its norm; row t takes x_{t+1+k} and predicts x_{t+2+k}.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        cache = self.new_cache(self.config.max_position_embeddings).mtp
        rows = teacher_forced(self._weights, cache, ids, hidden)
        return [(mtp_head(self._weights, k, m), m) for k, m in enumerate(rows)]

    def _trunk(self, ids: Array, cache: ReferenceCache) -> Array:
        w = self._weights
        positions = np.arange(cache.length, cache.length + len(ids))
        h = w.embedding(ids)  # (T, H)
        if w.trace is not None:
            w.trace.keep("hidden", 0, h)
        for spec, kv in zip(w.layers, cache.layers, strict=False):
            h = decoder_layer(w, spec, h, positions, kv)
            if w.trace is not None:
                w.trace.keep("hidden", spec.index + 1, h)
        cache.tokens.extend(ids.tolist())
        return h

    def _checked(self, tokens: Tokens, cache: Cache) -> tuple[Array, ReferenceCache]:
        assert isinstance(cache, ReferenceCache)
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
        vocab = self.config.vocab_size
        if not len(ids):
            raise InputError("no tokens given; at least one is needed")
        if ids.min() < 0 or ids.max() >= vocab:
            bad = int(ids[(ids < 0) | (ids >= vocab)][0])
            raise InputError(f"token id {bad} is outside the vocabulary of {vocab}")
        if cache.length + len(ids) > cache.capacity:
            needed = cache.length + len(ids)
            raise InputError(f"{needed} tokens do not fit the context of {cache.capacity}")
        return ids, cache


class _traced:
    """Gives the weights a trace for the length of one step."""

    def __init__(self, weights: Weights, trace: Trace | None) -> None:
        self._weights, self._trace = weights, trace

    def __enter__(self) -> None:
        if self._trace is not None:
            self._trace.begin_step()
        self._weights.trace = self._trace

    def __exit__(self, *_: object) -> None:
        self._weights.trace = None

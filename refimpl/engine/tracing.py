"""What a run of the engine computes and reads, recorded half a layer at a time.

A traced run calls the same compiled step once per half layer, so its logits have the bits of any
other run and untraced runs pay nothing. Counts follow from the tensors of each layer and the
experts that the router chose: the same facts that a traced run of the reference counts. Attention
and FFN outputs are differences of the residual stream, exact but for the rounding of its sums.

Axes: T rows, H hidden_size, E experts, k experts per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from refimpl.backend import Array, Step
from refimpl.checkpoint.stored import StoredSource
from refimpl.config import LayerSpec
from refimpl.engine.caches import EngineCache
from refimpl.engine.fields import ATTENTION_PART, FFN_PART
from refimpl.engine.fields import Step as Field
from refimpl.engine.program import Program
from refimpl.inventory import TensorSpec, inventory
from refimpl.reference.attention import visible_pairs, visible_range
from refimpl.reference.trace import Trace

_HEAD = ("norm", "lm_head")


class Tracer:
    """Runs rows through the trunk of one checkpoint and fills traces."""

    def __init__(self, source: StoredSource, program: Program) -> None:
        self._source, self._program = source, program
        self._tensors: dict[int | None, list[TensorSpec]] = defaultdict(list)
        for spec in inventory(source.config):
            self._tensors[spec.layer].append(spec)

    def trunk(
        self, ids: Sequence[int], h: Array, cache: EngineCache, wanted: int, row_by_row: bool,
        trace: Trace, layers: range | None = None,
    ) -> Step:  # fmt: skip
        """Run T rows as one step of `trace`; logits of the last `wanted` ones.

        Args:
            h: (T, H) embeddings of `ids`, or the input of the first of `layers`.
            row_by_row: whether visible keys are counted for every row (decode) or once for all
                of a chunk (prefill).
            layers: those of the trunk to run, by default all; logits only if the last is one.
        """
        config = self._source.config
        positions = np.arange(cache.length, cache.length + len(ids))
        n = config.num_hidden_layers
        layers = range(n) if layers is None else layers
        if not layers.start:
            self._count_embedding(ids, trace)
        trace.keep("hidden", layers.start, h)
        logits = np.empty((0, config.vocab_size), dtype=np.float32)
        for spec in config.layers[layers.start : layers.stop]:
            last = spec.index == n - 1
            skipped = len(ids) - (wanted if last else 0)
            h, logits = self._layer(spec, h, cache, positions, skipped, trace)
            _count_keys(spec, positions, row_by_row, trace)
        if wanted and layers.stop == n:
            self._count(self._head(), wanted, trace)
            trace.keep("final", 0, self._program.normed(wanted))
        return Step(logits, h)

    def _layer(self, spec: LayerSpec, h: Array, cache: EngineCache, positions: Array,
               skipped: int, trace: Trace) -> tuple[Array, Array]:  # fmt: skip
        """One layer, by halves: (T, H) -> (T, H), and the logits of rows `skipped` on."""
        count, start, i = len(h), int(positions[0]), spec.index
        run, layers = self._program.run, range(i, i + 1)
        middle, _ = run(h, layers, cache, start, count, parts=ATTENTION_PART)
        out, logits = run(middle, layers, cache, start, skipped, parts=FFN_PART)
        trace.keep("attn_out", i, middle - h)
        trace.keep("ffn_out", i, out - middle)
        trace.keep("hidden", i + 1, out)
        self._count([t for t in self._tensors[i] if not t.is_stacked], count, trace)
        if spec.is_moe:
            self._routing(i, count, trace)
        return out, logits

    def _routing(self, layer: int, count: int, trace: Trace) -> None:
        """Choices of the router, from the step's working memory, and what they cost."""
        c, read = self._source.config, self._program.working
        experts = read(Field.CHOSEN, np.int64, (count, c.moe_top_k)).copy()
        trace.keep("route_idx", layer, experts)
        trace.keep("route_w", layer, read(Field.WEIGHTS, np.float32, (count, c.moe_top_k)))
        width = int(self._program.field(Field.LOGITS_BYTES)) // 4
        scores = read(Field.LOGITS, np.float32, (count, width))[:, : c.moe_num_experts]
        trace.keep("route_margin", layer, self._margin(layer, scores))
        for spec in (t for t in self._tensors[layer] if t.is_stacked):
            size = self._source.stored_bytes(spec.key, layer) // spec.shape[0]
            trace.product(spec.role, experts.size * (spec.elements // spec.shape[0]))
            for expert in np.unique(experts).tolist():
                trace.weights(spec.role, spec.key, layer, expert, size)

    def _margin(self, layer: int, scores: Array) -> Array:
        """How far the choice is from changing (T,), from sigmoid scores (T, E)."""
        k = self._source.config.moe_top_k
        if k == scores.shape[1]:
            return np.ones(len(scores), dtype=np.float32)
        bias = self._source.vector("router_bias", layer, np.float32)
        ranked = -np.sort(-(scores + bias), axis=-1)
        margin: Array = ranked[:, k - 1] - ranked[:, k]
        return margin

    def _head(self) -> list[TensorSpec]:
        return [t for t in self._tensors[None] if t.key in _HEAD]

    def _count(self, tensors: list[TensorSpec], rows: int, trace: Trace) -> None:
        for spec in tensors:
            if len(spec.shape) == 2:
                trace.product(spec.role, rows * spec.elements)
            size = self._source.stored_bytes(spec.key, spec.layer)
            trace.weights(spec.role, spec.key, spec.layer, None, size)

    def _count_embedding(self, ids: Sequence[int], trace: Trace) -> None:
        table = next(t for t in self._tensors[None] if t.key == "embed_tokens")
        size = self._source.stored_bytes("embed_tokens", None) // table.shape[0]
        for token in set(ids):
            trace.weights(table.role, table.key, None, token, size)


def _count_keys(spec: LayerSpec, positions: Array, row_by_row: bool, trace: Trace) -> None:
    """Scores and cached rows of one layer."""
    keys = np.arange(positions[-1] + 1)
    pairs = visible_pairs(positions, keys, spec.window)
    trace.product("scores", 2 * pairs * spec.num_attention_heads * spec.head_dim)
    row = 2 * spec.num_attention_groups * spec.head_dim
    parts = positions[:, None] if row_by_row else positions[None, :]
    seen = [visible_range(part, keys, spec.window) for part in parts]
    trace.kv(sum(high - low for low, high in seen) * row, len(positions) * row)

"""The engine as a backend: the same inputs and outputs as the reference, at memory speed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.backend import Array, Cache, Step, Tokens
from refimpl.checkpoint.fingerprint import fingerprint
from refimpl.checkpoint.step_reads import StepReads, step_reads
from refimpl.checkpoint.stored import StoredSource
from refimpl.config import ModelConfig
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.engine.budget import planned_slots
from refimpl.engine.caches import EngineCache, cache_bytes, context_text
from refimpl.engine.drafting import draft_chain
from refimpl.engine.files import MappedFile, read_whole
from refimpl.engine.kv import KV_TYPES, KvType
from refimpl.engine.memory import Bytes, require_allowed, require_memory
from refimpl.engine.processor import require_half_precision
from refimpl.engine.program import Program
from refimpl.engine.residency import Residency
from refimpl.engine.simd import choose_simd
from refimpl.engine.threads import Team, default_threads
from refimpl.errors import InputError
from refimpl.reference.trace import Trace

_MAX_DECODE_ROWS = SPECULATIVE_ROWS + 1
_KEPT_BYTES = 8 << 20  # of the embedding table's rows, besides those of the newest step
MICRO_BATCH = 512
"""Rows that run through the model at once in prefill."""


class EngineModel:
    """Step 3.5 on quantised blocks in place; implements `refimpl.backend.Backend`.

    Args:
        source: an open checkpoint; its tensors are read where they lie in the memory map.
        threads: threads to use; default the physical cores.
        exact: float32 activations and KV, instead of int8 activations for block types.
        kv_type: 'f16', 'f32' or 'q8_0'; default f16, with `exact` f32.
        simd: 'avx512', 'avx2' or 'portable'; default `REFIMPL_SIMD` or the best.
        micro_batch: rows at once in prefill.
        memory_bytes: what the process may use of memory, mapped files included; default what
            is free. A larger checkpoint has its experts read from disk when they are chosen; so
            has one that fits, from when a cache is made that does not fit beside it
            (`on_residency`, if set, is called then).
        ring: False keeps all rows on sliding layers too (for tests of the ring).

    A row's result has the same bits for any number of threads and of drafts. Prompts in chunks of
    up to 7 rows have the bits of decoding; larger ones differ by the order of float32 sums, which
    turns some roundings of activations the other way: less than 2 % of the logits' rms where no
    choice of experts flips, a third of what int8 activations themselves cost (`exact`: 5e-5). With
    AMX they take bfloat16 activations, nearer to float32 than int8 ones.

    Raises:
        InputError: an option that cannot be, a processor without float16, or a tensor of a type
            without kernels.
        CheckpointError: a tensor whose bytes are not as they should be.
    """

    def __init__(
        self,
        source: StoredSource,
        threads: int | None = None,
        exact: bool = False,
        kv_type: str | None = None,
        simd: str | None = None,
        micro_batch: int = MICRO_BATCH,
        ring: bool = True,
        memory_bytes: int | None = None,
    ) -> None:
        if micro_batch < _MAX_DECODE_ROWS:
            raise InputError(f"micro_batch is {micro_batch}, expected {_MAX_DECODE_ROWS} or more")
        require_half_precision()
        self.source, self._ring, self._micro_batch = source, ring, micro_batch
        self._kv = _kv_type(kv_type or ("f32" if exact else "f16"))
        self.team = Team(default_threads() if threads is None else threads)
        self._simd, self._exact = choose_simd(simd), exact
        self.program = Program(source, self.team, self._simd, exact, self._kv, micro_batch)
        slots = planned_slots(source, self.program, memory_bytes)
        self._lately: dict[int, Array] = {}
        self._allowed = memory_bytes
        self._reading: Callable[[int, int], None] | None = None
        self.on_residency: Callable[[], None] | None = None
        self.residency = None if slots is None else Residency(self.program, source, slots)

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        return self.source.config

    @property
    def threads(self) -> int:
        """Threads in use."""
        return self.team.size

    def cache_bytes(self, capacity: int) -> int:
        """Memory of a cache for `capacity` tokens."""
        return cache_bytes(self.config, self._kv, capacity, self._micro_batch, self._ring)

    def new_cache(self, capacity: int) -> EngineCache:
        """An empty cache for at most `capacity` tokens.

        Raises:
            InputError: the capacity is not between 1 and the model's context, or its memory
                is not free or more than the process may use.
        """
        limit = self.config.max_position_embeddings
        if not 0 < capacity <= limit:
            raise InputError(f"a context of {capacity} tokens is asked for; the model has {limit}")
        size = self.cache_bytes(capacity)
        what = context_text(self.config, self._kv, capacity)
        require_memory(size, what)
        before = self.residency
        if before is None and self._allowed is not None:
            self._keep_within(self._allowed, size, what)
        if self.residency is not None:
            self.residency.make_room(size)
            if before is None and self.on_residency is not None:
                self.on_residency()
        made = EngineCache(self, self.config, self._kv, capacity, self._micro_batch, self._ring)
        if self.residency is not None:
            weakref.finalize(made, self.residency.give_back, size).atexit = False
        return made

    def _keep_within(self, allowed: int, size: int, what: str) -> None:
        """See to it that a cache of `size` bytes fits: beside the whole checkpoint, which is read
        ahead then if that was asked for, or beside fewer experts.

        Raises:
            InputError: it fits neither way.
        """
        slots = planned_slots(self.source, self.program, allowed, size)
        if slots is not None:
            self.residency = Residency(self.program, self.source, slots)
            self.residency.read_shared(lambda done, total: None)
            return
        require_allowed(size, what, allowed, sum(file.size for file in self.files))
        progress, self._reading = self._reading, None
        if progress is not None:
            read_whole(self.files, progress)

    def identity(self) -> dict[str, str]:
        """What the bits of a cache depend on; see `Backend.identity`."""
        activations = "float32" if self._exact else "int8"
        if self.program.amx.unit is not None:
            activations += " or, in prefill, bfloat16"
        return {
            "weights": fingerprint(self.source),
            "arithmetic": f"engine {self._simd.name}, {activations} activations, "
            f"{self._kv.name} KV, kernels {self._simd.sources}",
        }

    def prefill(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        trace: Trace | None = None,
    ) -> Step:
        """Append a chunk of T prompt tokens; logits (1, V), or (T, V) with `all_logits`.

        Each micro-batch counts as one step of `trace`: weights are read once in each.

        Raises:
            InputError: bad tokens or lengths.
        """
        ids, own = self._checked(tokens, cache)
        logits, hidden = [], []
        rows = self._rows_at_once
        for at in range(0, len(ids), rows):
            part = ids[at : at + rows]
            last = at + len(part) == len(ids)
            wanted = len(part) if all_logits else int(last)
            step = self._trunk(part, own, wanted, trace)
            logits.append(step.logits)
            hidden.append(step.hidden)
        return Step(np.concatenate(logits), np.concatenate(hidden))

    def decode(self, tokens: Tokens, cache: Cache, trace: Trace | None = None) -> Step:
        """Append 1..4 tokens; logits (T, V) of every row."""
        ids, own = self._checked(tokens, cache)
        if len(ids) > _MAX_DECODE_ROWS:
            raise InputError(f"decode takes 1 to {_MAX_DECODE_ROWS} tokens, not {len(ids)}")
        return self._trunk(ids, own, len(ids), trace, row_by_row=True)

    def draft_cost(self, depth: int) -> float:
        """See `Backend.draft_cost`."""
        return self._reads.draft_cost(depth)

    @cached_property
    def _reads(self) -> StepReads:
        return step_reads(self.source)

    def draft(
        self,
        cache: Cache,
        hidden: Array,
        next_tokens: Tokens,
        depth: int,
        choose: Callable[[Array], int],
    ) -> list[int]:
        """Feed verified rows to the MTP layers and draft up to `depth` tokens; see
        `refimpl.engine.drafting`."""
        own = self._own(cache)
        layers = self.config.num_nextn_predict_layers
        if not 0 <= depth <= layers:
            raise InputError(f"{depth} drafts asked for; the model has {layers} MTP layers")
        if not layers:
            return []
        following = self._ids(next_tokens)

        def run(k: int, u: Array, ids: list[int], start: int) -> tuple[Array, Array]:
            return self._mtp_rows(k, u, ids, start, own)

        return draft_chain(own.mtp, own.tokens, hidden, following, depth, choose, run)

    def run_layers(
        self, hidden: Array, tokens: Tokens, cache: Cache, layers: range, trace: Trace
    ) -> Step:
        """Rows of the residual stream, (T, H), the input of the first of some trunk layers,
        through these layers alone; (T, H) behind the last, and logits (T, V) if the trunk's last
        is one. The cache is of no use for anything else: other layers have no keys in it.

        Raises:
            InputError: bad tokens or lengths.
        """
        from refimpl.engine.tracing import Tracer

        ids, own = self._checked(tokens, cache)
        tracer, steps, rows = Tracer(self.source, self.program), [], self._rows_at_once
        for at in range(0, len(ids), rows):
            part = ids[at : at + rows]
            h = np.ascontiguousarray(hidden[at : at + rows], dtype=np.float32)
            trace.begin_step()
            steps.append(tracer.trunk(part, h, own, len(part), False, trace, layers))
            own.tokens.extend(part)
        return Step(
            np.concatenate([s.logits for s in steps]), np.concatenate([s.hidden for s in steps])
        )

    def working_memory(self) -> list[Bytes]:
        """The arrays that activations live in; their pages are taken when first used."""
        return self.program.working_memory()

    @property
    def description(self) -> dict[str, Any]:
        """What runs it: instruction set, threads, activations, KV type."""
        return {
            "simd": self._simd.name,
            "threads": self.threads,
            "activations": "float32" if self._exact or not self._simd.integer else "int8",
            "amx": self.program.amx.text,
            "kv_type": self._kv.name,
            "experts_held": None if self.residency is None else self.residency.slots,
        }

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that the tensors lie in."""
        return self.program.files

    @property
    def kv_value_bytes(self) -> float:
        """Bytes that a cached value takes, its share of the scales included."""
        return self._kv.row_bytes(32) / 32

    def read_ahead(self, progress: Callable[[int, int], None]) -> bool:
        """Read the checkpoint into memory, if it is large and fits, or else what every token
        reads; whether anything was read. Where memory is limited, the first cache decides about
        that, and it is read then."""
        if self.residency is not None:
            self.residency.read_shared(progress)
            return True
        if self._allowed is not None:
            self._reading = progress
            return False
        return read_whole(self.files, progress)

    def close(self) -> None:
        """End the engine's threads; the model cannot be used afterwards."""
        self.team.close()
        if self.residency is not None:
            self.residency.close()

    def mtp_teacher_forced(self, tokens: Tokens, hidden: Array) -> list[tuple[Array, Array]]:
        """Logits (T-1-k, V) and block outputs (T-1-k, H) of every MTP layer k over a known text,
        as `ReferenceModel.mtp_teacher_forced`."""
        ids, first = self._ids(tokens), self.config.num_hidden_layers
        cache, u, out = self.new_cache(len(ids)), hidden, []
        rows_at_once = self._rows_at_once
        for k in range(self.config.num_nextn_predict_layers):
            count = max(0, len(ids) - 1 - k)
            rows, logits = [u[:0]], [np.empty((0, self.config.vocab_size), dtype=np.float32)]
            for at in range(0, count, rows_at_once):
                part = slice(at, min(at + rows_at_once, count))
                embedded = self._embedded(ids[k + 1 :][part])
                layers = range(first + k, first + k + 1)
                made = self.program.run(u[part], layers, cache, at, 0, embedded)
                rows.append(made[0])
                logits.append(made[1])
            u = np.concatenate(rows)
            out.append((np.concatenate(logits), u))
        return out

    @property
    def _rows_at_once(self) -> int:
        """Rows of a step: a micro-batch, or as many as memory holds the experts of."""
        most = self._micro_batch
        return most if self.residency is None else min(most, self.residency.max_rows)

    def _trunk(self, tokens: list[int], cache: EngineCache, wanted: int,
               trace: Trace | None = None, row_by_row: bool = False) -> Step:  # fmt: skip
        """Run T rows; logits of the last `wanted` ones."""
        h, count = self._embedded(tokens), len(tokens)
        n = self.config.num_hidden_layers
        if trace is not None:
            from refimpl.engine.tracing import Tracer

            trace.begin_step()
            tracer = Tracer(self.source, self.program)
            step = tracer.trunk(tokens, h, cache, wanted, row_by_row, trace)
            hidden, logits = step.hidden, step.logits
        else:
            hidden, logits = self.program.run(h, range(n), cache, cache.length, count - wanted)
        cache.tokens.extend(tokens)
        cache.undoable = min(cache.undoable + count, SPECULATIVE_ROWS)
        return Step(logits, hidden)

    def _mtp_rows(
        self, k: int, u: Array, ids: list[int], start: int, cache: EngineCache
    ) -> tuple[Array, Array]:
        """Rows (R, H) of MTP layer k from position `start`, and the last one's logits (V,)."""
        layer = self.config.num_hidden_layers + k
        out = []
        rows_at_once = self._rows_at_once
        if len(u) <= rows_at_once:
            layers, last = range(layer, layer + 1), len(u) - 1
            rows, logits = self.program.run(u, layers, cache, start, last, self._embedded(ids))
            return rows, logits[0]
        for at in range(0, len(u), rows_at_once):
            part = slice(at, at + rows_at_once)
            embedded = self._embedded(ids[part])
            count = len(embedded)
            last = at + count == len(u)
            rows, logits = self.program.run(
                u[part], range(layer, layer + 1), cache, start + at,
                count - 1 if last else count, embedded,
            )  # fmt: skip
            out.append(rows)
        return np.concatenate(out), logits[0]

    def _embedded(self, ids: list[int]) -> Array:
        """Rows of the embedding table, (T, H) float32; of a few tokens, those used lately are
        kept: drafting and verifying ask for the same ones."""
        if len(ids) > _MAX_DECODE_ROWS:
            return self.source.rows("embed_tokens", None, ids, np.float32)
        kept = self._lately
        if missing := [token for token in ids if token not in kept]:
            if 4 * self.config.hidden_size * len(kept) > _KEPT_BYTES:
                kept.clear()
                missing = ids
            rows = self.source.rows("embed_tokens", None, missing, np.float32)
            kept.update(zip(missing, rows, strict=True))
        return kept[ids[0]][None] if len(ids) == 1 else np.array([kept[token] for token in ids])

    def _checked(self, tokens: Tokens, cache: Cache) -> tuple[list[int], EngineCache]:
        own, ids = self._own(cache), self._ids(tokens)
        if own.length + len(ids) > own.capacity:
            needed = own.length + len(ids)
            raise InputError(f"{needed} tokens do not fit the context of {own.capacity}")
        return ids, own

    def _own(self, cache: Cache) -> EngineCache:
        if not isinstance(cache, EngineCache) or cache.owner is not self:
            raise InputError("this cache belongs to another model; make one with new_cache()")
        return cache

    def _ids(self, tokens: Tokens) -> list[int]:
        ids: list[int] = np.asarray(tokens, dtype=np.int64).reshape(-1).tolist()
        vocab = self.config.vocab_size
        if not ids:
            raise InputError("no tokens given; at least one is needed")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(token for token in ids if not 0 <= token < vocab)
            raise InputError(f"token id {bad} is outside the vocabulary of {vocab}")
        return ids


def _kv_type(name: str) -> KvType:
    if name not in KV_TYPES:
        raise InputError(f"kv type is {name!r}, expected one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name]

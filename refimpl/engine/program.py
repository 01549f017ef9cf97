"""The prepared program of a checkpoint: its records, its working memory, and running it."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refimpl.backend import Array
from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.activations import prepare, scratch_bytes
from refimpl.engine.amx_choice import AmxChoice
from refimpl.engine.apart import step_apart
from refimpl.engine.attention import attending
from refimpl.engine.caches import EngineCache
from refimpl.engine.compiled_files import kept_in_order
from refimpl.engine.fields import ATTENTION_PART, FFN_PART, Layer, Matrix, Step, float_bits
from refimpl.engine.files import MappedFile
from refimpl.engine.heads import attention_scratch, partial_bytes
from refimpl.engine.kv import KvType, storing
from refimpl.engine.memory import ALIGNMENT, Bytes, address, require_memory, round_up, zeroed
from refimpl.engine.moe import group_table_bytes
from refimpl.engine.records import LayerRecord, Record, Records, Site, layer_record
from refimpl.engine.rotations import Rotations
from refimpl.engine.simd import Simd
from refimpl.engine.step import CLAIMS_PER_LAYER, runner
from refimpl.engine.threads import Team
from refimpl.engine.tiles import MANY
from refimpl.engine.work import CLAIM_BYTES, MAX_CHUNK, SCRATCH_HEADER
from refimpl.reference.rope import frequencies


@dataclass(frozen=True)
class _Head:
    """An output head with its norm, and the MTP layer's input projection where there is one."""

    matrix: int
    norm: int
    site: Site
    eh: int = 0
    eh_site: Site | None = None
    enorm: int = 0
    hnorm: int = 0


class Program:
    """Runs rows through ranges of layers of one checkpoint, one call at a time."""

    def __init__(
        self,
        source: StoredSource,
        team: Team,
        simd: Simd,
        exact: bool,
        kv: KvType,
        max_rows: int,
    ) -> None:
        self._config, self._team, self._max_rows = source.config, team, max_rows
        with kept_in_order(simd), step_apart(simd):
            self._records = Records(source, simd, exact)
            self._freqs: list[Array] = []
            self._layers = [self._layer(i) for i in range(self._config.num_layers)]
            self._heads = self._all_heads()
            self._table: NDArray[np.int64] = np.array([r.address for r in self._layers], np.int64)
            self._step = self._records.record(Step.SIZE)
            self._memory: dict[Step, Bytes] = {}
            self._barrier = zeroed(64)
            self._allocate()
            self._fixed_fields(simd, kv)
        self._run = runner(simd).ctypes
        # Steps with few rows take less time than dozens of NumPy's accesses to single fields.
        self._fields = self._step.data
        self._step_address = address(self._step)
        self._barrier_count = self._barrier[:8].view(np.int64).data
        self._templates: dict[tuple[int, int], Record] = {}
        self._lock = threading.Lock()
        self._finish: Callable[[], None] | None = None
        # Runs by (first layer, stop, whether a head was run).
        self.runs: Counter[tuple[int, int, bool]] = Counter()

    def run(
        self,
        h: Array,
        layers: range,
        cache: EngineCache,
        start: int,
        head_first: int,
        embedded: Array | None = None,
        parts: int = ATTENTION_PART | FFN_PART,
    ) -> tuple[Array, Array]:
        """Run rows through layers: h (T, H) float32 -> (T, H) and logits (T - head_first, V).

        Args:
            layers: consecutive layers, of the trunk or one MTP layer.
            start: position of the first row.
            head_first: first row whose logits are wanted.
            embedded: (T, H) embeddings; with them the MTP layer's input projection comes first.
            parts: which halves of the layers are run.

        Raises:
            CheckpointError: the checkpoint file shrank.
        """
        count = len(h)
        logits = np.empty((count - head_first, self._config.vocab_size), dtype=np.float32)
        with self._lock:
            self._records.check_files()
            rows = self._h[:count]
            rows[:] = h
            given = None if embedded is None else np.ascontiguousarray(embedded, np.float32)
            self._fill(count, layers, cache, start, given)
            fields = self._fields
            if count > head_first:
                fields[Step.HEAD] = self._heads[layers.stop - 1].matrix
                fields[Step.HEAD_FIRST] = head_first
                fields[Step.OUT_LOGITS] = address(logits)
            fields[Step.PARTS] = parts
            self.runs[layers.start, layers.stop, count > head_first] += 1
            self._team.run(self._run, self._step_address)
            if self._finish is not None:
                self._finish()
            return rows.copy(), logits

    def layer_address(self, layer: int) -> int:
        """Where a layer's record lies."""
        return self._layers[layer].address

    def set_places(self, layer: int, number: Layer, places: NDArray[np.int64]) -> None:
        """Let a stack's matrices lie where `places` (E,) says, 0 for those still to come."""
        at = 8 * int(number)
        matrix = ctypes.c_int64.from_address(self._layers[layer].address + at).value
        field = ctypes.c_int64.from_address(matrix + 8 * int(Matrix.PLACES))
        field.value = self._records.keep(places)

    def attach(
        self,
        fetch: int,
        answers: NDArray[np.int64],
        order: NDArray[np.int64],
        finish: Callable[[], None],
    ) -> None:
        """Have experts fetched: `fetch` is the address of a function that is called with a MoE
        layer's record when its experts have been chosen, and returns at once. When `answers` (1,)
        has been raised by one, `order` (E,) says in which order the experts are computed.
        `finish` is called after every run."""
        self._step[Step.FETCHED] = self._records.keep(answers)
        self._step[Step.ORDER] = self._records.keep(order)
        self._step[Step.FETCH] = fetch
        self._finish = finish
        self._templates.clear()

    @property
    def amx(self) -> AmxChoice:
        """Whether prefill uses AMX."""
        return self._records.amx

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that the tensors lie in."""
        return tuple(self._records.files.values())

    def experts_used(self) -> list[int]:
        """Distinct experts of each layer, summed over all runs."""
        at = 8 * int(Layer.USED)
        return [ctypes.c_int64.from_address(r.address + at).value for r in self._layers]

    def field(self, number: Step) -> int:
        """A field of the step's record."""
        return int(self._step[number])

    def working(self, number: Step, dtype: DTypeLike, shape: tuple[int, int]) -> Array:
        """What the last run left in a part of the working memory: a view, as (rows, columns)."""
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        return self._memory[number][:size].view(dtype).reshape(shape)

    def normed(self, rows: int) -> Array:
        """A copy of the normed rows (rows, H) that the last run gave to its output head."""
        shape = (rows, self.field(Step.BLOB_BYTES) // 4)
        normed = self.working(Step.BLOB, np.float32, shape)[:, : self._config.hidden_size]
        return normed.copy()

    def working_memory(self) -> list[Bytes]:
        """The arrays that activations live in."""
        return list(self._memory.values())

    def _fill(self, count: int, layers: range, cache: EngineCache, start: int,
              embedded: Array | None) -> None:  # fmt: skip
        """What differs from run to run: rows, layers, caches, positions."""
        cache.before_run(layers, start, count)
        self._rotations.use(start, count)
        template = self._templates.get((layers.start, layers.stop))
        self._step[:] = self._template(layers) if template is None else template
        fields = self._fields
        fields[Step.ROWS], fields[Step.START] = count, start
        fields[Step.KV_TABLE] = cache.table_address + 8 * layers.start
        if embedded is not None:
            fields[Step.EMBEDDED] = address(embedded)
        self._claims[: self._claim_bytes(len(layers))] = 0
        fields[Step.BARRIER_BASE] = self._barrier_count[0]

    def _template(self, layers: range) -> Record:
        """The record of a run through some layers, as far as it is always the same: no logits,
        and if they are an MTP layer's, no embeddings yet."""
        made = self._templates[layers.start, layers.stop] = self._step.copy()
        made[Step.LAYERS] = len(layers)
        made[Step.LAYER_TABLE] = address(self._table) + 8 * layers.start
        made[Step.EMBEDDED] = made[Step.HEAD] = 0
        head = self._heads.get(layers.stop - 1)
        if head is not None:
            made[Step.FINAL_NORM], made[Step.FINAL_PLAN] = head.norm, address(head.site.plan)
            made[Step.OUT_BYTES] = 4 * self._config.vocab_size
            if head.eh_site is not None:
                made[Step.EH], made[Step.EH_PLAN] = head.eh, address(head.eh_site.plan)
                made[Step.ENORM], made[Step.HNORM] = head.enorm, head.hnorm
        return made

    def _claim_bytes(self, layers: int) -> int:
        """Of the counters that a run through so many layers uses at most."""
        return CLAIM_BYTES * self._team.size * (CLAIMS_PER_LAYER * layers + 16)

    def _layer(self, index: int) -> LayerRecord:
        c = self._config
        spec = c.layers[index]
        freqs = frequencies(spec)
        same = (i for i, f in enumerate(self._freqs) if np.array_equal(f, freqs))
        rope = next(same, len(self._freqs))
        if rope == len(self._freqs):
            self._freqs.append(freqs)
        widths = (c.moe_intermediate_size if spec.is_moe else c.intermediate_size,
                  c.share_expert_dim)  # fmt: skip
        return layer_record(self._records, spec, rope, c.hidden_size, widths)

    def _all_heads(self) -> dict[int, _Head]:
        """The output head behind the trunk's last layer and behind each MTP layer."""
        c, records = self._config, self._records
        site = records.site(c.hidden_size, ("lm_head",), None)
        last = c.num_hidden_layers - 1
        heads = {last: _Head(records.matrix("lm_head", None, site), records.norm("norm", None),
                             site)}  # fmt: skip
        for i in range(c.num_hidden_layers, c.num_layers):
            site = records.site(c.hidden_size, ("shared_head.output",), i)
            eh_site = records.site(2 * c.hidden_size, ("eh_proj",), i)
            heads[i] = _Head(
                records.matrix("shared_head.output", i, site),
                records.norm("shared_head.norm", i),
                site,
                records.matrix("eh_proj", i, eh_site),
                eh_site,
                records.norm("enorm", i),
                records.norm("hnorm", i),
            )
        return heads

    def _allocate(self) -> None:
        """Working memory for `max_rows` rows; pages are taken when first used."""
        c, t, step = self._config, self._max_rows, self._step
        sites = [h.site for h in self._heads.values()]
        sites += [h.eh_site for h in self._heads.values() if h.eh_site]
        inputs = [r.input for r in self._layers] + sites
        shared = [r.shared for r in self._layers if r.shared]
        heads = max(s.num_attention_heads for s in c.layers)
        group_heads = max(s.num_attention_heads // s.num_attention_groups for s in c.layers)
        kv_bytes = 4 * c.num_attention_groups * c.head_dim
        moe = any(s.is_moe for s in c.layers)
        experts, k = (c.moe_num_experts, c.moe_top_k) if moe else (0, 1)
        columns = max(2 * c.hidden_size, c.intermediate_size, heads * c.head_dim,
                      c.moe_intermediate_size, c.share_expert_dim)  # fmt: skip
        free = max(scratch_bytes(columns), attention_scratch(group_heads, c.head_dim), experts)
        hidden = max(r.hidden.blob_bytes for r in self._layers)
        per_row = {
            Step.BLOB_BYTES: max(s.blob_bytes for s in inputs),
            Step.QUERY_BYTES: 4 * heads * c.head_dim,
            Step.KV_BYTES: kv_bytes,
            Step.GATE_BYTES: 4 * round_up(heads, 16),
            Step.HEADS_BLOB_BYTES: max(r.heads.blob_bytes for r in self._layers),
            Step.LOGITS_BYTES: 4 * round_up(experts, 16),
            Step.HIDDEN_BLOB_BYTES: hidden,
            Step.SHARED_BLOB_BYTES: max((s.blob_bytes for s in shared), default=0),
            Step.SCRATCH_BYTES: self._scratch_layout(columns, free),
        }
        for number, size in per_row.items():
            step[number] = size
        wanted = {
            Step.H: t * 4 * c.hidden_size,
            Step.BLOB: t * per_row[Step.BLOB_BYTES],
            Step.QUERIES: t * per_row[Step.QUERY_BYTES],
            Step.KEYS: t * kv_bytes,
            Step.VALUES: t * kv_bytes,
            Step.GATES: t * per_row[Step.GATE_BYTES],
            Step.HEADS_BLOB: t * per_row[Step.HEADS_BLOB_BYTES],
            Step.LOGITS: t * per_row[Step.LOGITS_BYTES],
            Step.CHOSEN: 8 * t * k,
            Step.WEIGHTS: 4 * t * k,
            Step.GROUPS: group_table_bytes(experts, t * k),
            Step.HIDDEN_BLOB: t * k * hidden,
            Step.SHARED_BLOB: t * per_row[Step.SHARED_BLOB_BYTES],
            Step.ROUTED: t * 4 * c.hidden_size,
            Step.PARTIALS: max(partial_bytes(s, c.max_position_embeddings) for s in c.layers),
            Step.DONE: 64 * c.num_attention_groups,
            Step.SCRATCH: self._team.size * per_row[Step.SCRATCH_BYTES],
            Step.CLAIMS: self._claim_bytes(c.num_layers),
        }
        require_memory(
            sum(wanted.values()), f"working memory for a micro-batch of {t:,} rows",
            "ask for a smaller --micro-batch, or free memory",
        )  # fmt: skip
        parts = {number: zeroed(size) for number, size in wanted.items()}
        self._memory = parts
        for number, part in parts.items():
            step[number] = address(part)
        self._h = parts[Step.H].view(np.float32).reshape(t, c.hidden_size)
        self._claims = parts[Step.CLAIMS]

    def _scratch_layout(self, columns: int, free: int) -> int:
        """Where the parts of a thread's scratch memory begin; its size, whole pages."""
        y_bytes = 4 * max(MAX_CHUNK * MANY, self._records.unit_rows * self._max_rows)
        at = SCRATCH_HEADER
        for number, size in ((Step.BLOBS, 8 * self._max_rows), (Step.FIRST_Y, y_bytes),
                             (Step.SECOND_Y, y_bytes), (Step.TILES, self._records.tile_bytes),
                             (Step.FREE, free)):  # fmt: skip
            self._step[number] = at
            at = round_up(at + size, ALIGNMENT)
        return round_up(at, 4096)

    def _fixed_fields(self, simd: Simd, kv: KvType) -> None:
        c, step = self._config, self._step
        step[Step.HIDDEN_SIZE], step[Step.EXPERTS] = c.hidden_size, c.moe_num_experts
        step[Step.TOP_K] = c.moe_top_k
        step[Step.EPS] = float_bits(c.rms_norm_eps)
        step[Step.ROUTER_SCALE] = float_bits(c.moe_router_scaling_factor)
        step[Step.THREADS], step[Step.BARRIER] = self._team.size, address(self._barrier)
        step[Step.PREPARE] = prepare(simd).address
        step[Step.STORE] = storing(simd, kv).address
        step[Step.ATTEND] = attending(simd, kv).address
        self._rotations = Rotations(self._freqs, self._max_rows)
        for number, places in zip((Step.COS, Step.SIN), self._rotations.places, strict=True):
            step[number] = address(places)

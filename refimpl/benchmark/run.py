"""Running the tests of a benchmark over one open model.

Each test is warmed up (compiled kernels, pages of the map, threads), then timed over its
repetitions; every repetition starts from the same cache. Tokens are random, as in llama-bench.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.backend import Array, Backend, Cache
from refimpl.backends import model_path
from refimpl.benchmark.plan import BenchTest, Settings
from refimpl.benchmark.simulated import SimulatedAcceptance
from refimpl.checkpoint.stored import StoredSource
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.errors import InputError
from refimpl.inventory import inventory
from refimpl.text.tokenizer import NO_TOKENIZER, Tokenizer

if TYPE_CHECKING:
    from refimpl.decoding.generation import GenerateOptions, Generation
    from refimpl.engine.stats import TrafficCounter

Note = Callable[[str], None]
_WARM_STEPS = 8
_LOOP_PROMPT = 16  # random tokens before a loop without prompt or depth
CHUNK = 2048  # tokens of one prefill call, llama-bench's default batch
_PAGE = 4096


@dataclass(frozen=True)
class BenchResult:
    """One test with its raw samples.

    Attributes:
        samples_ns: time of each repetition.
        tokens: tokens timed in each repetition (differ only where a text ended early).
        steps: decoding steps, summed over repetitions; 0 for a prefill.
        drafted, accepted: of the draft-and-verify loop, summed over repetitions.
        weight_bytes_per_step: stored bytes of the tensors and selected experts that a decoding
            step read, as the engine counted them; None for the reference and for the loop.
        kv_bytes_per_step: keys and values that any row of a decoding step can see.
        started: seconds since the epoch when the timed part began.
        resident: see `refimpl.engine.resident`; after the test.
        turns: labels of the tests that took turns with this one, its own included.
    """

    test: BenchTest
    samples_ns: tuple[int, ...]
    tokens: tuple[int, ...]
    started: float
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    weight_bytes_per_step: float | None = None
    kv_bytes_per_step: float | None = None
    resident: dict[str, int] | None = None
    turns: tuple[str, ...] = ()

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        pairs = zip(self.tokens, self.samples_ns, strict=True)
        return tuple(1e9 * n / ns for n, ns in pairs)


class Bench:
    """An open model and what its tests share; close it, or use `open_bench`."""

    def __init__(self, path: Path, source: StoredSource, backend: Backend, settings: Settings,
                 tokenizer: Tokenizer | None) -> None:  # fmt: skip
        self.path, self.source, self.backend, self.settings = path, source, backend, settings
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(settings.seed)
        self._counter = _counter(source, backend)

    def check(self, tests: Sequence[BenchTest]) -> None:
        """Refuse, before any of them runs, tests that go beyond the model's context.

        Raises:
            InputError: names the test, with the arithmetic.
        """
        most = self.backend.config.max_position_embeddings
        for test in (t for t in tests if t.capacity > most):
            raise InputError(
                f"{test.label} needs {test.capacity:,} positions ({test.n_depth:,} of depth, "
                f"{test.tokens:,} timed, {SPECULATIVE_ROWS} for drafts); the model has {most:,}"
            )

    def run(self, test: BenchTest) -> BenchResult:
        """Warm a test up and time it.

        Raises:
            InputError: it does not fit the model, its context or the machine's memory.
        """
        if test.mtp:
            return self._loops([test])[0]
        cache, restore = self._at_depth(test)
        work = self._prompt if test.n_prompt else self._steps
        work(test, cache, True)
        started, samples, read = time.time(), [], 0
        for _ in range(self.settings.repetitions):
            restore()
            before = self._weight_bytes()
            samples.append(work(test, cache, False))
            read += self._weight_bytes() - before
        count = (test.tokens,) * len(samples)
        steps = 0 if test.n_prompt else test.tokens // test.n_rows * len(samples)
        counted = steps and self._counter is not None
        return BenchResult(
            test, tuple(samples), count, started, steps,
            weight_bytes_per_step=read / steps if counted else None,
            kv_bytes_per_step=self._kv_bytes(test) if counted else None,
            resident=self._resident(cache),
        )  # fmt: skip

    def run_all(self, tests: Sequence[BenchTest]) -> Iterator[BenchResult]:
        """Run tests in order; those of the draft-and-verify loop that follow one another take
        turns and are given together.

        Raises:
            InputError: as `run`.
        """
        for of_loop, group in itertools.groupby(tests, lambda t: bool(t.mtp)):
            if of_loop:
                yield from self._loops(list(group))
            else:
                yield from map(self.run, group)

    def _weight_bytes(self) -> int:
        return 0 if self._counter is None else self._counter.now().weight_bytes

    def _kv_bytes(self, test: BenchTest) -> float:
        """Mean over the steps of a test: rows that any query of the step sees."""
        values, starts = 0, range(test.n_depth, test.n_depth + test.tokens // test.n_rows)
        config = self.backend.config
        for spec in config.layers[: config.num_hidden_layers]:
            row = 2 * spec.num_attention_groups * spec.head_dim
            for start in starts:
                seen = start + test.n_rows
                if spec.window is not None:
                    seen = min(seen, spec.window + test.n_rows - 1)
                values += row * seen
        return values * self.backend.kv_value_bytes / len(starts)  # type: ignore[attr-defined]

    def _at_depth(self, test: BenchTest) -> tuple[Cache, Callable[[], None]]:
        """A cache with `n_depth` tokens, and what brings it back to there."""
        cache = self.backend.new_cache(test.capacity)
        if test.n_depth and self.settings.synthetic_kv:
            cache.fill_synthetic(self._ids(test.n_depth), self.settings.seed)  # type: ignore[attr-defined]
        elif test.n_depth:
            self._prefill(cache, self._ids(test.n_depth))
        saved = cache.snapshot()
        return cache, lambda: cache.restore(saved)

    def _prompt(self, test: BenchTest, cache: Cache, warm: bool) -> int:
        ids = self._ids(test.n_prompt)
        if warm:
            ids = ids[:CHUNK]
        began = time.perf_counter_ns()
        self._prefill(cache, ids)
        return time.perf_counter_ns() - began

    def _steps(self, test: BenchTest, cache: Cache, warm: bool) -> int:
        """Decoding steps of `n_rows` random tokens each, one of which stays."""
        count = test.tokens // test.n_rows
        ids = self._ids(min(count, _WARM_STEPS) * test.n_rows if warm else test.tokens)
        rows = ids.reshape(-1, test.n_rows)
        decode, rollback = self.backend.decode, cache.rollback
        began = time.perf_counter_ns()
        for row in rows:
            decode(row, cache)
            if test.n_rows > 1:
                rollback(test.n_rows - 1)
        return time.perf_counter_ns() - began

    def _prefill(self, cache: Cache, ids: Array) -> None:
        for at in range(0, len(ids), CHUNK):
            self.backend.prefill(ids[at : at + CHUNK], cache)

    def _loops(self, tests: Sequence[BenchTest]) -> list[BenchResult]:
        """The draft-and-verify loop as `refimpl generate` runs it; only its steps are timed.

        The tests take turns, generation by generation and in alternating order, so that what
        comes over the machine meanwhile comes over all of them.
        """
        loops = [_Loop(self.backend, test, self.settings) for test in tests]
        prompts = {test.n_depth: self._prompts(test) for test in tests}
        for loop in loops:
            loop.warm_up(prompts[loop.test.n_depth][0])
        started, turn = time.time(), 0
        for _ in range(self.settings.repetitions):
            for loop in loops:
                loop.begin()
            for number in range(max(map(len, prompts.values()))):
                turn += 1
                for loop in loops if turn % 2 else loops[::-1]:
                    loop.run(prompts[loop.test.n_depth][number])
        resident = self._resident(None)
        return [loop.result(started, resident, tests) for loop in loops]

    def _prompts(self, test: BenchTest) -> list[list[int]]:
        texts = self.settings.prompts
        if not texts:
            return [self._ids(max(test.n_depth, _LOOP_PROMPT)).tolist()]
        if self._tokenizer is None:
            raise InputError(NO_TOKENIZER.format(path=self.path))
        return [self._tokenizer.encode(text) for text in texts]

    def _ids(self, count: int) -> Any:
        return self._rng.integers(self.backend.config.vocab_size, size=count)

    def _resident(self, cache: Any) -> dict[str, int] | None:
        from refimpl.engine.resident import resident_of

        if not hasattr(self.backend, "working_memory"):
            return None
        return resident_of(self.backend, [] if cache is None else cache.blocks())


class _Loop:
    """One test of the draft-and-verify loop, generation by generation; as in a chat, its draft
    policy is kept from one to the next, the warm-up being the first."""

    def __init__(self, backend: Backend, test: BenchTest, settings: Settings) -> None:
        from refimpl.decoding.generate import policy_for
        from refimpl.decoding.generation import GenerateOptions

        self.test = test
        mtp: Any = "auto" if test.mtp == "auto" else int(test.mtp)
        self._options = GenerateOptions(max_new_tokens=test.n_gen + 1, mtp=mtp, stop_tokens=())
        self._backend = backend
        if settings.acceptance:
            self._backend = SimulatedAcceptance(backend, settings.acceptance, settings.seed)
        self._policy = policy_for(self._backend, mtp)
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._counts = np.zeros(3, dtype=int)  # steps, drafted, accepted

    def warm_up(self, prompt: list[int]) -> None:
        """A short generation whose time does not count."""
        self._generate(prompt, replace(self._options, max_new_tokens=4 * _WARM_STEPS))

    def _generate(self, prompt: list[int], options: GenerateOptions) -> Generation:
        from refimpl.decoding.generate import generate

        made = generate(self._backend, prompt, options, policy=self._policy)
        if made.finish_reason == "interrupted":  # Ctrl-C ends a text early
            raise KeyboardInterrupt
        return made

    def begin(self) -> None:
        """Begin the next repetition."""
        self._seconds.append(0.0)
        self._tokens.append(0)

    def run(self, prompt: list[int]) -> None:
        """One generation."""
        run = self._generate(prompt, self._options)
        self._seconds[-1] += run.timings.decode_s
        self._tokens[-1] += run.timings.decoded_tokens
        self._counts += (run.mtp.steps, run.mtp.drafted, run.mtp.accepted)

    def result(
        self, started: float, resident: dict[str, int] | None, tests: Sequence[BenchTest]
    ) -> BenchResult:
        steps, drafted, accepted = (int(n) for n in self._counts)
        samples = tuple(round(1e9 * s) for s in self._seconds)
        return BenchResult(
            self.test, samples, tuple(self._tokens), started, steps, drafted, accepted,
            resident=resident, turns=tuple(t.label for t in tests),
        )  # fmt: skip


@contextlib.contextmanager
def open_bench(
    model: str | Path, settings: Settings, note: Note = lambda _: None
) -> Iterator[Bench]:
    """Open a model for benchmarking and read its file once, so that no test waits for the disk.

    Raises:
        InputError, CheckpointError, ConfigError: the model or a setting cannot be used.
    """
    from refimpl.backends import limited_threads, quiet
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.text.tokenizer import tokenizer_of

    path = model_path(model)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(open_checkpoint(path)))
        stack.enter_context(limited_threads(settings.threads))
        stack.enter_context(quiet())
        for warning in source.warnings:
            note(f"note: {warning}")
        backend = _backend(source, settings, note)
        if hasattr(backend, "close"):
            stack.callback(backend.close)
        if getattr(backend, "residency", None) is not None:
            backend.read_ahead(lambda done, total: None)  # type: ignore[attr-defined]
        else:
            _touch(source)
        tokenizer = tokenizer_of(path, source.metadata or None) if settings.prompts else None
        yield Bench(path, source, backend, settings, tokenizer)


def _backend(source: StoredSource, settings: Settings, note: Note) -> Backend:
    if settings.backend == "reference":
        from refimpl.reference.model import ReferenceModel

        return ReferenceModel(source)
    from refimpl.engine.jit import announced
    from refimpl.engine.model import MICRO_BATCH, EngineModel

    with announced(lambda: note("compiling kernels for this CPU, once")):
        model = EngineModel(
            source,
            threads=settings.threads,
            exact=settings.exact,
            kv_type=settings.kv_type,
            micro_batch=settings.micro_batch or MICRO_BATCH,
            memory_bytes=settings.memory_bytes,
        )
    if model.program.amx.failed:
        note(f"note: prefill without AMX: {model.program.amx.reason}")
    return model


def _counter(source: StoredSource, backend: Backend) -> TrafficCounter | None:
    """What counts the bytes that the engine reads; None for the reference."""
    from refimpl.engine.model import EngineModel
    from refimpl.engine.stats import TrafficCounter

    return TrafficCounter(source, backend) if isinstance(backend, EngineModel) else None


def _touch(source: StoredSource) -> None:
    """Map every page of the checkpoint, unless it is larger than the memory that is free."""
    import psutil

    tensors = [source.stored(t.key, t.layer) for t in inventory(source.config)]
    if sum(t.stored_bytes for t in tensors) > psutil.virtual_memory().available:
        return
    for tensor in tensors:
        tensor.rows.reshape(-1)[::_PAGE].max(initial=0)

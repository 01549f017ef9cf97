"""What a benchmark is asked for: tests, and the settings that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.errors import InputError

MAX_ROWS = SPECULATIVE_ROWS + 1
DRAFTS = ("0", "1", "2", "3", "auto")


@dataclass(frozen=True)
class BenchTest:
    """One test; names and meanings are those of llama-bench where it has them.

    Attributes:
        n_prompt: tokens of a prompt that is run in chunks (pp), or 0.
        n_gen: tokens that are decoded (tg), or 0; a test has either of the two.
        n_depth: tokens that are in the cache before the clock starts.
        n_rows: tokens of one decoding step: 1, or 2 to 4 as when drafts are verified. All rows
            but the first are rolled back after each step, as if their drafts had been rejected.
        mtp: drafts of the whole draft-and-verify loop ('0' to '3', 'auto'), or '' for decoding
            steps alone, as in llama-bench.

    Raises:
        InputError: numbers that make no test.
    """

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    n_rows: int = 1
    mtp: str = ""

    def __post_init__(self) -> None:
        named = (("-p", self.n_prompt), ("-n", self.n_gen), ("-d", self.n_depth))
        for option, tokens in named:
            if tokens < 0:
                raise InputError(f"{option} is {tokens}, expected 0 or more tokens")
        if (self.n_prompt > 0) == (self.n_gen > 0):
            raise InputError("a test has either a prompt or tokens to generate")
        if not 1 <= self.n_rows <= MAX_ROWS:
            raise InputError(f"{self.n_rows} rows a step asked for, expected 1 to {MAX_ROWS}")
        if self.mtp and self.mtp not in DRAFTS:
            raise InputError(f"mtp is {self.mtp!r}, expected {', '.join(DRAFTS)}")
        if self.n_rows > 1 and (self.n_prompt or self.mtp):
            raise InputError("rows a step can be chosen for plain decoding only")

    @property
    def label(self) -> str:
        """As llama-bench writes it ('pp512', 'tg128 @ d4096'), with rows and drafts behind."""
        text = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        text += f" x{self.n_rows} rows" if self.n_rows > 1 else ""
        text += f" mtp {self.mtp}" if self.mtp else ""
        return text + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are timed in one repetition."""
        return self.n_prompt or max(1, self.n_gen // self.n_rows) * self.n_rows

    @property
    def capacity(self) -> int:
        """Positions that the cache needs."""
        return self.n_depth + self.tokens + SPECULATIVE_ROWS


@dataclass(frozen=True)
class Settings:
    """What all tests of a run share.

    Attributes:
        backend: 'engine' or 'reference'.
        threads: None for the backend's default.
        kv_type, exact, micro_batch: see `refimpl.engine.model.EngineModel`; engine only.
        memory_bytes: what the engine may use of memory; None is what is free.
        repetitions: timed repetitions of each test, after a warm-up.
        acceptance: chances that the 1st, 2nd, 3rd draft stands once those before it did: drafts
            are then accepted at these rates instead of being judged. For files of random weights,
            whose own drafts are never right; figures made with it carry it.
        synthetic_kv: reach a depth by filling the cache with random values, not by a prefill.
        prompts: texts for the draft-and-verify loop, all of them in every repetition; without
            any, one prompt of random tokens.
        seed: of the random tokens and synthetic values.

    Raises:
        InputError: values outside their ranges, or that contradict each other.
    """

    backend: str = "engine"
    threads: int | None = None
    kv_type: str | None = None
    exact: bool = False
    micro_batch: int | None = None
    memory_bytes: int | None = None
    repetitions: int = 5
    acceptance: tuple[float, ...] = ()
    synthetic_kv: bool = False
    prompts: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise InputError(f"repetitions is {self.repetitions}, expected 1 or more")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro-batch is {self.micro_batch}, expected 1 or more rows")
        for chance in self.acceptance:
            if not 0 <= chance <= 1:
                raise InputError(f"--simulate-acceptance has {chance:g}, expected 0 to 1")
        if len(self.acceptance) > SPECULATIVE_ROWS:
            raise InputError(
                f"{len(self.acceptance)} chances of acceptance given; at most "
                f"{SPECULATIVE_ROWS} drafts can be verified in a step"
            )
        if self.backend == "reference":
            given = {"kv-type": self.kv_type, "exact": self.exact, "micro-batch": self.micro_batch,
                     "synthetic-kv": self.synthetic_kv, "memory": self.memory_bytes}  # fmt: skip
            if wrong := [name for name, value in given.items() if value]:
                raise InputError(f"--{wrong[0]} belongs to the engine, not to the reference")

    def check(self, tests: Sequence[BenchTest]) -> None:
        """Refuse tests that do not go with these settings.

        Raises:
            InputError: see there.
        """
        if not tests:
            raise InputError("nothing to run: give a prompt length (-p) or tokens to generate (-n)")
        loops = [t for t in tests if t.mtp]
        if self.acceptance and not loops:
            raise InputError("simulated acceptance needs drafts: add --mtp 1, 2, 3 or auto")
        if self.synthetic_kv and loops:
            raise InputError("drafts need the hidden rows of a real prefill: no --synthetic-kv")


def all_tests(
    prompts: Sequence[int],
    gens: Sequence[int],
    depths: Sequence[int],
    rows: Sequence[int] = (1,),
    drafts: Sequence[str] = (),
) -> list[BenchTest]:
    """Tests in llama-bench's order: for each depth all prompts, then all generations.

    Raises:
        InputError: numbers that make no test.
    """
    out = []
    for depth in depths:
        out += [BenchTest(n_prompt=p, n_depth=depth) for p in prompts if p]
        for n in (g for g in gens if g):
            if drafts:
                out += [BenchTest(n_gen=n, n_depth=depth, mtp=m) for m in drafts]
            else:
                out += [BenchTest(n_gen=n, n_depth=depth, n_rows=r) for r in rows]
    return out

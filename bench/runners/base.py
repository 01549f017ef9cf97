"""What every engine that is measured offers: a name, its build and flags, and `measure`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from hwmodel.errors import HwmodelError


class RunnerError(HwmodelError):
    """An engine is missing, refuses a test, or fails; the message says which and why."""


@dataclass(frozen=True)
class RunnerTest:
    """One test of one model; meanings are llama-bench's.

    Attributes:
        model: the checkpoint file.
        n_prompt: tokens of a timed prefill, or 0.
        n_gen: tokens that are decoded, or 0; a test has either of the two.
        n_depth: tokens in the cache before the clock starts.
        repetitions: timed repetitions after a warm-up.
        threads: None for the engine's default.
        n_rows: tokens of a decoding step (verification of drafts); 1 for plain decoding.
        mtp: drafts of the whole draft-and-verify loop, or '' for plain decoding.
        acceptance: simulated chances that drafts stand; empty for real ones.
        synthetic_kv: a depth is filled with random values, not by a prefill.
        kv_type, micro_batch: None for the engine's default.
    """

    model: Path
    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    repetitions: int = 3
    threads: int | None = None
    n_rows: int = 1
    mtp: str = ""
    acceptance: tuple[float, ...] = ()
    synthetic_kv: bool = False
    kv_type: str | None = None
    micro_batch: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What one engine gave for one test.

    Attributes:
        engine, build: name, and version or commit.
        flags: command line after the program's name, or whatever stands for it.
        samples_ts: tokens per second of each repetition.
        samples_ns: time of each repetition.
        record: the engine's own record, whole.
    """

    engine: str
    build: str
    flags: str
    samples_ts: tuple[float, ...]
    samples_ns: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.samples_ts or not all(0 < x < float("inf") for x in self.samples_ts):
            raise ValueError("speeds must be positive numbers, at least one")

    @property
    def median_ts(self) -> float:
        """Tokens per second, median of the repetitions."""
        return median(self.samples_ts)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        """From what `dataclasses.asdict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no measurement.
        """
        return cls(
            engine=str(data["engine"]),
            build=str(data["build"]),
            flags=str(data["flags"]),
            samples_ts=tuple(float(x) for x in data["samples_ts"]),
            samples_ns=tuple(int(x) for x in data["samples_ns"]),
            record=dict(data["record"]),
        )


class Runner(Protocol):
    """An engine, with the options that make it a variant."""

    @property
    def name(self) -> str:
        """Engine and variant, such as 'llama.cpp no-repack'."""

    @property
    def version(self) -> str:
        """Version or commit of the build."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Options that every test of this runner has."""

    def measure(self, test: RunnerTest) -> Measurement:
        """Run one test, warmed up, in a process of its own.

        Raises:
            RunnerError: the engine cannot run the test, or failed.
        """


def first_lines(text: str, count: int = 2) -> str:
    """The last lines of an engine's complaint, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "no message"

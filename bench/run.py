"""`bench run`: engines measured in interleaved rounds, and one tidy row for each configuration.

Rounds go to a file beside the CSV as they finish, requests to endpoints to another one as they end,
so that an interruption loses the round under way only; the CSV is made of all rounds in that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.interleave import (
    Arm,
    Note,
    Round,
    append_round,
    others_text,
    read_rounds,
    run_rounds,
)
from bench.others import OTHER_CORES, other_cores
from bench.runners.base import Runner, RunnerError, RunnerTest
from hwmodel.errors import RequestError
from hwmodel.files import check_writable

ENGINES = ("refimpl", "refimpl-reference", "llama.cpp", "http://...")
MTP = ("0", "1", "2", "3", "auto")
_PROBE_BYTES = 1 << 30
_PROBE_REPETITIONS = 12


@dataclass(frozen=True)
class Job:
    """What is measured, all combinations of it.

    Attributes:
        prompts, gens, depths: tokens; files are prefilled and decoded at each depth, endpoints are
            asked prompts of that length plus depth.
        concurrency, requests: of endpoints.
        mtp: drafts of refimpl's whole loop, one of `MTP`, or ''.

    Raises:
        RequestError: `mtp` is something else.
    """

    model: Path | None
    prompts: tuple[int, ...] = (512,)
    gens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    concurrency: tuple[int, ...] = (1,)
    requests: int = 4
    repetitions: int = 3
    threads: int | None = None
    kv_type: str | None = None
    micro_batch: int | None = None
    mtp: str = ""

    def __post_init__(self) -> None:
        if self.mtp not in ("", *MTP):
            raise RequestError(f"--mtp is {self.mtp!r}, expected one of {', '.join(MTP)}")


@dataclass(frozen=True)
class Files:
    """Where results go: `out` is the CSV, the others lie beside it."""

    out: Path

    @property
    def rounds(self) -> Path:
        """Finished rounds, with every sample, host, build, flags and machine state."""
        return self.out.with_suffix(".rounds.jsonl")

    @property
    def requests(self) -> Path:
        """Requests to endpoints as they ended, those that failed included."""
        return self.out.with_suffix(".requests.jsonl")

    def check(self) -> None:
        """Refuse to write over what `bench run` did not write.

        Raises:
            RequestError: a file with no rounds beside it, or no folder.
            OSError: the folder may not be written to.
        """
        if not self.out.parent.is_dir():
            raise RequestError(f"{self.out.parent}: no such folder; make it first")
        if self.out.is_dir():
            raise RequestError(f"{self.out}: is a folder, expected the name of a CSV file")
        if self.out.exists() and not self.rounds.exists():
            raise RequestError(
                f"{self.out}: exists, but has no {self.rounds.name} beside it, so it would be lost;"
                " give another --out"
            )
        check_writable(self.out)

    def keep_request(self, request: Mapping[str, Any]) -> None:
        """Add a request to its file."""
        with open(self.requests, "a", encoding="utf-8") as file:
            file.write(json.dumps(request, allow_nan=False) + "\n")


def file_runner(name: str, llama_bench: str | None) -> Runner:
    """The runner of an engine that reads files: a name of `ENGINES`, or 'llama.cpp:no-repack'.

    Raises:
        RunnerError: unknown, or not installed.
    """
    from bench.runners.llamacpp import LlamaBenchRunner, LlamaCppPythonRunner, find_llama_bench
    from bench.runners.refimpl import RefimplRunner

    engine, _, variant = name.partition(":")
    if name in ("refimpl", "refimpl-reference"):
        return RefimplRunner(backend="reference" if name.endswith("reference") else "engine")
    if engine != "llama.cpp":
        raise RunnerError(f"unknown engine {name!r}, expected one of {', '.join(ENGINES)}")
    program = find_llama_bench(llama_bench)
    if program is not None:
        return LlamaBenchRunner(program, variant or "default")
    if variant not in ("", "default"):
        raise RunnerError(f"{name}: a variant needs llama-bench; give --llama-bench PATH")
    runner = LlamaCppPythonRunner()
    _ = runner.version  # says what to install where nothing is
    return runner


def is_endpoint(name: str) -> bool:
    """Whether an engine is given by its address."""
    return "://" in name


def cases(
    job: Job, engines: Sequence[str], llama_bench: str | None,
    endpoint: Callable[[str, int], Runner],
) -> list[tuple[str, list[Arm]]]:  # fmt: skip
    """Cases with their arms: the engines of a file side by side, then the endpoints.

    Args:
        endpoint: the runner of an address at a concurrency.

    Raises:
        RunnerError: an engine is unknown or not installed, or files lack a model.
    """
    readers = {n: file_runner(n, llama_bench) for n in engines if not is_endpoint(n)}
    if readers and job.model is None:
        raise RunnerError(f"{next(iter(readers))} needs a file: name it with --model")
    if readers and job.model is not None:
        path = _for("", RunnerTest(job.model)).model
        if not path.exists():
            raise RunnerError(f"{path}: no such file; --model takes a checkpoint or 'mini'")
    found = [
        (_name(test), [Arm(label, runner, _for(label, test)) for label, runner in readers.items()])
        for test in (_tests(job) if readers else ())
    ]
    served = [n for n in engines if is_endpoint(n)]
    for depth in job.depths if served else ():
        for count in job.concurrency:
            test = RunnerTest(Path(""), max(job.prompts, default=0) + depth, max(job.gens))
            arms = [Arm(f"{n} x{count}", endpoint(n, count), test) for n in served]
            found.append((f"chat p{test.n_prompt} n{test.n_gen} x{count}", arms))
    return found


def _tests(job: Job) -> list[RunnerTest]:
    assert job.model is not None
    shared: dict[str, Any] = {
        "repetitions": job.repetitions, "threads": job.threads, "kv_type": job.kv_type,
        "micro_batch": job.micro_batch,
    }  # fmt: skip
    out = []
    for depth in job.depths:
        out += [RunnerTest(job.model, n_prompt=p, n_depth=depth, **shared)
                for p in job.prompts if p]  # fmt: skip
        out += [RunnerTest(job.model, n_gen=n, n_depth=depth, mtp=job.mtp, **shared)
                for n in job.gens if n]  # fmt: skip
    return out


def _for(label: str, test: RunnerTest) -> RunnerTest:
    """The test as this engine takes it: only refimpl knows the name of the embedded model."""
    from refimpl.backends import model_path

    return RunnerTest(**{**test.__dict__, "model": model_path(test.model)})


def _name(test: RunnerTest) -> str:
    what = f"pp{test.n_prompt}" if test.n_prompt else f"tg{test.n_gen}"
    text = f"{test.model.stem} {what} @ d{test.n_depth}"
    return text + (f" mtp {test.mtp}" if test.mtp else "")


def measure(
    todo: Sequence[tuple[str, list[Arm]]], rounds: int, files: Files, threads: int, note: Note
) -> list[str]:
    """Measure all cases once, then again, and so on; returns what could not be measured: cases
    without a round, and engines that failed in every round of a case. A case that failed as a whole
    is named and left out of further rounds.

    Raises:
        RunnerError: nothing at all could be measured.
        KeyboardInterrupt: Ctrl-C; what was finished is on the disk.
    """
    from refimpl.benchmark.host import cpu_name, machine_state
    from refimpl.engine.probe import read_bandwidth
    from refimpl.engine.threads import Team

    kept, dead = list[Round](), list[str]()

    def keep(made: Round) -> None:
        append_round(files.rounds, made)
        kept.append(made)

    def state_of(arms: Sequence[Arm]) -> Callable[[], dict[str, Any]]:
        # a server is another program, and may poll for requests; so nothing is said beside one
        if any(is_endpoint(arm.label) for arm in arms):
            return machine_state
        return lambda: {**machine_state(), OTHER_CORES: other_cores()}

    def probe() -> tuple[float, ...]:
        time.sleep(0.2)
        return read_bandwidth(team, _PROBE_BYTES, _PROBE_REPETITIONS)

    with contextlib.closing(Team(threads)) as team:
        host = f"{cpu_name()}, {threads} threads"
        for number in range(rounds):
            for name, arms in todo:
                if name in dead:
                    continue
                try:
                    run_rounds(name, arms, 1, probe, host, keep, state_of(arms), _silent)
                except RunnerError as error:
                    dead.append(name)
                    note(str(error))
                else:
                    note(f"round {number + 1} of {rounds}: {_last_line(files.rounds)}")
    if not kept:
        raise RunnerError("nothing could be measured")
    done = {(r.case, k) for r in kept for k in r.arms}
    failed = dict.fromkeys((r.case, k) for r in kept for k in r.failed)
    never = [name for name in dead if all(r.case != name for r in kept)]
    return [*never, *(f"{case} ({k})" for case, k in failed if (case, k) not in done)]


def _silent(message: str) -> None:
    pass


def _last_line(path: Path) -> str:
    made = read_rounds(path)[-1]
    arms = [f"{k} {m.median_ts:.1f} tok/s" for k, m in made.arms.items()]
    arms += [f"{k} failed: {why}" for k, why in made.failed.items()]
    return f"{made.case}: {', '.join(arms)}{others_text(made)}"


def api_key(variable: str | None) -> str:
    """The key in an environment variable.

    Raises:
        RequestError: it is not set.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise RequestError(f"the environment variable {variable} is not set")
    return key

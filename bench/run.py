"""`bench run`: engines measured in interleaved rounds, and one tidy row for each configuration.

Rounds go to a file beside the CSV as they finish, requests to endpoints to another one as they end,
so that an interruption loses the round under way only; the CSV is made of all rounds in that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.importers.llama_bench import quant_of
from bench.importers.table import Stated
from bench.interleave import (
    Arm,
    Note,
    Round,
    append_round,
    best_probe,
    read_rounds,
    run_rounds,
    usable,
)
from bench.runners.base import Measurement, Runner, RunnerError, RunnerTest
from bench.runs import RunRecord
from hwmodel.errors import RequestError

ENGINES = ("refimpl", "refimpl-reference", "llama.cpp", "http://...")
LOCAL = "local"
_DROPPED = ("an answer without text", "the answer stopped midway")
_PROBE_BYTES = 1 << 30
_PROBE_REPETITIONS = 12


@dataclass(frozen=True)
class Job:
    """What is measured, all combinations of it.

    Attributes:
        prompts, gens, depths: tokens; files are prefilled and decoded at each depth, endpoints are
            asked prompts of that length plus depth.
        concurrency, requests: of endpoints.
        mtp: drafts of refimpl's whole loop, or ''.
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
) -> int:
    """Measure all cases once, then again, and so on; returns the rounds that were kept.

    A case that fails as a whole is named and left out of further rounds.

    Raises:
        RunnerError: nothing at all could be measured.
        KeyboardInterrupt: Ctrl-C; what was finished is on the disk.
    """
    from refimpl.benchmark.host import cpu_name, machine_state
    from refimpl.engine.probe import read_bandwidth
    from refimpl.engine.threads import Team

    kept, dead = 0, dict[str, str]()

    def keep(made: Round) -> None:
        nonlocal kept
        append_round(files.rounds, made)
        kept += 1

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
                    run_rounds(name, arms, 1, probe, host, keep, machine_state, _silent)
                except RunnerError as error:
                    dead[name] = str(error)
                    note(str(error))
                else:
                    note(f"round {number + 1} of {rounds}: {_last_line(files.rounds)}")
    if not kept:
        raise RunnerError("nothing could be measured")
    return kept


def _silent(message: str) -> None:
    pass


def _last_line(path: Path) -> str:
    made = read_rounds(path)[-1]
    arms = [f"{k} {m.median_ts:.1f} tok/s" for k, m in made.arms.items()]
    arms += [f"{k} failed: {why}" for k, why in made.failed.items()]
    return f"{made.case}: {', '.join(arms)}"


def write_rows(files: Files, stated: Stated) -> list[RunRecord]:
    """Make the CSV of all rounds beside it; returns its rows.

    Raises:
        RunFileError: the rounds cannot be read.
        OSError: the CSV cannot be written.
    """
    from bench.runs import write_runs
    from hwmodel.files import write_whole

    rows = rows_of(read_rounds(files.rounds), stated)
    write_whole(files.out, write_runs(rows).encode())
    return rows


def rows_of(rounds: Sequence[Round], stated: Stated) -> list[RunRecord]:
    """One row for each case and arm: medians over the rounds that can be judged."""
    best = best_probe(rounds)
    out = []
    for case in dict.fromkeys(r.case for r in rounds):
        mine = [r for r in rounds if r.case == case]
        for label in dict.fromkeys(k for r in mine for k in r.arms):
            found, kind = usable(mine, best, label)
            out.append(stated.apply(_row(case, label, found, kind)))
    return out


def _row(case: str, label: str, rounds: Sequence[Round], kind: str) -> RunRecord:
    arms = [r.arms[label] for r in rounds]
    last, speed = arms[-1], median(m.median_ts for m in arms)
    record, remarks = last.record, [f"{len(rounds)} {kind} rounds"]
    day = time.strftime("%Y-%m-%d", time.gmtime(rounds[-1].started))
    low, high = min(m.median_ts for m in arms), max(m.median_ts for m in arms)
    extra = {
        "host": rounds[-1].host, "flags": last.flags,
        "host_read_bytes_per_s": f"{median(r.probe for r in rounds):.4g}",
        "tok_s_low": f"{low:.5g}", "tok_s_high": f"{high:.5g}",
    }  # fmt: skip
    values: dict[str, Any] = {
        "id": re.sub(r"[^\w.@-]+", "-", f"{day}-{label}-{case}"),
        "total_params_b": _scaled(record.get("model_n_params"), 1e-9),
        "weights_gb": _scaled(record.get("model_size"), 1e-9),
        "device": LOCAL, "n_devices": 1.0, "engine": last.engine, "engine_version": last.build,
        "source_date": day, "confidence": "measured by bench run", "sweep": f"{day}-{case}",
        "fit_ok": "yes" if kind == "quiet" else "no",
    }  # fmt: skip
    own = _served(record, arms, remarks, extra) if "ttft_s" in record else _from_file(record, speed)
    return RunRecord(**{**values, **own, "notes": "; ".join(remarks), "extra": extra})


def _from_file(record: Mapping[str, Any], speed: float) -> dict[str, Any]:
    """Columns of an engine that read a file: llama-bench's fields."""
    name = str(record.get("model_filename", "")).removesuffix(".gguf")
    prompt = record.get("n_prompt") or None
    return {
        "model": name,
        "quant": quant_of(str(record.get("model_type", ""))) or _quant_in(name),
        "backend": "cpu",
        "mtp": str(record.get("mtp") or "none"),
        "kv_type": str(record.get("type_k") or ""),
        "batch_concurrency": 1.0,
        "prompt_tokens": _scaled(prompt),
        "context_depth": float(record.get("n_depth") or 0),
        "gen_tokens": _scaled(record.get("n_gen") or None),
        "micro_batch": _scaled(record.get("n_ubatch")),
        "prefill_tok_s": speed if prompt else None,
        "decode_tok_s": None if prompt else speed,
    }


def _served(
    record: Mapping[str, Any], arms: Sequence[Measurement], remarks: list[str],
    extra: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Columns of an endpoint: per user, with what every user had together in `extra`."""
    records = [m.record for m in arms]

    def middle(key: str) -> float | None:
        found = [r[key] for r in records if r.get(key) is not None]
        return median(found) if found else None

    whole, asked = (sum(r[k] for r in records) for k in ("complete", "requests"))
    errors = list(dict.fromkeys(e for r in records for e in r["errors"]))
    if whole < asked:
        remarks.append(f"incomplete: {asked - whole} of {asked} requests ({'; '.join(errors[:3])})")
    if short := sum(r["short_answers"] for r in records):
        remarks.append(f"{short} answers of fewer than two tokens left out")
    if record["concurrency"] > 1 and any(e.startswith(_DROPPED) for e in errors):
        remarks.append(
            "a server that drops an answer when the next is asked has one user, not more"
        )
    remarks.append(f"tokens counted by {record['tokens_counted_by']}")
    for key in ("tpot_s", "itl_median_s", "itl_p99_s", "aggregate_tok_s", "drafted", "accepted",
                "acceptance", "acceptance_length", "reasoning_tokens"):  # fmt: skip
        value = middle(key)
        extra[key] = "" if value is None else f"{value:.5g}"
    if told_by := record.get("acceptance_told_by"):
        remarks.append(f"acceptance as told by {told_by}")
    ttft = middle("ttft_s")
    name = str(record.get("model_filename") or record["model"]).removesuffix(".gguf")
    return {
        "model": name,
        "quant": _quant_in(name),
        "backend": "",
        "mtp": _drafts(middle("acceptance_length"), middle("drafts_a_step"), middle("acceptance")),
        "batch_concurrency": float(record["concurrency"]),
        "prompt_tokens": middle("n_prompt"),
        "context_depth": middle("n_prompt"),
        "gen_tokens": middle("n_gen"),
        "prefill_tok_s": middle("server_prefill_tok_s"),
        "decode_tok_s": 1.0 / t if (t := middle("tpot_s")) else None,
        "ttft_ms": None if ttft is None else 1e3 * ttft,
        **({"fit_ok": "no"} if whole < asked else {}),
    }


def _drafts(length: float | None, each: float | None, share: float | None) -> str:
    """Drafts a step and what was accepted of them, as the tidy column has it."""
    if length is None and share is None:
        return ""
    told = f"accept length {length:.2f}" if length is not None else f"accept rate {share:.2f}"
    return f"{each:.0f} drafts, {told}" if each else told


def _quant_in(name: str) -> str:
    """The quant that a file's name states in capitals or not, or empty."""
    return quant_of(re.sub(r"[-.]", " ", name).upper())


def _scaled(value: Any, factor: float = 1.0) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) * factor if known else None


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

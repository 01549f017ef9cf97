"""Running a program that prints llama-bench's JSON, and reading what it printed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bench.runners.base import Measurement, RunnerError, first_lines

TIMEOUT_S = 1800.0


def run_json(
    command: Sequence[str], engine: str, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The one record that a program printed as a JSON list; see `run_records`."""
    (record,) = run_records(command, engine, 1, env)
    return record


def run_records(
    command: Sequence[str], engine: str, count: int, env: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The `count` records that a program printed as a JSON list.

    Raises:
        RunnerError: it could not be started, failed, took too long, or printed something else.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env
        )
    except OSError as error:
        raise RunnerError(f"{command[0]}: cannot be started ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise RunnerError(f"{engine} gave no result within {TIMEOUT_S:.0f} s") from None
    if done.returncode < 0:
        raise RunnerError(f"{engine} was killed by signal {-done.returncode}")
    if done.returncode:
        raise RunnerError(f"{engine} ended with {done.returncode}: {first_lines(done.stderr)}")
    try:
        records = [dict(record) for record in json.loads(done.stdout)]
    except (ValueError, TypeError):
        records = []
    if len(records) != count:
        wanted = "one record" if count == 1 else f"{count} records"
        raise RunnerError(f"{engine} printed no JSON list with {wanted}: {done.stdout[:80]!r}")
    return records


def measurement(
    record: dict[str, Any], engine: str, build: str, flags: Sequence[str]
) -> Measurement:
    """A record with llama-bench's `samples_ts` and `samples_ns` as a measurement.

    Raises:
        RunnerError: samples are missing or no speeds.
    """
    try:
        return Measurement(
            engine=engine,
            build=build,
            flags=" ".join(flags),
            samples_ts=tuple(float(x) for x in record["samples_ts"]),
            samples_ns=tuple(int(x) for x in record["samples_ns"]),
            record={**record, "model_filename": str(record["model_filename"]).split("/")[-1]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunnerError(f"{engine}: its record has no usable samples ({error})") from None

"""Runs `refimpl bench` in a process of its own, with the Python that runs this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bench.runners.base import Measurement, RunnerTest
from bench.runners.process import measurement, run_json

_START = "from refimpl.cli import main; main()"


class RefimplRunner:
    """The reference implementation's own backends.

    Args:
        flags: further options of `refimpl bench`, such as ('--exact',).
        backend: 'engine' or 'reference'.
        simd: instruction set to force (REFIMPL_SIMD), or '' for the best.
    """

    def __init__(self, flags: Sequence[str] = (), backend: str = "engine", simd: str = "") -> None:
        self._flags, self._backend, self._simd = tuple(flags), backend, simd

    @property
    def name(self) -> str:
        """Backend, and what is forced."""
        more = [self._simd] if self._simd else []
        return " ".join(["refimpl", self._backend, *more, *self._flags])

    @property
    def version(self) -> str:
        """Commit of the working tree, or the package's version."""
        from refimpl.benchmark.host import build_commit

        return build_commit()

    @property
    def flags(self) -> tuple[str, ...]:
        """Options of every test."""
        return ("--backend", self._backend, *self._flags)

    def measure(self, test: RunnerTest) -> Measurement:
        """See `bench.runners.base.Runner`."""
        flags = [*self.flags, *_options(test)]
        command = [sys.executable, "-c", _START, "bench", "-m", str(test.model), *flags, "--json"]
        env = {**os.environ, "REFIMPL_SIMD": self._simd} if self._simd else None
        record = run_json(command, self.name, env)
        build = f"{record.get('build_commit', '')} kernels {record.get('kernels', '')}"
        return measurement(record, "refimpl", build, flags)


def _options(test: RunnerTest) -> list[str]:
    given = {
        "-p": test.n_prompt,
        "-n": test.n_gen,
        "-d": test.n_depth,
        "-r": test.repetitions,
        "--rows": test.n_rows if test.n_rows > 1 else None,
        "--threads": test.threads,
        "--mtp": test.mtp or None,
        "--simulate-acceptance": ",".join(f"{p:g}" for p in test.acceptance) or None,
        "--kv-type": test.kv_type,
        "--micro-batch": test.micro_batch,
    }
    flags = [text for k, v in given.items() if v is not None for text in (k, str(v))]
    return flags + (["--synthetic-kv"] if test.synthetic_kv else [])

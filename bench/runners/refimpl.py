"""Runs `refimpl bench` in a process of its own, with the Python that runs this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.runners.base import Measurement, RunnerError, RunnerTest
from bench.runners.process import measurement, run_records

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
        return self.measure_together([test])[0]

    def measure_together(self, tests: Sequence[RunnerTest]) -> list[Measurement]:
        """Tests that differ in the number of drafts only, in one process, where their generations
        take turns.

        Raises:
            RunnerError: the engine cannot run them, or failed; or they differ in more.
        """
        test = replace(tests[0], mtp=",".join(t.mtp for t in tests))
        if len(tests) > 1 and any(replace(t, mtp=test.mtp) != test or not t.mtp for t in tests):
            raise RunnerError(f"{self.name}: only tests that differ in their drafts can take turns")
        flags = [*self.flags, *_options(test)]
        command = [sys.executable, "-c", _START, "bench", "-m", str(test.model), *flags, "--json"]
        env = {**os.environ, "REFIMPL_SIMD": self._simd} if self._simd else None
        found = run_records(command, self.name, len(tests), env)
        build = f"{found[0].get('build_commit', '')} kernels {found[0].get('kernels', '')}"
        return [measurement(record, "refimpl", build, flags) for record in found]


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

"""The step is compiled by a second process while this one compiles the kernels.

Numba compiles one function at a time in a process, and the step takes about as long as everything
else together. So as soon as something has to be compiled, `python -m refimpl.engine.apart SIMD` is
started: it compiles the step and leaves it where compiled kernels are kept. Where it fails, the
step is compiled here as well; nothing but time depends on it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from refimpl.engine.jit import announced, keeps_code
from refimpl.engine.simd import Simd, choose_simd
from refimpl.engine.threads import default_threads

_LONGEST_S = 120


@contextlib.contextmanager
def step_apart(simd: Simd) -> Iterator[None]:
    """Context in which the step is compiled elsewhere if anything is compiled here; at its end the
    step can be had from disk."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if default_threads() > 1 and keeps_code():
            command = [sys.executable, "-P", "-m", "refimpl.engine.apart", simd.name]
            nothing = subprocess.DEVNULL
            with contextlib.suppress(OSError):
                started.append(
                    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
                )

    try:
        with announced(start):
            yield
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LONGEST_S)
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    from refimpl.engine.step import runner

    runner(choose_simd(sys.argv[1]))

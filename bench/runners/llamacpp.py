"""llama.cpp, through its `llama-bench` where there is one, else through llama-cpp-python.

Variants are what a fair comparison has to try, since which is best differs by type and test:
'default', 'no-repack' (weights as they lie in the file), 'fa-off' and 'fa-on' (flash attention),
'no-mmap'. A build without AMX is given as a program of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.runners.base import Measurement, RunnerError, RunnerTest, first_lines
from bench.runners.process import measurement, run_json

VARIANTS = ("default", "no-repack", "fa-off", "fa-on", "no-mmap")
_BATCH = 2048  # llama-bench's default


def find_llama_bench(given: str | None) -> Path | None:
    """The program `given`, or the one on the PATH, or None.

    Raises:
        RunnerError: `given` is not there.
    """
    found = shutil.which(given or "llama-bench")
    if given and found is None:
        raise RunnerError(f"{given}: no such program; give the path of llama-bench")
    return Path(found) if found else None


class LlamaBenchRunner:
    """`llama-bench` with one variant's flags.

    Args:
        program: path of llama-bench.
        variant: one of `VARIANTS`.
        label: what the build is called beside its variant, such as 'no-amx'.

    Raises:
        RunnerError: unknown variant.
    """

    def __init__(self, program: Path, variant: str = "default", label: str = "") -> None:
        if variant not in VARIANTS:
            raise RunnerError(f"llama.cpp variant {variant!r}, expected {', '.join(VARIANTS)}")
        self._program, self._variant, self._label = program, variant, label

    @property
    def name(self) -> str:
        """llama.cpp, build and variant."""
        return " ".join(filter(None, ("llama.cpp", self._label, self._variant)))

    @cached_property
    def version(self) -> str:
        """Build and commit, as the program states them."""
        text = self._output("--version")
        found = re.search(r"version:\s*(.+)", text)
        return found[1].strip() if found else ""

    @cached_property
    def _help(self) -> str:
        return self._output("--help")

    def _output(self, flag: str) -> str:
        try:
            done = subprocess.run(
                [str(self._program), flag], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise RunnerError(f"{self._program}: cannot be run ({error})") from None
        return done.stdout + done.stderr

    @property
    def flags(self) -> tuple[str, ...]:
        """The variant's options, as this version of llama-bench spells them.

        Raises:
            RunnerError: this version does not have the variant.
        """
        spellings: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
            "default": (),
            "no-repack": (("--repack", ("--repack", "0")),),
            "fa-off": (("on|off|auto", ("-fa", "off")), ("--flash-attn", ("-fa", "0"))),
            "fa-on": (("on|off|auto", ("-fa", "on")), ("--flash-attn", ("-fa", "1"))),
            "no-mmap": (("--load-mode", ("-lm", "none")), ("--mmap", ("-mmp", "0"))),
        }
        known = spellings[self._variant]
        for word, flags in known:
            if word in self._help:
                return flags
        if known:
            raise RunnerError(f"this llama-bench has no variant '{self._variant}'")
        return ()

    def measure(self, test: RunnerTest) -> Measurement:
        """See `bench.runners.base.Runner`."""
        _refuse(test)
        flags = [*self.flags, *_options(test)]
        command = [str(self._program), "-m", str(test.model), *flags, "-o", "json"]
        record = run_json(command, self.name)
        return measurement(record, "llama.cpp", str(record.get("build_commit", "")), flags)


def _refuse(test: RunnerTest) -> None:
    """What llama.cpp cannot be asked for.

    Raises:
        RunnerError: see there.
    """
    if test.mtp or test.acceptance or test.n_rows > 1:
        raise RunnerError("llama-bench times neither drafts nor their verification")
    if test.synthetic_kv:
        raise RunnerError("llama-bench fills a depth by a prefill only")


def _options(test: RunnerTest) -> list[str]:
    given = {
        "-p": test.n_prompt,
        "-n": test.n_gen,
        "-d": test.n_depth,
        "-r": test.repetitions,
        "-t": test.threads,
        "-ctk": test.kv_type,
        "-ctv": test.kv_type,
        "-ub": test.micro_batch,
    }
    return [text for k, v in given.items() if v is not None for text in (k, str(v))]


class LlamaCppPythonRunner:
    """llama-cpp-python in this process, for machines without llama-bench; default variant only."""

    name = "llama.cpp (llama-cpp-python) default"
    flags: tuple[str, ...] = ()

    @cached_property
    def version(self) -> str:
        """Version of the Python package."""
        return str(_llama_cpp().__version__)

    def measure(self, test: RunnerTest) -> Measurement:
        """See `bench.runners.base.Runner`; the same steps as llama-bench's."""
        _refuse(test)
        llama = _open(test)
        try:
            samples = _samples(llama, test)
        finally:
            llama.close()
        tokens = test.n_prompt or test.n_gen
        record = {
            "model_filename": str(test.model), "n_prompt": test.n_prompt, "n_gen": test.n_gen,
            "n_depth": test.n_depth, "n_threads": test.threads, "samples_ns": samples,
            "samples_ts": [1e9 * tokens / ns for ns in samples],
        }  # fmt: skip
        return measurement(record, "llama.cpp", f"llama-cpp-python {self.version}", _options(test))


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise RunnerError(
            "llama.cpp was not found: put llama-bench on the PATH, give --llama-bench PATH, or "
            "install llama-cpp-python"
        ) from None
    return llama_cpp


def _open(test: RunnerTest) -> Any:
    if test.kv_type not in (None, "f16"):
        raise RunnerError(f"a KV cache of {test.kv_type} needs llama-bench")
    module = _llama_cpp()
    size = test.n_depth + max(test.n_prompt, test.n_gen) + 8
    try:
        return module.Llama(
            str(test.model), n_ctx=size, n_batch=_BATCH, n_ubatch=test.micro_batch or 512,
            n_threads=test.threads, n_threads_batch=test.threads, verbose=False,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise RunnerError(f"llama.cpp cannot open the model: {first_lines(str(error))}") from None


def _samples(llama: Any, test: RunnerTest) -> list[int]:
    import numpy as np

    ids = np.random.default_rng(1).integers(llama.n_vocab(), size=test.n_depth + 8192).tolist()
    depth, rest = ids[: test.n_depth], ids[test.n_depth :]
    samples = []
    for repetition in range(-1, test.repetitions):  # the first one warms up
        llama.reset()
        if depth:
            llama.eval(depth)
        began = time.perf_counter_ns()
        if test.n_prompt:
            llama.eval((rest * (test.n_prompt // len(rest) + 1))[: test.n_prompt])
        else:
            for i in range(test.n_gen if repetition >= 0 else min(test.n_gen, 2)):
                llama.eval([rest[i % len(rest)]])
        if repetition >= 0:
            samples.append(time.perf_counter_ns() - began)
    return samples

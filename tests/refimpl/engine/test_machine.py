"""What depends on the machine: the choice of instructions, threads, the bandwidth probe."""

import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refimpl.backends import open_backend
from refimpl.checkpoint.stored import StoredSource
from refimpl.engine import simd
from refimpl.engine.model import EngineModel
from refimpl.engine.probe import read_bandwidth
from refimpl.engine.threads import Team, default_threads
from refimpl.errors import InputError

V2 = {"avx2", "fma", "f16c"}
V4 = V2 | {"avx512f", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "names", "dot"),
    [
        (set(), ("portable",), ""),
        (V2, ("avx2", "portable"), ""),
        (V2 | {"avxvnni"}, ("avx2", "portable"), "avxvnni"),
        (V4 | {"avx512vnni"}, ("avx2", "portable"), "avx512vnni"),  # no VBMI
        (V4 | {"avx512vnni", "avx512vbmi"}, ("avx2", "portable"), "avx512vnni"),  # no GFNI
        (V4 | {"avx512vnni", "avx512vbmi", "gfni"}, ("avx512", "avx2", "portable"), "avx512vnni"),
    ],
)
def test_instructions_are_chosen_by_feature_flags(
    monkeypatch: pytest.MonkeyPatch, features: set[str], names: tuple[str, ...], dot: str
) -> None:
    monkeypatch.delenv("REFIMPL_SIMD", raising=False)
    monkeypatch.setattr(simd, "cpu_features", lambda: frozenset(features))
    assert simd.available() == names
    chosen = simd.choose_simd()
    assert (chosen.name, chosen.dot) == (names[0], dot)


def test_the_environment_forces_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIMPL_SIMD", "portable")
    assert simd.choose_simd().name == "portable"
    assert not simd.choose_simd().integer
    monkeypatch.setenv("REFIMPL_SIMD", "mmx")
    with pytest.raises(InputError, match="'mmx', expected one of avx512, avx2, portable"):
        simd.choose_simd()


def test_instructions_that_the_processor_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "cpu_features", lambda: frozenset(V2))
    with pytest.raises(InputError, match=r"lacks avx512f.*choose avx2 or portable"):
        simd.choose_simd("avx512")


def test_a_processor_without_float16_is_refused_in_a_sentence() -> None:
    """Where kernels would be linked to functions that are not there, which ends the process."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("other processors have float16")
    command = [sys.executable, "-c", "from refimpl.cli import main; main()", "generate", "a"]
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "it lacks f16c, or a virtual machine hides it" in done.stderr


def test_kernels_are_compiled_anew_when_anything_that_they_are_made_from_changes() -> None:
    """The hash is over all modules of the engine that those with kernels import."""
    folder, found = Path(simd.__file__).parent, set[str]()
    left = ["step", "kernels", "kernels512", "activations", "attention", "kv", "tiles", "amx"]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            source = (folder / f"{name}.py").read_text(encoding="utf-8")
            left += re.findall(r"from refimpl\.engine\.(\w+) import", source)
    assert found == set(simd._COMPILED)


def test_a_team_calls_the_function_once_on_every_thread() -> None:
    team, called = Team(3), []
    seen = [threading.Event() for _ in range(3)]

    def function(record: int, number: int) -> None:
        called.append((record, number))
        seen[number].set()
        for event in seen:  # as the compiled step does: end together
            event.wait(10)

    team.run(function, 42)
    assert sorted(called) == [(42, 0), (42, 1), (42, 2)]
    team.close()
    assert default_threads() >= 1
    with pytest.raises(InputError, match="threads is 257"):
        Team(257)


def test_the_bandwidth_probe_gives_a_figure_per_repetition() -> None:
    team = Team(2)
    speeds = read_bandwidth(team, size_bytes=1 << 22, repetitions=2)
    assert len(speeds) == 2
    assert all(np.isfinite(speeds)) and min(speeds) > 0
    team.close()


def test_the_engine_opens_by_name(tiny_gguf: Callable[[str, str], StoredSource]) -> None:
    source = tiny_gguf("tiny_a", "q8_0")
    model = open_backend(source, "engine", threads=1)
    assert isinstance(model, EngineModel)
    assert model.threads == 1
    with pytest.raises(InputError, match="--dtype bf16 belongs to the reference"):
        open_backend(source, "engine", "bf16")
    model.close()

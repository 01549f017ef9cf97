"""Compilation is announced when it happens, and a missing cache folder is no obstacle."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba import types
from numba.core import caching

from refimpl.engine import jit


def compiled() -> Any:
    @jit.cfunc(types.int64(types.int64), cache=True)
    def double(x):  # type: ignore[no-untyped-def]
        return 2 * x

    return double.ctypes


def test_only_compilation_is_announced(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path_factory.mktemp("cold")))
    for expected in (1, 0):  # cold, then found on disk
        calls: list[int] = []
        with jit.announced(lambda calls=calls: calls.append(1)):
            assert compiled()(21) == 42
        assert len(calls) == expected
    with jit.announced(None):
        assert compiled()(21) == 42


def test_where_nothing_can_be_written_kernels_are_compiled_without_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(jit, "_KernelCache", refuse)
    message = "cannot cache function 'double': no locator available for file"
    assert compiled()(21) == 42
    message = "another error"
    with pytest.raises(RuntimeError, match="another"):
        compiled()


def test_processes_that_compile_at_the_same_time_do_not_take_each_others_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two versions of a function; each is put on disk by one that has seen the folder empty."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path_factory.mktemp("shared")))

    def times(factor: int) -> Any:
        @jit.cfunc(types.int64(types.int64), cache=True)
        def multiply(x):  # type: ignore[no-untyped-def]
            return factor * x

        return multiply

    with monkeypatch.context() as empty:
        empty.setattr(caching.IndexDataCacheFile, "_load_index", lambda self: {})
        for factor in (3, 5):
            assert times(factor).ctypes(7) == 7 * factor
    for factor in (3, 5):
        found = times(factor)
        assert found.cache_hits == 1
        assert found.ctypes(7) == 7 * factor


_VERSIONS = """
import sys
from numba import types
from refimpl.engine import jit

def times(factor):
    @jit.cfunc(types.int64(types.int64), cache=True)
    def multiply(x):
        return factor * x
    return multiply

made = [times(int(factor)) for factor in sys.argv[1:]]
print(*(m.ctypes(7) for m in made), *(m.cache_hits for m in made), *(m.native_name for m in made))
"""


def test_code_of_two_processes_stays_apart_in_a_third(tmp_path: Path) -> None:
    """The linker knows functions by name, and both processes count their versions."""
    script = tmp_path / "versions.py"
    script.write_text(_VERSIONS)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def printed(*factors: str) -> list[str]:
        command = [sys.executable, str(script), *factors]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.split()

    first, second, both = printed("3"), printed("5"), printed("3", "5")
    assert [*first[:2], *second[:2]] == ["21", "0", "35", "0"]
    assert both == ["21", "35", "1", "1", first[2], second[2]]
    assert first[2] != second[2]


_FORKED = """
import os
from numba import types
from refimpl.engine import jit

child = os.fork()

@jit.cfunc(types.int64(types.int64))
def double(x):
    return 2 * x

if child:
    os.waitpid(child, 0)  # one after the other: an unbuffered line is two writes
print(double.native_name, flush=True)
if not child:
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_counts_anew() -> None:
    command = [sys.executable, "-c", _FORKED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert first != second


def test_loading_compiled_code_does_not_make_ready_to_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """That would take longer, and more memory, than all the rest of opening a model."""
    folder = str(tmp_path_factory.mktemp("found"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", folder)
    compiled()
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_jit; "
        "print(test_jit.compiled()(21)); print('numba.np.linalg' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env={**os.environ, "NUMBA_CACHE_DIR": folder},
    )  # fmt: skip
    assert done.stdout.split() == ["42", "False"], done.stderr

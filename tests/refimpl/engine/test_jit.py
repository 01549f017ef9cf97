"""Compilation is announced when it happens, and a missing cache folder is no obstacle."""

from typing import Any

import numba
import pytest
from numba import types

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
    real = numba.cfunc

    def refuse(signature: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'double': no locator available for file")
        return real(signature, **options)

    monkeypatch.setattr(numba, "cfunc", refuse)
    assert compiled()(21) == 42
    monkeypatch.setattr(numba, "cfunc", lambda *a, **o: pytest.fail("other errors"))
    with pytest.raises(pytest.fail.Exception):
        compiled()

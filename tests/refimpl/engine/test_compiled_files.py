"""Compiled code of other versions goes when it was not used for long; everything else stays."""

import gc
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from numba.core.ccallback import CFunc

from refimpl.checkpoint.quantise import numerics
from refimpl.engine import compiled_files, old_files
from refimpl.engine.compiled_files import kept_in_order, mark_used
from refimpl.engine.jit import cfunc
from refimpl.engine.old_files import remove_old_kernels, remove_old_quantisers
from refimpl.engine.simd import choose_simd, sources_hash
from refimpl.engine.step import SIGNATURE

_DAY_S = 86_400
_OTHER, _THIRD = "0123456789abcdef", "fedcba9876543210"
_KERNEL = "kernels.made.locals.rows-88.py311-00112233445566"


def put(path: Path, days: float, content: bytes = b"") -> Path:
    """A file that was last written so many days ago."""
    path.write_bytes(content)
    then = time.time() - days * _DAY_S
    os.utime(path, (then, then))
    return path


def kernel(folder: Path, number: int, sources: str, days: float) -> list[Path]:
    """Index and code of a kernel of a version."""
    base = f"{_KERNEL}{number:02d}"
    code = f"code _3dx_2c_20sources_3d_27{sources}_27_29_ and more".encode()
    return [put(folder / f"{base}.nbi", days), put(folder / f"{base}.1.nbc", days, code)]


def compile_something() -> None:
    @cfunc(SIGNATURE)
    def nothing(step, thread):
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this process keeps its kernels in."""
    kept = SimpleNamespace(_cache=SimpleNamespace(cache_path=str(tmp_path)))
    monkeypatch.setattr(compiled_files, "runner", lambda simd: kept)
    monkeypatch.setattr(old_files, "remove_old_quantisers", lambda: [])
    return tmp_path


def test_every_kernel_of_an_engine_names_its_version(engine) -> None:
    """What tells versions apart: were it not there, nothing would ever be removed."""
    model = engine("tiny_a", "q4_0")
    compiled: list[Any] = [o for o in gc.get_objects() if type(o) is CFunc]
    kept = [
        Path(f._cache._cache_file._index_path)
        for f in compiled
        if f._pyfunc.__module__.startswith("refimpl.engine.") and hasattr(f._cache, "_cache_file")
    ]
    assert len(kept) > 3, model.description
    for index in kept:
        assert old_files._FILE.fullmatch(index.name), index.name
        named = old_files._SOURCES.findall(index.with_suffix(".1.nbc").read_bytes())
        assert set(named) == {sources_hash().encode()}, index.name


def test_kernels_of_other_versions_go_after_a_month(tmp_path: Path) -> None:
    old = kernel(tmp_path, 1, _OTHER, days=31) + kernel(tmp_path, 2, _THIRD, days=400)
    mine = kernel(tmp_path, 3, sources_hash(), days=400)
    fresh = kernel(tmp_path, 4, _OTHER, days=29)
    assert sorted(remove_old_kernels(tmp_path)) == sorted(old)
    assert sorted(tmp_path.iterdir()) == sorted(mine + fresh)


def test_what_belongs_to_a_version_goes_with_it(tmp_path: Path) -> None:
    def of(sources: str) -> list[Path]:
        answer = tmp_path / f"amx_check-{sources}-{_THIRD}.json"
        return [put(answer, 31, b"{}"), put(tmp_path / f"kernels-{sources}.used", 31)]

    broken = put(tmp_path / f"{_KERNEL}01.nbi.tmp.{_THIRD}", 31)
    index_alone = put(tmp_path / f"{_KERNEL}02.nbi", 31)
    gone, stay = of(_OTHER), of(sources_hash())
    assert sorted(remove_old_kernels(tmp_path)) == sorted([broken, index_alone, *gone])
    assert sorted(tmp_path.iterdir()) == sorted(stay)


def test_a_version_in_use_stays_however_old_its_files(tmp_path: Path) -> None:
    used = kernel(tmp_path, 1, _OTHER, days=400)
    put(tmp_path / f"kernels-{_OTHER}.used", days=3)
    assert remove_old_kernels(tmp_path) == []
    assert all(path.exists() for path in used)


def test_several_versions_under_one_index_go_together(tmp_path: Path) -> None:
    """As Numba numbers them; an index is of use as long as one of them is."""
    old = kernel(tmp_path, 1, _OTHER, days=31)
    second = old[1].with_name(old[1].name.replace(".1.nbc", ".2.nbc"))
    put(second, 31, old[1].read_bytes().replace(_OTHER.encode(), sources_hash().encode()))
    assert remove_old_kernels(tmp_path) == []
    put(second, 31, old[1].read_bytes())
    assert sorted(remove_old_kernels(tmp_path)) == sorted([*old, second])


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = tmp_path / "kernels"
    outside.mkdir()
    folder.mkdir()
    index, code = kernel(outside, 1, _OTHER, days=400)
    stay = [
        put(folder / "kernels.cpython-311.pyc", 400, code.read_bytes()),
        put(folder / "notes.txt", 400),
        put(folder / "other.function-3.py311.1.nbc", 400, b"code of a kind that is not known"),
        put(folder / f"{code.name}.bak", 400, code.read_bytes()),
        put(folder / "kernels-last.used", 400),
        folder / index.name,
        folder / code.name,
    ]
    stay[-2].mkdir()
    stay[-1].symlink_to(code)
    assert remove_old_kernels(folder) == []
    assert sorted(folder.iterdir()) == sorted(stay)


def test_files_that_cannot_be_deleted_stay(tmp_path: Path, monkeypatch) -> None:
    """As where another process has them open, on some systems."""
    old = kernel(tmp_path, 1, _OTHER, days=31)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "in use", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert remove_old_kernels(tmp_path) == []
    assert all(path.exists() for path in old)


def test_a_file_that_was_written_meanwhile_stays(tmp_path: Path, monkeypatch) -> None:
    index, code = kernel(tmp_path, 1, _OTHER, days=31)
    read = Path.read_bytes

    def read_while_written(path: Path) -> bytes:
        content = read(path)
        path.touch()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_while_written)
    assert remove_old_kernels(tmp_path) == [index]
    assert code.exists()


def test_quantisers_that_lie_elsewhere_now_are_old(tmp_path: Path) -> None:
    line = numerics.half_bits.py_func.__code__.co_firstlineno
    here = put(tmp_path / f"numerics.half_bits-{line}.py311.1.nbc", 400)
    put(tmp_path / f"numerics.half_bits-{line + 1}.py311.nbi", 31)
    put(tmp_path / f"numerics.gone-{line}.py311.1.nbc", 31)
    fresh = put(tmp_path / f"numerics.half_bits-{line + 2}.py311.nbi", 29)
    remove_old_quantisers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([here, fresh])


def test_numba_names_quantisers_as_is_supposed() -> None:
    index = Path(numerics.half_bits._cache._cache_file._index_path)
    found = old_files._FILE.fullmatch(index.name)
    assert found
    assert found["place"] in old_files._functions(Path(numerics.__file__).parent)


def test_old_files_are_looked_for_only_where_something_was_compiled(folder: Path) -> None:
    old = kernel(folder, 1, _OTHER, days=31)
    with kept_in_order(choose_simd()):
        pass
    assert all(path.exists() for path in old)
    with kept_in_order(choose_simd()):
        compile_something()
    assert not any(path.exists() for path in old)
    assert [path.name for path in folder.iterdir()] == [f"kernels-{sources_hash()}.used"]


def test_use_is_marked_once_a_day(tmp_path: Path) -> None:
    mark = tmp_path / f"kernels-{sources_hash()}.used"
    mark_used(tmp_path)
    for days, renewed in ((0.9, False), (1.1, True)):
        put(mark, days)
        mark_used(tmp_path)
        assert (time.time() - mark.stat().st_mtime < 3600) is renewed


def test_an_engine_opens_where_kernels_are_not_kept_or_the_folder_is_lost(
    tmp_path: Path, monkeypatch
) -> None:
    for cache in (SimpleNamespace(cache_path=None), SimpleNamespace(cache_path=tmp_path / "no")):
        kept = SimpleNamespace(_cache=cache)
        monkeypatch.setattr(compiled_files, "runner", lambda simd, kept=kept: kept)
        with kept_in_order(choose_simd()):
            compile_something()
    assert list(tmp_path.iterdir()) == []

"""The corpus rules on a small made-up library: what is kept, what is dropped, how it is split."""

from pathlib import Path

import pytest

from refimpl.mini import corpus

CODE = "def area(w, h):\n    return w * h\n" * 10
TABLE = "table = (\n" + "".join(f"    '\\x{i:02x}'  # entry\n" for i in range(120)) + ")\n"


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return _write(
        tmp_path,
        {
            "kept.py": CODE,
            "copy_of_kept.py": CODE,
            "tiny.py": "x = 1\n",
            "encodings/table.py": TABLE,
            "lib2to3/old.py": "print 'no longer Python'\n" + CODE,
            "_sysconfigdata_x.py": CODE + "# builder's paths\n",
            "site-packages/foreign.py": CODE + "# foreign\n",
            "test/test_area.py": CODE + "# a unit test\n",
        },
    )


def test_keeps_code_once_and_drops_tables_fixtures_and_foreign_files(library: Path) -> None:
    paths = [d.path for d in corpus.load(library).documents]
    assert paths == ["copy_of_kept.py", "test/test_area.py"]  # the first of two equal files


def test_unit_tests_are_marked(library: Path) -> None:
    marked = {d.path: d.is_test for d in corpus.load(library).documents}
    assert marked == {"copy_of_kept.py": False, "test/test_area.py": True}


def test_the_split_depends_on_the_path_alone(tmp_path: Path) -> None:
    files = {f"module_{i}.py": CODE + f"# {i}\n" for i in range(200)}
    first = corpus.load(_write(tmp_path / "a", files))
    changed = {name: text + "# changed\n" for name, text in files.items()}
    second = corpus.load(_write(tmp_path / "b", changed))
    held = [d.path for d in first.select(held_out=True)]
    assert 0 < len(held) < 40
    assert held == [d.path for d in second.select(held_out=True)]
    assert first.digest != second.digest


def test_a_table_is_told_from_code() -> None:
    assert corpus.looks_like_table(TABLE)
    assert not corpus.looks_like_table(CODE * 10)

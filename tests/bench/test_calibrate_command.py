"""`bench calibrate`: what cannot be used or written is refused before the long computation."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import main


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--as-of", "yesterday"], "'yesterday' is no date such as 2026-11-22"),
        (["--as-of", "2026-13"], "'2026-13' is no date"),
        (["--out", "."], "Is a directory"),
        (["--out", "file/fit.json"], "file"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_fitted(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fitted first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.calibrate.calibrate", never)
    Path("file").write_text("no folder")
    result = CliRunner().invoke(main, ["calibrate", *words])
    assert result.exit_code == 2, result.output
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

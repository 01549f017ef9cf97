"""The training text: Python's standard library, chosen by fixed rules, split by a hash of the path.

Everything here is a pure function of the files of the running interpreter, so the same Python
release gives the same corpus, the same split and the same digest (`Corpus.digest`).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

MIN_BYTES = 200
MAX_BYTES = 1_000_000
HELD_LIBRARY = 0.05  # share of the library files that is held out
HELD_TESTS = 0.004  # unit tests are many and alike: a few are enough to judge on

_SKIPPED_PARTS = {"site-packages", "dist-packages", "__pycache__", "_bundled"}
# The manual's prose in string literals: as large as a tenth of the library, so never held out.
_PROSE = {"pydoc_data/topics.py"}
_TEST_PARTS = {"test", "tests", "idle_test"}
# A line of a table: it starts with a quoted or numeric literal (codec maps, name tables).
_TABLE_LINE = re.compile(r"\s*(?:['\"]|[\(\[{]?\s*(?:0x|\d|\\|'\\))")
_TABLE_SHARE = 0.4
_TABLE_MIN_LINES = 100


@dataclass(frozen=True)
class Document:
    """One source file: POSIX path below the library's root, its text, and its part."""

    path: str
    text: str
    is_test: bool
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """All documents in path order, with the digest that identifies them."""

    documents: tuple[Document, ...]
    digest: str

    def select(self, *, held_out: bool, is_test: bool | None = None) -> list[Document]:
        """Documents of one side of the split, optionally only library or only unit tests."""
        return [
            d
            for d in self.documents
            if d.held_out == held_out and (is_test is None or d.is_test == is_test)
        ]


def _unit_hash(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def looks_like_table(text: str) -> bool:
    """True when a large share of the lines are entries of a literal table."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < _TABLE_MIN_LINES:
        return False
    return sum(bool(_TABLE_LINE.match(line)) for line in lines) > _TABLE_SHARE * len(lines)


def _is_python(text: str) -> bool:
    """True when the running interpreter's parser accepts the text (drops Python 2 fixtures)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def _wanted(relative: str, raw: bytes) -> str | None:
    """The text of a file that belongs in the corpus, or None."""
    name = relative.rsplit("/", 1)[-1]
    if name.startswith("_sysconfigdata") or not MIN_BYTES <= len(raw) <= MAX_BYTES:
        return None  # the first holds the paths of the machine that built the interpreter
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(8).replace("\x0c", "")
    if relative not in _PROSE and looks_like_table(text):
        return None
    return text if _is_python(text) else None


def load(root: Path | None = None) -> Corpus:
    """Read the corpus below `root` (default: the running interpreter's standard library)."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        parts = set(relative.split("/"))
        if parts & _SKIPPED_PARTS or relative.startswith("config-"):
            continue
        text = _wanted(relative, path.read_bytes())
        if text is None:
            continue
        content = hashlib.sha256(text.encode()).digest()
        if content in seen:
            continue
        seen.add(content)
        is_test = bool(parts & _TEST_PARTS)
        share = HELD_TESTS if is_test else HELD_LIBRARY
        held_out = relative not in _PROSE and _unit_hash(relative) < share
        documents.append(Document(relative, text, is_test, held_out))
        digest.update(relative.encode() + b"\0" + content)
    return Corpus(tuple(documents), digest.hexdigest())

"""Compiled code that other versions left on disk goes once it has not been used for long.

Every version of the sources compiles files of its own, and nothing else would ever remove them: a
package's folder of compiled modules outlives its upgrades. `refimpl.engine.compiled_files` says
when this is done.

A kernel's file names its version in the type of its instruction set (`Simd.sources`), so it is told
apart by what it holds; nothing in it is loaded. All files of the present version stay, those
compiled for other processors, Python or Numba versions too: they grow no more. A quantiser's file
names the line of its function, which other versions have elsewhere or not at all.

Another process that loads a file meanwhile has it open, or does not find it and compiles; where
open files cannot be deleted, they stay until the next time.
"""

from __future__ import annotations

import ast
import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from refimpl.engine.compiled_files import folder_of
from refimpl.engine.simd import sources_hash

_UNUSED_S = 30 * 86_400
# <module>.<function>-<line>.py<version>[-<digest>], an index of versions or one's code, perhaps
# half-written (numba.core.caching; the digest is of `refimpl.engine.jit`).
_FILE = re.compile(
    r"(?P<kernel>(?P<place>[\w.]+-\d+)\.py\d+\w*(-[0-9a-f]{16})?)"
    r"(?P<kind>\.nbi|\.\d+\.nbc)(?P<half>\.tmp\.[0-9a-f]{16})?"
)
_ANSWER = re.compile(r"amx_check-(?P<sources>[0-9a-f]{16})-[0-9a-f]{16}\.json")
_MARK = re.compile(r"kernels-(?P<sources>[0-9a-f]{16})\.used")
# A `Simd` as text and as part of a symbol's name.
_SOURCES = re.compile(rb"sources(?:='|_3d_27)([0-9a-f]{16})(?:'|_27)")


def remove_old_kernels(folder: Path) -> list[Path]:
    """Delete other versions' kernels that were not used lately; the files that are gone.

    Raises:
        OSError: the folder cannot be read.
    """
    marks = [(path, found["sources"]) for path, found in _matching(folder, _MARK)]
    recent = {sources_hash(), *(sources for path, sources in marks if not _unused(path))}
    gone = _remove(folder, lambda kept: _is_old(kept, recent))
    for path, found in (*_matching(folder, _ANSWER), *_matching(folder, _MARK)):
        if found["sources"] not in recent:
            gone += _deleted(path)
    return gone


def remove_old_quantisers(folder: Path | None = None) -> list[Path]:
    """Delete compiled quantisers of other versions; the files that are gone.

    Args:
        folder: where they are kept; None asks Numba.

    Raises:
        OSError: a folder cannot be read.
    """
    from refimpl.checkpoint.quantise import numerics

    folder = folder or folder_of(numerics.half_bits)
    if folder is None:
        return []
    present = _functions(Path(numerics.__file__).parent)
    return _remove(folder, lambda kept: kept.place not in present)


@dataclass
class _Kept:
    """The files of one compiled function: an index and the code of one or more versions."""

    place: str
    files: list[Path] = field(default_factory=list)
    code: list[Path] = field(default_factory=list)


def _remove(folder: Path, is_old: Callable[[_Kept], bool]) -> list[Path]:
    """Delete functions' files of which none was written lately, where `is_old` says so."""
    functions: dict[str, _Kept] = {}
    for path, found in _matching(folder, _FILE):
        kept = functions.setdefault(found["kernel"], _Kept(found["place"]))
        kept.files.append(path)
        if found["kind"] != ".nbi" and not found["half"]:
            kept.code.append(path)
    gone = []
    for kept in functions.values():
        with contextlib.suppress(OSError):  # another process was faster
            if all(map(_unused, kept.files)) and is_old(kept):
                for path in kept.files:
                    gone += _deleted(path)
    return gone


def _is_old(kept: _Kept, recent: set[str]) -> bool:
    """Whether code belongs to other versions than the recent ones. Code that names no version is
    not known to be old; an index without code is of no use."""
    named = set()
    for path in kept.code:
        found = set(_SOURCES.findall(path.read_bytes()))
        if not found:
            return False
        named |= {sources.decode() for sources in found}
    return named.isdisjoint(recent)


def _functions(folder: Path) -> set[str]:
    """Functions of a folder's modules as <module>.<function>-<line>, as Numba names files."""
    return {
        f"{path.stem}.{node.name}-{min([node.lineno, *(d.lineno for d in node.decorator_list)])}"
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.FunctionDef)
    }


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Files whose whole name matches, links and folders aside."""
    found = ((path, pattern.fullmatch(path.name)) for path in folder.iterdir())
    return [(p, m) for p, m in found if m and p.is_file() and not p.is_symlink()]


def _unused(path: Path) -> bool:
    """Whether a file was written or marked long ago, or is gone."""
    try:
        return time.time() - path.stat().st_mtime > _UNUSED_S
    except FileNotFoundError:
        return True


def _deleted(path: Path) -> list[Path]:
    """The path, if the file has not been written to since and could be deleted."""
    with contextlib.suppress(OSError):
        if _unused(path):
            path.unlink()
            return [path]
    return []

"""Large files that can be continued: written as OUT.partial, renamed when whole.

Beside OUT.partial lies OUT.partial.json, a journal: what is being written (a digest over source,
type and header) and up to which tensor the bytes are safely on the disk. The same conversion
started again goes on from there; any other starts anew and says so. The journal is brought up to
date after every 256 MB, and when the run is interrupted or the disk fills up.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from refimpl.checkpoint.atomic import atomic_file, sync_folder
from refimpl.errors import InputError, RefimplError

JOURNAL_BYTES = 256 << 20
_JOURNAL_LIMIT = 4096
Say = Callable[[str], None]


@dataclass
class PartialFile:
    """A file that is being written.

    Attributes:
        file: open at the end of what is complete.
        complete: tensors that are there already.
        end: where the last of them ends.
    """

    file: BinaryIO
    complete: int
    end: int
    _identity: str = ""
    _journal: Path | None = None
    _safe_bytes: int = 0

    def finished(self, tensors: int) -> None:
        """State that the first `tensors` tensors are written, up to the file's present end."""
        self.complete, self.end = tensors, self.file.tell()
        if self._journal and self.end - self._safe_bytes >= JOURNAL_BYTES:
            self.keep()

    def keep(self) -> None:
        """Make what is complete, and the record of it, durable."""
        self.file.flush()
        os.fsync(self.file.fileno())
        record = {"identity": self._identity, "tensors": self.complete, "bytes": self.end}
        assert self._journal is not None
        try:
            with atomic_file(self._journal) as file:
                file.write((json.dumps(record) + "\n").encode())
        except InputError as error:  # the disk's fault: what is complete stays
            raise OSError(str(error)) from None
        self._safe_bytes = self.end


def partial_paths(out: Path) -> tuple[Path, Path]:
    """The partial file and the journal of an output."""
    partial = out.with_name(out.name + ".partial")
    return partial, partial.with_name(partial.name + ".json")


@contextlib.contextmanager
def resumable_file(
    out: Path, identity: str, header: bytes, tensors: int, say: Say
) -> Iterator[PartialFile]:
    """A file that becomes `out` when the block ends without an error.

    Ctrl-C and a refusing disk leave what is complete, an error in the data nothing.

    Args:
        identity: digest of all that decides the bytes.
        header: first bytes of the file.
        tensors: how many will follow, for messages.
        say: takes remarks for the user, one sentence each.

    Raises:
        InputError: the file cannot be written, or another conversion is writing it.
    """
    partial, journal = partial_paths(out)
    try:
        file = open(partial, "r+b" if partial.exists() else "x+b")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        _lock(file, partial, out, stack)
        state = None
        try:
            state = _begin(file, journal, identity, header, tensors, say, partial)
            yield state
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(partial, out)
            journal.unlink(missing_ok=True)
            sync_folder(out.parent)
        except RefimplError:  # the same conversion would end here again
            _remove(partial, journal)
            raise
        except OSError as error:
            _leave(state, tensors, say, partial, journal)
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            _leave(state, tensors, say, partial, journal)
            raise


def require_space(out: Path, needed_bytes: int) -> None:
    """Refuse a file or folder that the disk has no room for, before anything is written.

    Raises:
        InputError: less is free than the file needs beyond what its partial file holds.
    """
    partial, _ = partial_paths(out)
    try:
        free = shutil.disk_usage(out.parent).free
        held = partial.stat().st_blocks * 512 if partial.exists() else 0
    except (OSError, AttributeError):
        return  # writing will tell
    if needed_bytes - held > free:
        raise InputError(
            f"{out}: needs {_size(needed_bytes)}, {_size(free + held)} are free in "
            f"{out.parent}; make room or write elsewhere"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _begin(
    file: BinaryIO,
    journal: Path,
    identity: str,
    header: bytes,
    tensors: int,
    say: Say,
    partial: Path,
) -> PartialFile:
    size = os.fstat(file.fileno()).st_size
    found, end = _journalled(journal, identity)
    if 0 < found <= tensors and len(header) <= end <= size and file.read(len(header)) == header:
        file.seek(end)
        file.truncate()
        say(f"{partial}: going on after {found} of {tensors} tensors ({end / 1e6:,.0f} MB)")
        return PartialFile(file, found, end, identity, journal, end)
    if size:
        say(f"{partial}: is of another conversion or unusable; starting anew")
    journal.unlink(missing_ok=True)
    file.seek(0)
    file.truncate()
    file.write(header)
    return PartialFile(file, 0, len(header), identity, journal, 0)


def _journalled(path: Path, identity: str) -> tuple[int, int]:
    """Complete tensors and bytes by the journal; zeros if it is missing, damaged or of another
    conversion."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(_JOURNAL_LIMIT))
    except (OSError, ValueError, RecursionError):
        return 0, 0
    if not isinstance(data, dict) or data.get("identity") != identity:
        return 0, 0
    found, end = data.get("tensors"), data.get("bytes")
    return (found, end) if type(found) is int and type(end) is int else (0, 0)


def _leave(state: PartialFile | None, tensors: int, say: Say, partial: Path, journal: Path) -> None:
    """Keep what is complete, if anything is, and say how to go on."""
    if state is None or not state.complete:
        _remove(partial, journal)
        return
    with contextlib.suppress(OSError, ValueError, InputError):
        state.keep()
    say(
        f"{partial}: holds {state.complete} of {tensors} tensors; the same command goes on from "
        "there, deleting the file starts anew"
    )


def _remove(partial: Path, journal: Path) -> None:
    for path in (partial, journal):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(file: BinaryIO, partial: Path, out: Path, stack: contextlib.ExitStack) -> None:
    """Hold the file against a second conversion, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    held = os.dup(file.fileno())  # the lock outlives the file's closing, up to its renaming
    stack.callback(os.close, held)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.stat(partial).st_ino == os.fstat(held).st_ino
    except OSError:
        same = False
    if not same:  # held by another, or renamed by it just now
        raise InputError(
            f"{out}: another conversion is writing it; wait for that one or choose another name"
        )

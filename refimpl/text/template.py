"""Chat templates: Jinja programs that come with a checkpoint, and therefore from a stranger.

jinja2's immutable sandbox keeps a template from Python's internals (CVE-2024-34359 and
CVE-2026-5760 were loaders that rendered without it), but limits neither time nor memory: nested
loops, `'x' * 10**9`, `center`, `format` and many more are within its rules. Checks in the same
process would have to foresee each of them. So templates are rendered in a child process that has
given up files, programs and memory beyond a limit, and that the kernel ends when its processor
time is over; if somebody finds a way out of the sandbox, that is where it leads. The child is
started once (about a tenth of a second) and kept; a rendering then takes about a millisecond.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.errors import CheckpointError

MAX_TEMPLATE_CHARS = 1 << 20
_ENVIRONMENT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # to start, no more


@dataclass(frozen=True)
class Limits:
    """What one rendering may use.

    Attributes:
        cpu_s: processor time.
        wall_s: time in all, for systems that cannot limit processor time.
        memory_bytes: memory beside what the process needs anyway.
        output_chars: length of the text.
    """

    cpu_s: float = 2.0
    wall_s: float = 30.0
    memory_bytes: int = 256 << 20
    output_chars: int = 16 << 20


DEFAULT_LIMITS = Limits()


class ChatTemplate:
    """A chat template that can be rendered; a context manager, for it holds a child process.

    Args:
        source: the Jinja text.
        where: where it came from, for messages.
        variables: what every rendering is given, such as `bos_token`.
        limits: what one rendering may use.

    Raises:
        CheckpointError: the text is far too long for a template.
    """

    def __init__(
        self,
        source: str,
        where: object,
        variables: Mapping[str, Any] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"{where}: the chat template has {len(source)} characters, at most "
                f"{MAX_TEMPLATE_CHARS} are read; pass another one with --template FILE"
            )
        self.source, self.where = source, where
        self._variables, self._limits = dict(variables or {}), limits
        self._child: subprocess.Popen[bytes] | None = None
        self._late = False

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, **variables: Any) -> str:
        """The text for `variables` (plain JSON values: messages, tools, add_generation_prompt...).

        Raises:
            CheckpointError: the template is not valid, refuses the conversation, does what the
                sandbox forbids, or uses more time, memory or text than it may.
        """
        limits = self._limits
        request = {
            "source": self.source,
            "variables": {**self._variables, **variables},
            "cpu_s": limits.cpu_s,
            "output_chars": limits.output_chars,
        }
        reply = self._ask(json.dumps(request).encode())
        try:
            made = json.loads(reply) if reply.endswith(b"\n") else None
        except ValueError:
            made = None
        if isinstance(made, dict) and isinstance(made.get("text"), str):
            text: str = made["text"]
            return text
        kind, detail = "gone", ""
        if isinstance(made, dict):
            kind, detail = str(made.get("error")), _shown(str(made.get("detail")))
        ended = self.close()
        raise CheckpointError(f"{self.where}: {self._complaint(kind, detail, ended)}")

    def _ask(self, request: bytes) -> bytes:
        """The child's answer; what there is of it, if the child ends."""
        if self._child is None:
            self._child = _start(self._limits)
        child, limits = self._child, self._limits
        assert child.stdin is not None and child.stdout is not None
        self._late = False
        deadline = threading.Timer(limits.wall_s, self._stop, [child])
        deadline.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request + b"\n")
                child.stdin.flush()
            # A character takes at most 12 bytes as JSON (a pair of \uXXXX).
            return child.stdout.readline(12 * limits.output_chars + 4096)
        except BaseException:
            self.close()  # half an answer must not be taken for the next one's
            raise
        finally:
            deadline.cancel()

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        self._late = True
        child.kill()

    def _complaint(self, kind: str, detail: str, ended: int | None) -> str:
        limits = self._limits
        if kind == "gone" and (self._late or _by_clock(ended)):
            return (
                f"the chat template was stopped after {limits.cpu_s:g} s of work; it seems not to "
                "end; pass another one with --template FILE"
            )
        sentences = {
            "syntax": f"the chat template is not valid Jinja ({detail})",
            "security": f"the chat template does what the sandbox forbids ({detail}); "
            "do not trust this file",
            "size": f"the chat template's text exceeds {limits.output_chars} characters",
            "memory": f"the chat template needs more than {limits.memory_bytes >> 20} MiB",
            "recursion": "the chat template calls itself without end",
            "failed": f"the chat template refuses this conversation ({detail})",
        }
        return sentences.get(kind, "the chat template ended the process that renders it")

    def close(self) -> int | None:
        """End the child process, if there is one; its exit code."""
        child, self._child = self._child, None
        if child is None:
            return None
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def _shown(detail: str) -> str:
    """A stranger's words, fit for a terminal: one short line, no control characters."""
    plain = "".join(c if c.isprintable() else " " for c in detail[:200])
    return plain.strip().rstrip(".")


def _by_clock(ended: int | None) -> bool:
    import signal

    return ended is not None and ended == -getattr(signal, "SIGPROF", 0)


def _start(limits: Limits) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        # Isolated: neither the working directory nor PYTHON* variables say what is imported.
        [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        start_new_session=True,  # Ctrl-C at the terminal is not for the child
    )
    assert child.stdin is not None
    first = {"path": sys.path, "memory_bytes": limits.memory_bytes}
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(first).encode() + b"\n")
        child.stdin.flush()
    return child

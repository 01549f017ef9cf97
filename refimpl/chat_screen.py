"""A chat at a terminal or over a pipe: lines in, commands, answers as they come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from refimpl.cli_support import note, progress_bar
from refimpl.errors import InputError
from refimpl.text.output import Piece
from refimpl.text.session import ChatSession, Turn

HELP = """\
/help              this list
/reset             begin a new conversation (the system message stays)
/system TEXT       replace the system message and begin a new conversation; without TEXT: none
/stats             tokens, speed, accepted drafts, context used
/tool NAME RESULT  give the result of a tool call; the answer comes after the last one
/exit              end, as Ctrl-D does
A line that ends with a backslash goes on in the next; // at its beginning stands for one /."""

_CONTROL = {code: "�" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Screen:
    """Shows the pieces of answers.

    The content goes to stdout. The reasoning goes there too at a terminal, dimmed, or between two
    labels where colour is not wanted; else to stderr.
    """

    def __init__(self, hide_reasoning: bool) -> None:
        self._terminal = sys.stdout.isatty()
        self.interactive = self._terminal and sys.stdin.isatty()
        colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._colour = self._terminal and colour
        self._hide = hide_reasoning
        self._now = ""
        self._ends_line = True

    def show(self, piece: Piece) -> None:
        """One more piece."""
        if piece.kind == "reasoning" and self._hide:
            return
        if piece.kind != self._now:
            self._switch(piece.kind)
        if piece.call is not None:
            self._call(piece)
        elif piece.kind == "reasoning":
            self._write(piece.text, err=not self._terminal)
        else:
            self._write(piece.text)

    def finish(self) -> None:
        """The answer is complete."""
        self._switch("")

    def _switch(self, kind: str) -> None:
        if self._now == "reasoning" and self._colour:
            self._raw("\x1b[0m", False)
        if not self._ends_line:
            self._raw("\n", self._now == "reasoning" and not self._terminal)
        self._ends_line = True
        if self._terminal and not self._colour and "reasoning" in (self._now, kind) and kind:
            self._raw("[reasoning]\n" if kind == "reasoning" else "[answer]\n", False)
        if kind == "reasoning" and self._colour:
            self._raw("\x1b[2m", False)
        self._now = kind

    def _call(self, piece: Piece) -> None:
        assert piece.call is not None
        arguments = json.dumps(piece.call.arguments, ensure_ascii=False)
        self._write(f"[call] {piece.call.name} {arguments}\n")
        for problem in piece.call.problems:
            note(f"note: {problem}")

    def _write(self, text: str, err: bool = False) -> None:
        if not text:
            return
        self._ends_line = text.endswith("\n")
        # What a model writes is no reason to move the cursor or to rename the window.
        self._raw(text.translate(_CONTROL) if self._terminal else text, err)

    def _raw(self, text: str, err: bool) -> None:
        click.echo(text, nl=False, err=err, color=True)


def lines(interactive: bool) -> Iterator[str]:
    """Messages from stdin; a backslash at a line's end joins the next one to it."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its editing and history)
    said = ""
    for line in _typed() if interactive else _piped():
        if line is None:
            said = ""
            continue
        said += line
        if said.endswith("\\"):
            said = said[:-1] + "\n"
            continue
        message, said = said, ""
        if message.strip():
            yield message
    if said.strip():
        yield said


def _typed() -> Iterator[str | None]:
    """Lines typed at a terminal; None where Ctrl-C threw one away."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            yield None


def _piped() -> Iterator[str]:
    if sys.stdin is None:
        raise InputError("stdin is closed; nothing can be said")
    for n, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: line {n} is not UTF-8 at byte {error.start}") from None


class Commands:
    """What lines that begin with a slash do.

    Attributes:
        ended: whether the user has had enough.
    """

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._waiting: list[str] = []
        self.ended = False

    def run(self, line: str) -> bool:
        """Take in a line; whether the model is to answer.

        Raises:
            InputError: an unknown command, or one that makes no sense now.
        """
        conversation = self._session.conversation
        if not line.startswith("/") or line.startswith("//"):
            conversation.add({"role": "user", "content": line.removeprefix("/")})
            return True
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            self.ended = True
        elif name == "help":
            click.echo(HELP)
        elif name == "stats":
            click.echo(stats_text(self._session))
        elif name == "reset":
            conversation.reset()
        elif name == "system":
            conversation.reset()
            conversation.set_system(rest or None)
        elif name == "tool":
            return self._tool(rest)
        else:
            raise InputError(f"there is no command /{name[:40]}; /help shows those there are")
        return False

    def _tool(self, rest: str) -> bool:
        name, _, result = rest.partition(" ")
        open_calls = unanswered(self._session)
        names = [call["function"]["name"] for call in open_calls]
        if name not in names:
            shown = f"calls without a result: {', '.join(names)}" if names else "none is waited for"
            raise InputError(f"/tool NAME RESULT: no result of '{name[:40]}' is expected ({shown})")
        call = open_calls[names.index(name)]
        result = result.strip()
        self._session.conversation.add(
            {"role": "tool", "name": name, "tool_call_id": call["id"], "content": result}
        )
        left = unanswered(self._session)
        if left:
            note("note: results missing of: " + ", ".join(c["function"]["name"] for c in left))
        return not left


def unanswered(session: ChatSession) -> list[dict[str, Any]]:
    """Tool calls of the last answer that have no result yet."""
    messages = session.conversation.messages
    done = set()
    for message in reversed(messages):
        if message["role"] == "tool":
            done.add(message.get("tool_call_id"))
        else:
            calls = message.get("tool_calls") or []
            return [call for call in calls if call["id"] not in done]
    return []


def answer(session: ChatSession, screen: Screen) -> Turn:
    """The model's answer, shown as it comes; Ctrl-C stops it, a second Ctrl-C at once.

    Raises:
        KeyboardInterrupt: it was stopped where nobody can type the next message.
    """
    with progress_bar("prompt") as move, interrupts() as stopped:

        def long(done: int, total: int) -> None:
            if total > 512:
                move(done, total)

        turn = session.answer(screen.show, stopped, long)
    screen.finish()
    reason = turn.generation.finish_reason
    if reason == "interrupted" and not screen.interactive:
        raise KeyboardInterrupt
    if reason == "interrupted":
        note("stopped")
    elif reason == "length":
        note("the answer was cut at --max-new-tokens")
    elif reason == "context":
        note(f"the context of {session.context} tokens is full; /reset begins a new conversation")
    return turn


@contextlib.contextmanager
def interrupts() -> Iterator[Any]:
    """Within, Ctrl-C is remembered (the function given says whether it came); a second one raises
    KeyboardInterrupt as usual."""
    came = False

    def remember(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            signal.default_int_handler(number, frame)
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def stats_text(session: ChatSession) -> str:
    """The sums of a chat, as /stats shows them."""
    t = session.totals
    ran = t.prompt_tokens - t.reused_tokens
    rows = [
        f"answers   {t.turns}",
        f"context   {session.context_tokens} of {session.context} tokens",
        f"prompts   {t.prompt_tokens} tokens, {t.reused_tokens} of them kept from the turn before, "
        f"{ran} run{_speed(ran, t.prefill_s)}",
        f"text      {t.new_tokens} tokens{_speed(t.decoded_tokens, t.decode_s)}",
    ]
    if t.drafted:
        rows.append(
            f"drafts    {t.accepted} of {t.drafted} accepted, {t.accepted / t.steps:.2f} a step"
        )
    return "\n".join(rows)


def _speed(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""

"""What a model writes, taken apart while it comes: reasoning, content, tool calls.

The opening `<think>` is in the prompt, so the text begins inside the reasoning and holds only
`</think>`. The model tends to put a line break before and after that tag; exactly those two are
dropped, as the template puts them back (the rule of vLLM's step3p5 reasoning parser).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from refimpl.text.call_reader import FUNCTION, OPEN, CallReader
from refimpl.text.tools import ToolCall, Tools

THINK, END_THINK = "<think>", "</think>"

Kind = Literal["reasoning", "content", "tool_call"]


@dataclass(frozen=True)
class Piece:
    """A piece of the answer: text of the reasoning or the content, or a whole tool call."""

    kind: Kind
    text: str = ""
    call: ToolCall | None = None


@dataclass
class Answer:
    """All pieces together."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take in a piece."""
        if piece.call is not None:
            self.calls.append(piece.call)
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
        else:
            self.content += piece.text

    def as_message(self) -> dict[str, Any]:
        """The assistant's message, as templates and OpenAI's interface have it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.as_message(n) for n, call in enumerate(self.calls)]
        return message


class OutputParser:
    """Splits text that comes in pieces of any size; never shows a part of a tag.

    Args:
        tools: definitions that the prompt held; calls are recognised without them too, but a
            bare `<function=NAME>` only for their names.
        in_reasoning: whether the prompt ended inside the reasoning.
    """

    def __init__(self, tools: Tools | None = None, in_reasoning: bool = True) -> None:
        self._tools = tools or Tools()
        self._starts = [OPEN, *(f"{FUNCTION}{name}>" for name in self._tools.names)]
        self._text = ""
        self._state = self._reasoning if in_reasoning else self._content
        self._begun = False  # whether anything was read in this state
        self._thought = in_reasoning
        self._after_call = False  # white space is then held back
        self._reader: CallReader | None = None
        self._pieces: list[Piece] = []
        self.answer = Answer()

    def push(self, text: str) -> list[Piece]:
        """The pieces that can be shown now."""
        self._text += text
        while self._state():
            pass
        return self._taken()

    def finish(self, cut: bool = False) -> list[Piece]:
        """The pieces still held back, when no more text follows.

        Args:
            cut: a limit or the user ended the text, not the model; a tool call that is not
                complete is then shown as text.
        """
        while self._reader is not None:
            self._end_call(self._reader, self._reader.finish(cut))
            while not cut and self._state():
                pass
        if not (self._after_call and not self._text.strip()):
            self._emit("reasoning" if self._state == self._reasoning else "content", self._text)
        self._text = ""
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            self.answer.add(piece)
        return pieces

    def _emit(self, kind: Kind, text: str) -> None:
        if text:
            self._pieces.append(Piece(kind, text))

    def _reasoning(self) -> bool:
        """Up to `</think>`; true if the state changed and text is left."""
        if not self._begun:
            # Some models repeat the tag that the prompt ended with.
            if self._text and (THINK + "\n").startswith(self._text):
                return False
            if self._text.startswith(THINK):
                self._text = self._text.removeprefix(THINK).removeprefix("\n")
            self._begun = bool(self._text)
        at = self._text.find(END_THINK)
        if at < 0:
            held = _held(self._text, ["\n" + END_THINK, END_THINK])
            self._show("reasoning", len(self._text) - held)
            return False
        self._emit("reasoning", self._text[:at].removesuffix("\n"))
        self._text = self._text[at + len(END_THINK) :]
        self._state, self._begun = self._line_break, False
        return True

    def _line_break(self) -> bool:
        """After `</think>`: one line break is dropped."""
        if not self._text:
            return False
        self._text = self._text.removeprefix("\n")
        self._state = self._content
        return True

    def _content(self) -> bool:
        if not self._begun and not self._thought and self._think():
            return self._state == self._reasoning
        found = [(at, tag) for tag in self._starts if (at := self._text.find(tag)) >= 0]
        if not found:
            self._show("content", len(self._text) - _held(self._text, self._starts))
            return False
        at, tag = min(found)
        self._show("content", at, before_call=True)
        self._reader = CallReader(self._tools, tag == OPEN)
        self._text = self._text.removeprefix(OPEN)
        self._state = self._call
        return True

    def _think(self) -> bool:
        """Before any content, `<think>` opens a reasoning that the prompt did not; true if that
        is so or cannot be said yet."""
        text = self._text.lstrip()
        if text.startswith(THINK) and text != THINK:
            self._text, self._state = text.removeprefix(THINK).removeprefix("\n"), self._reasoning
            self._begun = self._thought = True
            return True
        if THINK.startswith(text):
            return True
        self._begun = bool(text)
        return False

    def _show(self, kind: Kind, n: int, before_call: bool = False) -> None:
        shown, rest = self._text[:n], self._text[n:]
        if self._after_call and not shown.strip():
            # Between two calls and after the last one, white space means nothing.
            self._text = rest if before_call else shown + rest
            return
        self._after_call = False
        self._emit(kind, shown)
        self._text = rest

    def _call(self) -> bool:
        assert self._reader is not None
        rest = self._reader.push(self._text)
        self._text = ""
        if rest is None:
            return False
        self._end_call(self._reader, rest)
        return True

    def _end_call(self, reader: CallReader, rest: str) -> None:
        if reader.call is None:
            self._emit("content", reader.raw)
        else:
            self._pieces.append(Piece("tool_call", call=reader.call))
        self._reader, self._text = None, rest
        self._state, self._after_call, self._begun = self._content, reader.call is not None, True


def _held(text: str, tags: list[str]) -> int:
    """Length of the longest end of `text` that begins one of `tags`."""
    longest = max(len(tag) for tag in tags) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-n:]) for tag in tags):
            return n
    return 0

"""Where a generation ends: stop tokens, stop strings across token borders, limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from refimpl.errors import InputError

FinishReason = Literal["stop", "length", "context", "interrupted"]


class TextDecoder(Protocol):
    """Decodes tokens one by one and never returns half a character."""

    def push(self, token: int) -> str:
        """The text that becomes complete with `token` (often its text, sometimes nothing)."""

    def finish(self) -> str:
        """What is left: the replacement character where the last character is incomplete."""


class StopScanner:
    """Passes text on until a stop string appears in it.

    The stop string that is complete first ends the text (of several that end together, the
    longest), so that the outcome does not depend on how the text is cut into pieces. Text that
    could still become a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise InputError("a stop string is empty; leave the option out to have none")
        self._stops = tuple(stop_strings)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far, `text` included, that can be shown and was not yet."""
        if self.stopped:
            return ""
        self._held += text
        start = self._first_stop()
        if start is not None:
            self.stopped = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._undecided()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The text still held back, when no more follows; nothing after a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _first_stop(self) -> int | None:
        """Where the stop string that is complete first begins."""
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


class Ending:
    """Decides, token by token, where a generation ends and which text can be shown.

    Args:
        stop_tokens: ids that end the text; they have no text themselves.
        stop_strings: texts that end the text.
        max_new_tokens: the most tokens wanted.
        room: the most tokens that the context allows.
        new_decoder: makes the decoder of the tokens' text; None for no text.
    """

    def __init__(
        self,
        stop_tokens: frozenset[int],
        stop_strings: Sequence[str],
        max_new_tokens: int,
        room: int,
        new_decoder: Callable[[], TextDecoder] | None,
    ) -> None:
        self._stop_tokens = stop_tokens
        self._stop_strings = stop_strings
        self._max_new_tokens = max_new_tokens
        self._room = room
        self._new_decoder = new_decoder
        self._decoder = new_decoder() if new_decoder is not None else None
        self._scanner = StopScanner(stop_strings)
        self.count = 0

    def push(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], str, FinishReason | None]:
        """The part of `tokens` up to the end, the text to show, and why it ends (if it does)."""
        shown = ""
        for i, token in enumerate(tokens):
            self.count += 1
            shown += self._text(token)
            reason = self._reason(token)
            if reason is not None:
                return tuple(tokens[: i + 1]), shown, reason
        return tuple(tokens), shown, None

    def _text(self, token: int) -> str:
        if self._decoder is None or token in self._stop_tokens:
            return ""
        return self._scanner.push(self._decoder.push(token))

    def _reason(self, token: int) -> FinishReason | None:
        if token in self._stop_tokens or self._scanner.stopped:
            return "stop"
        if self.count >= self._max_new_tokens:
            return "length"
        return "context" if self.count >= self._room else None

    def finish(self) -> str:
        """The text still held back, when no more tokens follow."""
        if self._decoder is None:
            return ""
        return self._scanner.push(self._decoder.finish()) + self._scanner.finish()

    def text_of(self, tokens: Sequence[int]) -> str:
        """The whole text of `tokens`, from the first, as `push` and `finish` show it in pieces."""
        again = Ending(
            self._stop_tokens,
            self._stop_strings,
            len(tokens) + 1,
            len(tokens) + 1,
            self._new_decoder,
        )
        return again.push(tokens)[1] + again.finish()

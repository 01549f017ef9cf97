"""Reads one tool call out of text that arrives in pieces.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

VALUE is raw text over any number of lines, without its first and last line break. It may hold the
very tags that end it, and models leave tags out, so:

* `</parameter>` ends a value only where another parameter or the call's end follows;
* the next `<parameter=KEY>` ends it where KEY is a parameter that the tool has;
* `</function>` and `</tool_call>` end an open value only if no `</parameter>` comes after them.

Several functions in one `<tool_call>`, a function without `<tool_call>`, and a JSON object with
name and arguments in the place of the function are understood too.
"""

from __future__ import annotations

import json
import re

from refimpl.text.tools import ToolCall, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_MAX_NAME = 256

_IN_VALUE = re.compile(
    r"</parameter>|<parameter=([^>\n]{1,256})>|</function>|</tool_call>|<tool_call>"
)
_LAST = re.compile(r"\s*</tool_call>")
_LONGEST = len(PARAMETER) + _MAX_NAME + 1


class CallReader:
    """One call, from just after `<tool_call>` or at `<function=`.

    Args:
        wrapped: whether a `<tool_call>` came before.

    Attributes:
        raw: the text that the call was read from.
        call: the call, once it is complete.
    """

    def __init__(self, tools: Tools, wrapped: bool) -> None:
        self._tools = tools
        self.raw = OPEN if wrapped else ""
        self.call: ToolCall | None = None
        self._text = ""
        self._state = self._head
        self._name = ""
        self._given: list[tuple[str, str]] = []
        self._key = ""
        self._scan = 0  # in a value: where to look on
        self._ends: list[tuple[int, int]] = []  # in a value: what may end it, if all else fails
        self._closes = False  # in a value: `</tool_call>` was among those
        self._closed = False  # `</function>` was read

    def push(self, text: str) -> str | None:
        """Take more text; what follows the call, once it is complete or is none, else None."""
        self._text += text
        while True:
            before = self._state
            done = self._state()
            if done is not None:
                return done
            if self._state == before:
                return None

    def finish(self, cut: bool) -> str:
        """No more text follows: what does not belong to the call. A call that the model itself
        ended early is taken as it is; `cut` off by a limit, it is no call and `raw` has it."""
        if self._state == self._value and not cut:
            return self._give_up_value()
        if self._state == self._body and (self._closed or not cut):
            text = self._text.lstrip()
            return self._complete(
                0 if text and not text.startswith(("<", "</")) else len(self._text)
            )
        self._use(len(self._text))
        return ""

    def _give_up_value(self) -> str:
        """End a value at the first tag that may be its end, and with it the call."""
        text = self._text
        at = text.find(END_PARAMETER, self._scan)
        if at >= 0:
            self._ends.append((at, at + len(END_PARAMETER)))
        at, end = min(self._ends, default=(len(text), len(text)))
        self._given.append((self._key, _trimmed(text[:at])))
        last = _LAST.match(text, end)
        return self._complete(last.end() if last else end)

    def _head(self) -> str | None:
        text = self._text.lstrip()
        if text.startswith(FUNCTION):
            end = text.find(">")
            if 0 <= end <= len(FUNCTION) + _MAX_NAME:
                self._name = text[len(FUNCTION) : end].strip().strip("\"'")
                self._use(len(self._text) - len(text) + end + 1)
                self._state = self._body
                return None
            if len(text) <= len(FUNCTION) + _MAX_NAME:
                return None
        elif FUNCTION.startswith(text):
            return None
        end = self._text.find(CLOSE)
        if end < 0:
            return None
        self.call = self._from_json(self._text[:end])
        return self._use(end + len(CLOSE))

    def _from_json(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(text)
            given = found["arguments"]
            given = json.loads(given) if isinstance(given, str) else given
            pairs = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in given.items()]
            return self._tools.call(str(found["name"]), pairs)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _body(self) -> str | None:
        text = self._text.lstrip()
        skip = len(self._text) - len(text)
        if text.startswith(PARAMETER) and not self._closed:
            end = text.find(">")
            if end < 0 and len(text) <= len(PARAMETER) + _MAX_NAME:
                return None
            if end >= 0:
                self._key = text[len(PARAMETER) : end].strip().strip("\"'")
                self._use(skip + end + 1)
                self._state, self._scan, self._ends = self._value, 0, []
                self._closes = False
                return None
        if text.startswith(END_FUNCTION) and not self._closed:
            self._closed = True
            self._use(skip + len(END_FUNCTION))
            return self._after_function()
        if self._closed:
            return self._after_function()
        if text.startswith(CLOSE):
            return self._complete(skip + len(CLOSE))
        if text.startswith((OPEN, FUNCTION)):
            return self._complete(skip)
        if any(tag.startswith(text) for tag in (PARAMETER, END_FUNCTION, CLOSE, OPEN, FUNCTION)):
            return None
        # Words where only tags belong: they are not part of the call, and end it.
        return self._complete(0) if len(text) else None

    def _after_function(self) -> str | None:
        text = self._text.lstrip()
        if text.startswith(CLOSE):
            return self._complete(len(self._text) - len(text) + len(CLOSE))
        if CLOSE.startswith(text):
            return None
        return self._complete(0)

    def _value(self) -> str | None:
        text = self._text
        while (found := _IN_VALUE.search(text, self._scan)) is not None:
            tag, at, end = found.group(), found.start(), found.end()
            if tag == END_PARAMETER:
                follows = _follows(text[end:])
                if follows is None:
                    self._scan = at
                    return None
                if follows:
                    self._end_value(at, end)
                    return None
                self._ends.append((at, end))
            elif tag.startswith(PARAMETER):
                key = found.group(1).strip()
                if self._tools.declares(self._name, key) and key not in dict(self._given):
                    self._end_value(at, at)
                    return None
            elif tag == OPEN:
                if self._closes:
                    self._scan = at
                    return self._give_up_value()
            else:
                self._ends.append((at, end))
                self._closes |= tag == CLOSE
            self._scan = end
        self._scan = max(self._scan, len(text) - _LONGEST)
        return None

    def _end_value(self, at: int, after: int) -> None:
        self._given.append((self._key, _trimmed(self._text[:at])))
        self._use(after)
        self._state = self._body

    def _use(self, n: int) -> str:
        self.raw += self._text[:n]
        self._text = self._text[n:]
        return self._text

    def _complete(self, n: int = 0) -> str:
        self.call = self._tools.call(self._name, self._given)
        return self._use(n)


def _trimmed(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")


def _follows(after: str) -> bool | None:
    """Whether what comes after `</parameter>` shows that it was the end; None: not known yet."""
    text = after.lstrip()
    tags = (PARAMETER, END_FUNCTION, CLOSE, OPEN, FUNCTION)
    if text.startswith(tags):
        return True
    return None if any(tag.startswith(text) for tag in tags) else False

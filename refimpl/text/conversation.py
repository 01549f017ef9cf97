"""A conversation: its messages, and the prompt that a chat template makes of them.

Messages are those of OpenAI's interface: {"role": "system" | "user" | "assistant" | "tool",
"content": str}, an assistant's also with "reasoning_content" and "tool_calls", a tool's with
"name". Which reasoning the model sees again is the template's choice; Step's keeps it only after
the last user message, so that calls of tools go on from it and older turns do not carry it
(arXiv 2602.10604, section 5.4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refimpl.errors import InputError
from refimpl.text.output import THINK
from refimpl.text.template import ChatTemplate
from refimpl.text.tools import Tools

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue.

    Attributes:
        text: the whole prompt.
        history: its beginning, which later prompts have too: all but the generation prompt.
        in_reasoning: whether it ends inside the reasoning.
    """

    text: str
    history: str
    in_reasoning: bool


class Conversation:
    """Messages so far, to be written with one template.

    Args:
        template: the template.
        system: the first message, or None.
        tools: definitions that the model may call.
        keep_reasoning: ask the template (variable `preserve_thinking`) for the reasoning of all
            turns; None leaves it to the template.

    Raises:
        InputError: the template does not know `preserve_thinking`, or no tools.
    """

    def __init__(
        self,
        template: ChatTemplate,
        system: str | None = None,
        tools: Tools | None = None,
        keep_reasoning: bool = False,
    ) -> None:
        if keep_reasoning and "preserve_thinking" not in template.source:
            raise InputError(
                f"{template.where}: the template decides itself which reasoning it keeps "
                "(it has no variable preserve_thinking); leave --keep-reasoning out"
            )
        if tools and "tools" not in template.source:
            raise InputError(
                f"{template.where}: the template has no place for tools; use another one, such as "
                "--template step"
            )
        self._template, self._keep = template, keep_reasoning
        self.tools = tools or Tools()
        self.messages: list[dict[str, Any]] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None takes it away."""
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forget everything but the system message."""
        del self.messages[0 if self.system is None else 1 :]

    def add(self, message: Mapping[str, Any]) -> None:
        """Append a message.

        Raises:
            InputError: it is none.
        """
        self.messages.append(checked(message))

    def prompt(self) -> Prompt:
        """The prompt for the next answer.

        Raises:
            CheckpointError: the template cannot be rendered or refuses the conversation.
            InputError: nobody has said anything yet.
        """
        if not self.messages:
            raise InputError("the conversation is empty: say something first")
        text = self._rendered(True)
        history = self._rendered(False)
        return Prompt(
            text=text,
            history=history if text.startswith(history) else "",
            in_reasoning=text.rstrip().endswith(THINK),
        )

    def _rendered(self, generation: bool) -> str:
        variables: dict[str, Any] = {"messages": self.messages, "add_generation_prompt": generation}
        variables["tools"] = self.tools.definitions or None
        if self._keep:
            variables["preserve_thinking"] = True
        return self._template.render(**variables)


def checked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message that templates can read: arguments of calls as objects.

    Raises:
        InputError: an unknown role, content that is not text, or calls without a name.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        found = "missing" if role is None else repr(str(role)[:40])
        raise InputError(f"the role is {found}, expected one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise InputError(f"the content of a {role} message is not text")
    made = {**message, "content": content}
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InputError("tool_calls is not a list of calls")
    if calls:
        made["tool_calls"] = [_checked_call(call) for call in calls]
    return made


def _checked_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("a tool call has no function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"the arguments of {function['name'][:40]!r} are not a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}

"""Tool definitions, and the calls that a model makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.errors import InputError
from refimpl.text.arguments import coerce


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: the function's name.
        arguments: by parameter, coerced to the declared types.
        problems: what does not fit the definition, one sentence each.
    """

    name: str
    arguments: dict[str, Any]
    problems: tuple[str, ...] = ()

    def as_message(self, n: int) -> dict[str, Any]:
        """The entry of a message's `tool_calls` (arguments as an object, as templates take it)."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{n}", "type": "function", "function": function}


class Tools:
    """Tool definitions in OpenAI's form: {"type": "function", "function": {"name", "description",
    "parameters": JSON schema}}; the inner object alone is taken too.

    Raises:
        InputError: not a list of such definitions, or a name twice.
    """

    def __init__(self, definitions: Sequence[Mapping[str, Any]] = (), where: object = "tools"):
        if not isinstance(definitions, list | tuple):
            raise InputError(f"{where}: expected a JSON list of tool definitions")
        self.definitions: list[dict[str, Any]] = []
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for n, given in enumerate(definitions):
            function = given.get("function", given) if isinstance(given, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
                raise InputError(
                    f"{where}: tool {n} has no name; expected "
                    '{"type": "function", "function": {"name": ..., "parameters": ...}}'
                )
            if name in self._parameters:
                raise InputError(f"{where}: the tool '{name}' is defined twice")
            schema = function.get("parameters")
            if schema is not None and not isinstance(schema, Mapping):
                raise InputError(
                    f"{where}: parameters of '{name}' are not a JSON schema (an object)"
                )
            self._parameters[name] = schema or {}
            whole = given if "function" in given else {"type": "function", "function": given}
            self.definitions.append(dict(whole))

    @classmethod
    def from_json(cls, text: str, where: object) -> Tools:
        """Definitions as a JSON list.

        Raises:
            InputError: it is not.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({str(error)[:100]})") from None
        return cls([found] if isinstance(found, dict) else found, where)

    def __bool__(self) -> bool:
        return bool(self.definitions)

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return list(self._parameters)

    def declares(self, name: str, key: str) -> bool:
        """Whether a parameter `key` of the function may be expected (true if nothing is known)."""
        properties = self._properties(name)
        return not properties or key in properties

    def call(self, name: str, given: Sequence[tuple[str, str]]) -> ToolCall:
        """The call of `name` with parameters as the model wrote them."""
        schema = self._parameters.get(name)
        problems = [] if schema is not None or not self else [self._unknown(name)]
        schema, properties = schema or {}, self._properties(name)
        arguments: dict[str, Any] = {}
        for key, text in given:
            value, problem = coerce(text, properties.get(key) or {}, schema)
            if properties and key not in properties:
                problem = f"'{name}' has no parameter '{key}'"
            if key in arguments:
                problem = f"parameter '{key}' is given twice; the last one counts"
            if problem is not None:
                problems.append(problem if "'" + key + "'" in problem else f"'{key}': {problem}")
            arguments[key] = value
        required = schema.get("required")
        for key in required if isinstance(required, list) else ():
            if isinstance(key, str) and key not in arguments:
                problems.append(f"the required parameter '{key}' is missing")
        return ToolCall(name, arguments, tuple(problems))

    def _unknown(self, name: str) -> str:
        return f"there is no tool '{name}' (there are: {', '.join(self.names)})"

    def _properties(self, name: str) -> Mapping[str, Any]:
        found = self._parameters.get(name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}

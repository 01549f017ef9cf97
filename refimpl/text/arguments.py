"""Arguments of tool calls: raw text to the types that a tool's JSON schema declares.

Step writes every value as it is, objects and arrays as JSON; only the schema says what '42' is.
Nothing is lost: a value that does not fit its type stays text, with a sentence saying so.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_ALIASES = {
    "str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string",
    "int": "integer", "long": "integer", "float": "number", "double": "number",
    "bool": "boolean", "dict": "object", "list": "array", "arr": "array", "none": "null",
}  # fmt: skip
"""Type names outside JSON schema that tool definitions use (those that vLLM's parser knows)."""

_ORDER = ("null", "boolean", "integer", "number", "object", "array", "string")
_LITERAL_CHARS = 1 << 16
_DEPTH = 8  # of anyOf / $ref; schemas come from strangers too

Schema = Mapping[str, Any]


def coerce(text: str, schema: Schema, root: Schema | None = None) -> tuple[Any, str | None]:
    """The value that `text` stands for, and what is wrong with it (None: nothing).

    Where a schema allows several types, the strictest that the text fits is taken, a string last;
    without any type the text stays as it is.

    Args:
        schema: of this parameter.
        root: the schema that `$ref` paths start from.
    """
    types = declared_types(schema, root or schema)
    if not types:
        return _of_enum(text, schema), None
    for kind in _ORDER:
        if kind in types:
            try:
                return _READERS[kind](text), None
            except (ValueError, RecursionError, MemoryError, SyntaxError, TypeError):
                continue
    return text, f"{_short(text)} is not of type {' or '.join(sorted(types))}"


def declared_types(schema: Schema, root: Schema, depth: int = 0) -> set[str]:
    """Names of the JSON types that a schema allows, through `anyOf`, `oneOf`, `allOf`, `$ref`."""
    found: set[str] = set()
    if depth > _DEPTH or not isinstance(schema, Mapping):
        return found
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str):
            found.add(_ALIASES.get(name.lower(), name.lower()))
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            found |= declared_types(part, root, depth + 1)
    target = _referred(schema.get("$ref"), root)
    if target is not None:
        found |= declared_types(target, root, depth + 1)
    if schema.get("nullable") is True:
        found.add("null")
    return found & set(_ORDER)


def _referred(ref: Any, root: Schema) -> Schema | None:
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return None
    at: Any = root
    for name in ref[2:].split("/"):
        at = at.get(name) if isinstance(at, Mapping) else None
    return at if isinstance(at, Mapping) else None


def _of_enum(text: str, schema: Schema) -> Any:
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    for value in values if isinstance(values, list) else ():
        if not isinstance(value, str) and json.dumps(value) == text.strip():
            return value
    return text


def _null(text: str) -> None:
    if text.strip().lower() not in ("null", "none"):
        raise ValueError


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "false"):
        raise ValueError
    return word == "true"


def _integer(text: str) -> int:
    number = _number(text)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(text: str) -> int | float:
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return int(text)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        raise ValueError
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _structure(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = _json_or_literal(text.strip())
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


def _json_or_literal(text: str) -> Any:
    """JSON, or the Python literal that models write in its place (single quotes, True)."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        if len(text) > _LITERAL_CHARS:
            raise
    value = ast.literal_eval(text)
    value = list(value) if isinstance(value, tuple) else value
    json.dumps(value, allow_nan=False)  # sets, bytes and the like are no JSON
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


_READERS: dict[str, Callable[[str], Any]] = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _structure(dict),
    "array": _structure(list),
    "string": lambda text: text,
}


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")

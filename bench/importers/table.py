"""What the importers share: values by field name, and records made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from bench.runs import NUMBER_COLUMNS, RunRecord, parse_number
from hwmodel import names
from hwmodel.errors import RunFileError

Values = Mapping[str, Any]
_SHORT = 16  # numbers of a list that are kept as they are, such as acceptance by position


@dataclass(frozen=True)
class Format:
    """A format: `matches` looks at the text, `read` makes records of it.

    Both get the text as a whole; `read` also a name for messages.
    """

    title: str
    matches: Callable[[str], bool]
    read: Callable[[str, str], list[RunRecord]]


@dataclass(frozen=True)
class Stated:
    """What the user states about imported runs, in place of what the file says or does not say."""

    model: str = ""
    quant: str = ""
    device: str = ""
    engine: str = ""
    engine_version: str = ""
    backend: str = ""
    n_devices: float | None = None
    weights_gb: float | None = None
    mtp: str = ""
    source_url: str = ""

    def apply(self, record: RunRecord) -> RunRecord:
        """The record with the stated values."""
        changes = {k: v for k, v in self.__dict__.items() if v not in ("", None)}
        return replace(record, **changes)


def json_rows(text: str) -> list[dict[str, Any]] | None:
    """The objects of a JSON array, object, or JSON lines; None where the text is none of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text)
    rows = value if isinstance(value, list) else [value]
    return rows if rows and all(isinstance(r, dict) for r in rows) else None


def _json_lines(text: str) -> list[dict[str, Any]] | None:
    rows = []
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        rows.append(row)
    return rows or None


def has_fields(text: str, fields: Iterable[str]) -> bool:
    """Whether the first object of a JSON text has all these fields."""
    rows = json_rows(text)
    return rows is not None and all(f in rows[0] for f in fields)


def number(row: Values, key: str, column: str, where: str, factor: float = 1.0) -> float | None:
    """A field as a value of a number column, None where it is missing or empty.

    Raises:
        RunFileError: it is no number, or none that could be.
    """
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        scaled = float(value) * factor
    except (TypeError, ValueError, OverflowError):
        raise RunFileError(f"{where}: {key} is {value!r:.60}, expected a number") from None
    found, problem = parse_number(repr(scaled), column)
    if problem:
        low, high = NUMBER_COLUMNS[column][1:]
        raise RunFileError(f"{where}: {key} is {value!r:.60}, expected {low:g} to {high:g}")
    return found


def required(row: Values, keys: Iterable[str], where: str) -> None:
    """Refuse a row that lacks a field.

    Raises:
        RunFileError: names the missing fields.
    """
    missing = [k for k in keys if row.get(k) in (None, "")]
    if missing:
        raise RunFileError(f"{where}: no {' and no '.join(missing)}")


def rest(row: Values, used: Iterable[str], tool: str) -> dict[str, str]:
    """The fields that no column takes, as text under `tool:field`; lists that are long or hold
    more than numbers as their length."""
    taken = set(used)
    found = {}
    for key, value in row.items():
        if key in taken or value in (None, "", []):
            continue
        many = isinstance(value, list | dict)
        if isinstance(value, list) and len(value) <= _SHORT and all(map(is_number, value)):
            found[f"{tool}:{key}"] = " ".join(f"{v:.6g}" for v in value)
        else:
            found[f"{tool}:{key}"] = f"{len(value)} values" if many else str(value)
    return found


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a field holds a finite number that can be computed with (true and false do not)."""
    return type(value) in (int, float) and abs(value) < 1e300


def device_named_in(*texts: str) -> str:
    """The first text that is a known device, else the first that says anything."""
    said = [t.strip() for t in texts if t and t.strip()]
    for text in said:
        if names.canonical("device", text) is not None:
            return text
    return said[0] if said else ""

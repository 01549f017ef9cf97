"""A number that knows where it comes from.

Device and engine files state every number as an inline table::

    memory_bytes = { value = 85899345920, source = "aic", as_of = "2026-03" }

`source` is either a key of the file's `[sources]` table or the source itself; a number without
one is refused. `source = "unverified"` is allowed (with a `note` saying what it rests on) and is
carried along, so that a plan can say which of its figures nobody has checked. A measured number
may state its spread as `low` and `high`, the quartiles of the samples it is the median of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmodel.errors import DeviceFileError

UNVERIFIED = "unverified"
_KEYS = {"value", "low", "high", "source", "as_of", "note"}


@dataclass(frozen=True)
class Quantity:
    """A value in the SI unit that its key names, with its source and the date it was read.

    `low` and `high` are the quartiles of what was measured, None for a number that was not.
    """

    value: float
    source: str
    as_of: str
    note: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def is_verified(self) -> bool:
        """False where the number rests on memory or on scaling of another device."""
        return self.source != UNVERIFIED


def read_quantity(file: Path | str, key: str, raw: Any, sources: Mapping[str, str]) -> Quantity:
    """One quantity from its TOML form.

    Args:
        file: named in error messages.
        key: dotted name of the entry, named in error messages.
        raw: what TOML gave for it.
        sources: the file's `[sources]` table, source by short name.

    Raises:
        DeviceFileError: no table, no number, no source, no date, an unknown key, or a number that
            is negative or not finite; quartiles that do not enclose the number.
    """
    if not isinstance(raw, dict):
        example = f'{key} = {{ value = {raw!r}, source = "...", as_of = "2026-01" }}'
        raise DeviceFileError(f"{file}: '{key}' has no source, expected {example}")
    extra = sorted(set(raw) - _KEYS)
    if extra:
        known = ", ".join(sorted(_KEYS))
        raise DeviceFileError(f"{file}: '{key}' has the unknown entry '{extra[0]}', known: {known}")
    value = _number(file, key, raw.get("value"))
    low, high = (
        None if raw.get(name) is None else _number(file, f"{key}.{name}", raw[name])
        for name in ("low", "high")
    )
    if not (value if low is None else low) <= value <= (value if high is None else high):
        raise DeviceFileError(f"{file}: '{key}' is {value:g}, not between its 'low' and 'high'")
    texts: dict[str, str] = {}
    for name in ("source", "as_of", "note"):
        text = raw.get(name, "")
        if not isinstance(text, str):
            text = str(text)  # TOML reads an unquoted date as a date
        texts[name] = text.strip()
    if not texts["source"]:
        raise DeviceFileError(
            f'{file}: \'{key}\' has no source; add source = "..." (or "{UNVERIFIED}")'
        )
    if not texts["as_of"]:
        raise DeviceFileError(f"{file}: '{key}' has no as_of; add the date its source was read")
    source = sources.get(texts["source"], texts["source"])
    return Quantity(value, source, texts["as_of"], texts["note"], low, high)


def _number(file: Path | str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DeviceFileError(f"{file}: '{key}' has value {value!r}, expected a number")
    if not math.isfinite(value) or value < 0:
        raise DeviceFileError(f"{file}: '{key}' is {value!r}, expected a finite number, 0 or more")
    return float(value)

"""The statistics file (`refimpl stats --json`): what was counted on a text of one's own.

A plan takes from it the acceptance of drafts by position and the distinct experts that neighbouring
tokens use; its other figures, such as the load of each expert, change no estimate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hwmodel.errors import RequestError
from hwmodel.files import read_short
from hwmodel.model import ModelShape

MAX_BYTES = 1 << 24
MAX_LEVELS = 4
Figures = tuple[float, ...] | None


def read_stats(path: str, model: ModelShape) -> tuple[Figures, Figures]:
    """Acceptance by draft position, and distinct experts per layer of 1, 2, ... tokens.

    The figures stand under a key that starts with `acceptance` and one that starts with
    `distinct_experts`, up to four levels deep: a list by position, or an object from position to
    figure. Either may be missing, and is then None.

    Raises:
        RequestError: the file cannot be read, holds neither, or figures that cannot be.
    """
    raw = _load(path)
    accepted = _figures(path, raw, "acceptance", 0.0, 1.0)
    distinct = _figures(path, raw, "distinct_experts", 1.0, float(max(1, model.experts)))
    if accepted is None and distinct is None:
        raise RequestError(
            f"--stats {path}: holds no acceptance by position between 0 and 1 and no "
            "distinct_experts, expected what 'refimpl stats --json' writes"
        )
    if distinct is not None:
        _check_distinct(path, distinct, model)
    return None if accepted is None else accepted[:3], distinct


def _load(path: str) -> Any:
    try:
        found = read_short(path, MAX_BYTES)
        if found is None:
            raise RequestError(f"--stats {path}: larger than 16 MiB, expected a statistics file")
        return json.loads(found.decode("utf-8"))
    except OSError as error:
        raise RequestError(f"--stats {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--stats {path}: not JSON ({error})") from error


def _figures(path: str, raw: Any, name: str, low: float, high: float) -> Figures:
    found = _find(raw, name)
    if found is None:
        return None
    key, values = found
    good = values and all(
        isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high for v in values
    )
    if not good:
        raise RequestError(
            f"--stats {path}: '{key}' holds something else than numbers from {low:g} to {high:g}"
        )
    return tuple(float(v) for v in values)


def _find(raw: Any, name: str, levels: int = MAX_LEVELS) -> tuple[str, Sequence[Any]] | None:
    """The first key that starts so and holds a list, or an object with keys 1, 2, ..."""
    if not isinstance(raw, Mapping) or not levels:
        return None
    for key, value in raw.items():
        if not key.startswith(name):
            continue
        if isinstance(value, list):
            return key, value
        if isinstance(value, Mapping) and list(value) == [str(i + 1) for i in range(len(value))]:
            return key, list(value.values())
    found = (_find(v, name, levels - 1) for v in raw.values())
    return next((f for f in found if f is not None), None)


def _check_distinct(path: str, distinct: Sequence[float], model: ModelShape) -> None:
    """One token uses exactly the model's top-k; more tokens never use fewer.

    Raises:
        RequestError: counted on another model, or no counts by number of tokens.
    """
    if abs(distinct[0] - model.top_k) > 0.01:
        raise RequestError(
            f"--stats {path}: one token uses {distinct[0]:g} distinct experts, expected "
            f"{model.top_k} ({model.name}); it was counted on another model"
        )
    if any(b < a for a, b in pairwise(distinct)):
        raise RequestError(
            f"--stats {path}: distinct experts fall with more tokens, expected them to rise"
        )

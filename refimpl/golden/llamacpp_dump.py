"""Tensors as llama.cpp prints them: `llama-eval-callback`, `llama-debug --verbose` and the like.

Form (common/debug.cpp): a line with the tensor's name, operation and dimensions, then nested
brackets with four decimals, where every dimension longer than six shows its first and last three
entries around `...`; then the sum. Used are `l_out-N` (layer N's output) and `result_output`
(the logits of the last token, or of all). Four decimals hide mistakes smaller than about 1e-4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.golden.candidate import Observation, ObservedText, Place, checked_tokens

_HEAD = re.compile(r"(\S+)\s*=\s*\((\w+)\)\s+.*=\s*\{(\d+), (\d+), (\d+), (\d+)\}")
_NUMBER = re.compile(r"-?(?:\d+\.\d+(?:e[-+]?\d+)?|inf|nan)|\.\.\.")
_LAYER = re.compile(r"l_out-(\d{1,4})")
_EDGE = 3  # entries shown at either end of a long dimension
_MAX_WIDTH = 1 << 24


def parse_dump(
    text: str, where: str, config: ModelConfig, tokens: Sequence[int] | None
) -> ObservedText:
    """The tensors of one evaluation of a prompt.

    Raises:
        InputError: no prompt given, or no tensor that can be used.
    """
    if tokens is None:
        raise InputError(f"{where}: does not state its prompt; give its ids with --tokens FILE")
    ids = tuple(checked_tokens(list(tokens), config, "--tokens"))
    found: dict[Place, Observation] = {}
    for place, width, height, rows in _tensors(text, config):
        seen = _observation(place, width, height, rows, len(ids))
        if seen is not None:
            found.setdefault(place, seen)
    if not found:
        raise InputError(
            f"{where}: holds no tensor l_out-N or result_output over {len(ids)} tokens; expected "
            "a golden file, logits, JSON lines, or the output of llama-eval-callback on exactly "
            "this prompt"
        )
    order = sorted(found.values(), key=lambda o: (o.place[0] != "hidden", o.place[1] or 0))
    return ObservedText(ids, tuple(order))


def _tensors(
    text: str, config: ModelConfig
) -> Iterator[tuple[Place, int, int, list[list[float | None]]]]:
    """(place, width, height, printed rows) of every tensor that is used; None stands for `...`."""
    place: Place | None = None
    width = height = 0
    rows: list[list[float | None]] = []
    for line in text.splitlines():
        head = _HEAD.search(line)
        if head:
            if place and rows:
                yield place, width, height, rows
            place, rows = _place(head[1], config), []
            width, height = int(head[3]), int(head[4])
            if int(head[5]) != 1 or int(head[6]) != 1 or width > _MAX_WIDTH:
                place = None
        elif place and "sum =" in line:
            yield place, width, height, rows
            place, rows = None, []
        elif place:
            values = [None if v == "..." else float(v) for v in _NUMBER.findall(line)]
            if values:
                rows.append(values)


def _place(name: str, config: ModelConfig) -> Place | None:
    if name == "result_output":
        return "logits", None
    match = _LAYER.fullmatch(name)
    if match and int(match[1]) < config.num_hidden_layers:
        return "hidden", int(match[1])
    return None


def _observation(
    place: Place, width: int, height: int, rows: list[list[float | None]], count: int
) -> Observation | None:
    shown = [row for row in rows if row != [None]]
    positions = _indices(height, len(shown))
    columns = _indices(width, len([v for v in shown[0] if v is not None]) if shown else 0)
    if positions is None or columns is None:
        return None
    values = [[v for v in row if v is not None] for row in shown]
    if any(len(row) != len(columns) for row in values):
        return None
    if height == 1 and count > 1:
        positions = [count - 1]  # only the last token was asked for
    elif height != count:
        return None
    repeated = np.tile(np.array(columns), (len(positions), 1))
    return Observation(place, np.array(positions), np.array(values), repeated)


def _indices(size: int, shown: int) -> list[int] | None:
    """Which entries of a dimension are printed."""
    if shown == size:
        return list(range(size))
    if shown == 2 * _EDGE and size > 2 * _EDGE:
        return [*range(_EDGE), *range(size - _EDGE, size)]
    return None

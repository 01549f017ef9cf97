"""Prompts of real text: sources of Python's own library, the same wherever that version runs.

Random tokens would make every draft wrong and every expert equally likely, so that neither speed
nor acceptance would be those of real work.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module

_MODULES = (
    "textwrap", "argparse", "ast", "calendar", "configparser", "csv", "difflib", "fractions",
    "heapq", "json.decoder", "logging", "random", "shlex", "statistics", "string", "tokenize",
)  # fmt: skip
CHARACTERS_A_TOKEN = 3.5  # of source text, until the server has counted a prompt


@cache
def _library() -> str:
    return "\n".join(inspect.getsource(import_module(name)) for name in _MODULES)


def prompt(number: int, characters: int) -> str:
    """A task about a piece of source text; every number begins at another place, so that no
    prefix is shared and no cache of prefixes helps.

    Args:
        characters: length, at least some hundred.
    """
    text = _library()
    start = number * 7919 % len(text)
    wanted = max(64, characters - 96)
    rest = text[start:] + text * (1 + wanted // len(text))
    task = f"Piece {number} of a program. Explain it function by function, then improve it.\n\n"
    return task + rest[:wanted]

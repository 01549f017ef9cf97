"""What the commands of hwmodel and bench share: errors as one sentence, tables, JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from refimpl.cli_support import SentenceGroup

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommandGroup(SentenceGroup):
    """The group of `hwmodel` and `bench`: its lines on stderr carry no program name."""

    def note(self, message: str) -> None:
        """Print a remark to stderr, as one line."""
        note(message)


def note(message: str) -> None:
    """Print a remark to stderr, as one line; where nobody can read it the work goes on."""
    with contextlib.suppress(OSError):
        click.echo(" ".join(message.split()), err=True)


def counted(number: int, thing: str) -> str:
    """`1 run`, `2 runs`, `1,000 runs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """One JSON value on stdout; numbers that are not finite become null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by blanks; a column of numbers is flush right."""
    if not rows:
        return "  ".join(header)
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    right = [all(_is_number(r[i]) for r in rows) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            c.rjust(w) if flush else c.ljust(w)
            for c, w, flush in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    bare = text.replace(",", "").strip("+-%x ~").replace(".", "", 1)
    return bare.isdigit() or text in ("", "-")

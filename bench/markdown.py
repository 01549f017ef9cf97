"""Tables of the reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or that nothing was measured."""
    names = list(header)
    if not rows:
        return "Not measured."
    lines = [names, ["---"] * len(names), *rows]
    cells = [[c.replace("|", "/") for c in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)

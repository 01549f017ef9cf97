"""The commands `refimpl golden ...`: parse and print."""

from __future__ import annotations

import click


@click.group()
def golden() -> None:
    """Dump and compare what a run computes at every layer."""

"""What the commands of hwmodel and bench share: errors as one sentence, tables, JSON."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from refimpl.errors import RefimplError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommandGroup(click.Group):
    """A group whose errors are one line on stderr and exit code 2, never a traceback.

    Args:
        lazy: further commands, name to 'module:attribute', imported when they are used.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted([*super().list_commands(ctx), *self._lazy])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name."""
        if name not in self._lazy:
            return super().get_command(ctx, name)
        module, _, attribute = self._lazy[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; in standalone mode (the default) ends the process."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = BAD_INPUT
        except click.ClickException as error:
            complain(f"{error.format_message().rstrip('.')}{_where(error)}")
            code = BAD_INPUT
        except click.Abort:
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command and turn what the user can mend into a sentence."""
        try:
            return super().invoke(ctx)
        except RefimplError as error:
            complain(str(error))
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(BROKEN_PIPE)
        except OSError as error:
            complain(f"{error.filename or 'output'}: {error.strerror or error}")
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        ctx.exit(BAD_INPUT)


def _where(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f" (see '{ctx.command_path} --help')" if ctx is not None else ""


def complain(message: str) -> None:
    """Print an error to stderr, as one line."""
    note(f"error: {message}")


def note(message: str) -> None:
    """Print a remark to stderr, as one line."""
    click.echo(" ".join(message.split()), err=True)


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

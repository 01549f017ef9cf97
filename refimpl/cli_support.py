"""What the command lines share: errors as one sentence, commands loaded when used.

`SentenceGroup`, `Real` and `NumberList` serve all three packages (click and `refimpl.errors` is all
they need); the rest is for the commands of `refimpl`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from refimpl.errors import InputError, RefimplError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE


_WHOLE = 1000  # characters: no first sentence is cut


class SentenceGroup(click.Group):
    """A group whose errors are one line on stderr and an exit code, never a traceback.

    Exit code 2 stands for usage and bad input, 130 for Ctrl-C, 141 for a reader that closed the
    pipe. What else escapes is a bug and shows its traceback.

    Args:
        lazy: further commands, name to 'module:attribute', imported when they are used.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})

    def note(self, message: str) -> None:
        """Print a remark to stderr, as one line."""
        note(message)

    def complain(self, message: str) -> None:
        """Print an error to stderr, as one line."""
        self.note(f"error: {message}")

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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their whole first sentence, over several lines if need be."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, c.get_short_help_str(_WHOLE)) for name, c in found if c and not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
        _occupy_closed_streams()
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = BAD_INPUT
        except click.ClickException as error:
            self.complain(_usage_sentence(error))
            code = BAD_INPUT
        except click.Abort:
            code = INTERRUPTED
        except OSError as error:  # of the help, which is printed before a command is invoked
            self.complain(_failed(error))
            code = BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command and turn what the user can mend into a sentence."""
        try:
            return super().invoke(ctx)
        except RefimplError as error:
            self.complain(str(error))
        except BrokenPipeError:
            _forget_stdout()
            ctx.exit(BROKEN_PIPE)
        except OSError as error:
            self.complain(_failed(error))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "refimpl", "hwmodel", "bench"):
                raise
            self.complain(
                f"the package '{package}' is missing; install it with: pip install {package}"
            )
        except MemoryError:
            self.complain("not enough memory for this; use a smaller model or a shorter context")
        except KeyboardInterrupt:
            self.note("interrupted")
            ctx.exit(INTERRUPTED)
        ctx.exit(BAD_INPUT)


class Real(click.FloatRange):
    """An option's number within bounds; unlike click's own range it takes no nan."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number; a usage error names a value that is none."""
        found: float = super().convert(value, param, ctx)
        if found != found:
            self.fail(f"{value!r} is not a number", param, ctx)
        return found


class NumberList(click.ParamType):
    """An option's numbers, separated by commas, as a tuple of at least one.

    Args:
        kind: int or float.
        low: the least that is taken, if there is one.
        high: the greatest.
    """

    name = "numbers"

    def __init__(
        self,
        kind: type[int] | type[float] = int,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        self._kind, self._low, self._high = kind, low, high

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """The numbers; a usage error says what a list looks like, or what is out of bounds."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            found = ()
        if not found:
            example = "512,4096" if self._kind is int else ".88,.77"
            self.fail(f"{value!r} is not a list of numbers such as {example}", param, ctx)
        for x in found:
            if self._low is not None and not x >= self._low:
                self.fail(f"{x} is less than {self._low:,}", param, ctx)
            if self._high is not None and not x <= self._high:
                self.fail(f"{x} is more than {self._high:,}", param, ctx)
        return found


def _usage_sentence(error: click.ClickException) -> str:
    message = error.format_message().rstrip(".")
    ctx = getattr(error, "ctx", None)
    return f"{message} (see '{ctx.command_path} --help')" if ctx is not None else message


def _failed(error: OSError) -> str:
    return f"{error.filename or 'output'}: {error.strerror or error}"


def note(message: str) -> None:
    """Print a remark to stderr, as one line; where nobody can read it the work goes on."""
    with contextlib.suppress(OSError):
        click.echo(f"refimpl: {' '.join(message.splitlines())}", err=True)


def _occupy_closed_streams() -> None:
    """Let closed standard streams lead nowhere. A file that is opened later would else get the
    number of one of them, and remarks for stderr would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _forget_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's exit does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def read_text(path: str, what: str) -> str:
    """The text of a file, or of stdin for '-'.

    Raises:
        InputError: it is not UTF-8.
        OSError: it cannot be read.
    """
    where = "stdin" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise InputError(f"stdin is closed; pass {what} in another way")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: {what} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}); "
            "save it as UTF-8"
        ) from None


@contextlib.contextmanager
def progress_bar(label: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, shown on a terminal only; gives a function (done, total) that moves it.

    Args:
        in_bytes: what is done is counted in bytes; the bar shows the rate.
    """
    with contextlib.ExitStack() as stack:
        bar: Any = None
        first = (0, 0.0)

        def move(done: int, total: int) -> None:
            nonlocal bar, first
            now = time.monotonic()
            if bar is None:
                first = (done, now)
                shown = click.progressbar(
                    length=total, label=label, file=sys.stderr, hidden=not sys.stderr.isatty(),
                    item_show_func=(lambda rate: rate) if in_bytes else None,
                )  # fmt: skip
                bar = stack.enter_context(shown)
            seconds = now - first[1]
            rate = f"{(done - first[0]) / seconds / 1e6:.0f} MB/s" if seconds > 0 else ""
            bar.update(done - bar.pos, rate)

        yield move

"""The exception tree of refimpl.

Every mistake a user can make is one of these; the command line prints the message as one line
and exits with 2. Anything else that escapes is a bug.

    RefimplError
    ├── ConfigError       a model configuration that contradicts itself or lacks a field
    ├── CheckpointError   a file that is damaged, incomplete, of the wrong kind, or unsafe
    └── InputError        a prompt, token id, option or candidate file that cannot be used
"""

_PROBLEM_CHARS = 400
_MESSAGE_CHARS = 1500


def escape(character: str) -> str:
    """A character that cannot be printed, such as \\x1b, as Python spells it."""
    return repr(character)[1:-1]


def _shortened(text: str, limit: int) -> str:
    """A text that may quote a value of any length, without its middle if it is too long."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


class RefimplError(ValueError):
    """Base of all errors that are the input's fault; the message is one sentence.

    Whatever it quotes (names, values, what a library said) ends up on one printable line.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else escape(c) for c in line)
        super().__init__(_shortened(line, _MESSAGE_CHARS))


class ConfigError(RefimplError):
    """A configuration cannot be used; `field` names the key as spelled in the file."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"config field '{field}': {_shortened(problem, _PROBLEM_CHARS)}")
        self.field = field


class CheckpointError(RefimplError):
    """A checkpoint file cannot be used: what was found, what was expected, what to do."""


class InputError(RefimplError):
    """A prompt, token list, option or candidate file cannot be used."""

"""`refimpl chat` as a user meets it: over a pipe, as JSON lines, and at a terminal (a pty)."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from refimpl.cli import main

CHAT = [sys.executable, "-c", "from refimpl.cli import main; main()", "chat", "--backend"]
CHAT += ["reference"]


def chat(*options: str, say: str | bytes = "", code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a chat over a pipe."""
    arguments = ["chat", "--backend", "reference", *options]
    done = CliRunner().invoke(main, arguments, input=say, catch_exceptions=False)
    assert done.exit_code == code, done.stderr
    return done.stdout, done.stderr


def test_lines_from_a_pipe_are_answered_on_stdout() -> None:
    out, err = chat("--max-new-tokens", "6", say="def f(x):\nimport os\n/stats\n/exit\nnever\n")
    assert "no chat template" in err and err.count("cut at --max-new-tokens") == 2
    stats = out[out.index("answers") :]
    assert re.search(r"^answers +2\ncontext +\d+ of 1024 tokens\n", stats)
    assert re.search(r"prompts +\d+ tokens, [1-9]\d* of them kept", stats)


def test_reasoning_is_kept_out_of_stdout() -> None:
    say = "def f(x):\n"
    out, err = chat("--max-new-tokens", "4", "--template", "step", say=say)
    assert out == "" and len(err.split("refimpl:")[0]) > 3
    out, err = chat("--max-new-tokens", "4", "--template", "step", "--hide-reasoning", say=say)
    assert out == "" and err.startswith("refimpl:")


def test_json_lines(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}]')
    call = {"id": "c", "function": {"name": "add", "arguments": {"a": 2}}}
    say = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "2 + 2?", "more": True},
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "god", "content": "4"},
        {"command": "fly"},
        {"command": "reset"},
        {"command": "stats"},
        [],
    ]
    lines = "".join(json.dumps(line) + "\n" for line in say) + "{\n"
    options = ("--json", "--template", "step", "--tools", str(tools), "--max-new-tokens", "5")
    out, _ = chat(*options, say=lines, code=2)
    made = [json.loads(line) for line in out.splitlines()]
    assert made[0]["message"]["role"] == "assistant"
    assert made[0]["finish_reason"] == "length"
    assert made[0]["context_tokens"] == made[0]["timings"]["prompt_tokens"] + 5
    assert [list(m) for m in made[1:]] == [["error"], ["error"], ["stats"], ["error"], ["error"]]
    assert made[3]["stats"]["turns"] == 1


@pytest.mark.parametrize(
    ("options", "say", "sentence"),
    [
        ((), "/nosuch\n", "there is no command /nosuch"),
        ((), "/tool add 3\n", "no result of 'add' is expected (none is waited for)"),
        ((), b"\xff\xfe\n", "line 1 is not UTF-8"),
        (("--template", "nosuch"), "", "no such file or template; there are: plain, step"),
        (("--tools", "nosuch.json"), "", "nosuch.json: No such file"),
        (("--context", "0"), "", "context is 0, expected 1 or more"),
        (("--context", "20"), "word " * 99 + "\n", "the context holds 20"),
        (("--keep-reasoning",), "", "leave --keep-reasoning out"),
        (("--temperature", "-1"), "", "temperature is -1"),
    ],
)
def test_mistakes_are_sentences(options, say, sentence: str) -> None:
    _, err = chat(*options, say=say, code=2)
    last = err.strip().splitlines()[-1]
    assert last.startswith("refimpl: error: ") and sentence in last


def test_a_hostile_template_costs_a_sentence(tmp_path: Path) -> None:
    template = tmp_path / "evil.jinja"
    template.write_text("{{ cycler.__init__.__globals__.os.system('echo pwned >&2') }}")
    out, err = chat("--template", str(template), say="hi\n", code=2)
    assert out == "" and "what the sandbox forbids" in err and "pwned" not in err


pytestmark_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")


class Terminal:
    """The program at a pseudo terminal; what a failed test leaves is ended after it."""

    running: ClassVar[list["Terminal"]] = []

    def __init__(self, *options: str, **environment: str) -> None:
        import pty

        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            # A test run in the background ignores Ctrl-C, and what it starts would inherit that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            environment = {"TERM": "xterm", "INPUTRC": "/dev/null", **environment}
            os.execve(CHAT[0], [*CHAT, *options], {**os.environ, **environment})
        self.seen = ""
        self._from = 0
        self.running.append(self)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, pattern: str, seconds: float = 300) -> str:
        """What was printed since the last call, up to `pattern`."""
        import select

        end = time.monotonic() + seconds
        while (found := re.compile(pattern, re.S).search(self.seen, self._from)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[self._from :]!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 65536).decode("utf-8", "replace")
                except OSError:
                    assert re.compile(pattern, re.S).search(self.seen, self._from), self.seen
        text = self.seen[self._from : found.end()]
        self._from = found.end()
        return text

    def interrupt_until(self, pattern: str) -> None:
        """Ctrl-C, again if need be: one that comes while the line editor sets itself up is only
        seen with the next key."""
        for _ in range(20):
            self.type("\x03")
            for key in ("", "\x15"):  # the key rubs out the line
                self.type(key)
                with contextlib.suppress(AssertionError):
                    self.until(pattern, 2)
                    return
        raise AssertionError(f"no {pattern!r} after Ctrl-C: {self.seen[self._from :]!r}")

    def end(self) -> int:
        """The exit code, after Ctrl-D."""
        self.type("\x04")
        return self._gone()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._gone()

    def _gone(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        self.running.remove(self)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture(autouse=True)
def no_terminal_stays() -> Iterator[None]:
    yield
    for terminal in [*Terminal.running]:
        terminal.kill()


@pytestmark_pty
def test_ctrl_c_stops_the_answer_not_the_program() -> None:
    terminal = Terminal("--max-new-tokens", "900", "--mtp", "0")
    terminal.until("> ")
    terminal.type("def f(x):\n")
    terminal.until(r"\n[^\n]*\n[^\n]*\n")  # the line itself and the first of the answer
    terminal.type("\x03")
    terminal.until("refimpl: stopped.*> ")
    terminal.type("/stats\n")
    assert "answers   1" in terminal.until("text .*> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt_until("> ")
    terminal.type("/nosuch\n")
    assert "error: there is no command" in terminal.until("> ")
    assert terminal.end() == 0


@pytestmark_pty
def test_lines_can_be_edited_and_called_up_again() -> None:
    terminal = Terminal()
    terminal.until("> ")
    terminal.type("stxats\x01/\x05\x02\x02\x02\x7f\n")  # home, slash, end, three back, rub out
    assert "answers   0" in terminal.until("answers.*text .*> ")
    terminal.type("\x1b[A\n")  # up: the same again
    assert "answers   0" in terminal.until("answers.*text .*> ")
    assert terminal.end() == 0


@pytestmark_pty
@pytest.mark.parametrize("no_colour", ["", "1"])
def test_reasoning_is_dimmed_where_colour_is_wanted(no_colour: str) -> None:
    terminal = Terminal("--template", "step", "--max-new-tokens", "5", NO_COLOR=no_colour)
    terminal.until("> ")
    terminal.type("def f(x):\n")
    shown = terminal.until("cut at.*> ")  # only the prompt takes Ctrl-D as the end
    assert ("\x1b[2m" in shown and "\x1b[0m" in shown) == (not no_colour)
    assert ("[reasoning]" in shown) == bool(no_colour)
    assert terminal.end() == 0

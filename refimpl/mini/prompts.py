"""Twenty fixed prompts cut from held-out library code, and the judge of their continuations.

Rule of the cut.  Held-out library files are taken in the order of the sha256 of their path.  In
each file the functions and methods are taken in the order of the sha256 of "path:name:line"; only
those count that are indented by a multiple of four, whose body begins on a line of its own, and
whose preceding text gives at least MIN_TOKENS of context.  The first round takes one function of
every file, the second round one more, until there are twenty.  The prompt ends after the header
and, if there is one, the docstring, at the start of a line; it begins at the first statement
within MAX_TOKENS tokens before that.

Rule of the judge.  `judge(prompt, continuation)` is true if some number of whole lines of the
continuation, put behind the prompt's last function, is accepted by Python's parser and adds a
statement that is not a docstring.  Indentation is kept, so the statement is judged in its place;
a statement that breaks the grammar can not be mended by later lines, so it is the first statement
that decides; if it is a compound one, so do all its further lines.  Comments, blank lines and an
unfinished statement add nothing.

`python -m refimpl.mini.prompts` writes `prompts.json` again from the corpus.
"""

from __future__ import annotations

import ast
import codeop
import hashlib
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from . import corpus

HERE = Path(__file__).parent
COUNT = 20
MAX_TOKENS = 300
MIN_TOKENS = 60
NEW_TOKENS = 128  # tokens generated per prompt

_DEF = re.compile(r"( *)(?:async +)?def\b")


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it comes from."""

    path: str
    function: str
    line: int  # 1-based line on which the true continuation starts
    text: str


# ---- judge ----------------------------------------------------------------------------------


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _statements(tree: ast.Module) -> int:
    """Statements that are not docstrings (an expression that is only a string never counts)."""
    return sum(
        isinstance(node, ast.stmt)
        and not (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        for node in ast.walk(tree)
    )


def _tail(prompt: str) -> tuple[str, int] | None:
    """The prompt's last function below a scaffold that makes its indentation legal.

    Returns the text and the number of its statements, or None if no function is open at the end.
    """
    lines = prompt.splitlines(keepends=True)
    for start in range(len(lines) - 1, -1, -1):
        match = _DEF.match(lines[start])
        if match is None:
            continue
        indent = len(match[1])
        scaffold = "".join(" " * i + "if 1:\n" for i in range(0, indent, 4))
        tail = scaffold + "".join(lines[start:])
        whole = _parse(f"{tail}{' ' * (indent + 4)}pass\n")
        if whole is not None:
            return tail, _statements(whole) - 1
    return None


def judge(prompt: str, continuation: str) -> bool:
    """True if the continuation's first statement is complete and grammatical in its place."""
    if not prompt.endswith("\n"):
        raise ValueError("a prompt ends at the start of a line")
    tail = _tail(prompt)
    if tail is None:
        raise ValueError("no function is open at the end of the prompt")
    text, before = tail
    lines = [line for line in continuation.splitlines(keepends=True) if line.endswith("\n")]
    for i, line in enumerate(lines):
        text += line
        tree = _parse(text)
        if tree is not None and _statements(tree) > before:
            return _rest_is_grammatical(text, lines[: i + 1], lines[i + 1 :])
    return False


def _rest_is_grammatical(text: str, read: list[str], rest: list[str]) -> bool:
    """Judge the remaining lines of the first statement too, if it is a compound one.

    They are the deeper ones and further clauses (`else`, ...). Where the continuation ends inside
    the statement, what there is must be the beginning of a grammatical one.
    """
    indent = min(len(line) - len(line.lstrip()) for line in read if line.strip())
    for line in rest:
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        clause = depth == indent and re.match(r"(elif|else|except|finally)\b", bare)
        if bare and not bare.startswith("#") and depth <= indent and not clause:
            return _parse(text) is not None
        text += line
    return _parse(text) is not None or _is_beginning(text)


def _is_beginning(text: str) -> bool:
    """True if the text could still become a grammatical program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return codeop.compile_command(text, symbol="exec") is None
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False


# ---- cut ------------------------------------------------------------------------------------


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _candidates(document: corpus.Document) -> list[tuple[str, int]]:
    """(function name, 1-based line of its first real statement) in hash order."""
    lines = document.text.splitlines()
    found = []
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.col_offset % 4:
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if not body or isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        before = lines[body[0].lineno - 2]
        first = lines[body[0].lineno - 1]
        own_line = len(first) - len(first.lstrip()) == body[0].col_offset == node.col_offset + 4
        if own_line and before.strip() and not before.lstrip().startswith("#"):
            found.append((node.name, body[0].lineno))
    return sorted(found, key=lambda c: _digest(f"{document.path}:{c[0]}:{c[1]}"))


def _cut(document: corpus.Document, line: int) -> str | None:
    """The prompt text that ends before `line`, or None if there is too little context."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(HERE / "bf16" / "tokenizer.json"))
    lines = document.text.splitlines(keepends=True)
    starts = {n.lineno for n in ast.walk(ast.parse(document.text)) if isinstance(n, ast.stmt)}
    best = None
    for start in range(line - 1, 0, -1):
        text = "".join(lines[start - 1 : line - 1])
        size = len(bpe.encode(text).ids)
        if size > MAX_TOKENS:
            break
        if start in starts and size >= MIN_TOKENS:
            best = text
    return best


def cut(documents: list[corpus.Document]) -> list[Prompt]:
    """Twenty prompts by the rule of the module."""
    ordered = sorted(documents, key=lambda d: _digest(d.path))
    queues = {d.path: _candidates(d) for d in ordered}
    out: list[Prompt] = []
    for _ in range(2):
        for document in ordered:
            queue = queues[document.path]
            while queue and len(out) < COUNT:
                name, line = queue.pop(0)
                text = _cut(document, line)
                rest = "".join(document.text.splitlines(keepends=True)[line - 1 :])
                if text is not None and _tail(text) is not None and judge(text, rest):
                    out.append(Prompt(document.path, name, line, text))
                    break
    if len(out) < COUNT:
        raise ValueError(f"only {len(out)} prompts can be cut")
    return out


def load() -> list[Prompt]:
    """The committed prompts."""
    return [Prompt(**p) for p in json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))]


def main() -> int:
    """Cut the prompts and write them."""
    prompts = cut(corpus.load().select(held_out=True, is_test=False))
    text = json.dumps([vars(p) for p in prompts], indent=1, ensure_ascii=False)
    (HERE / "prompts.json").write_text(text + "\n", encoding="utf-8")
    for p in prompts:
        print(f"{p.path}:{p.line} {p.function}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The judge of continuations, by hand-made good and bad cases, and the committed prompts."""

import pytest

from refimpl.mini import prompts

METHOD = "class Stack:\n    def push(self, item):\n"
WITH_DOC = 'import os\n\ndef size(path):\n    """Size in bytes."""\n'
INNER = "def outer():\n    x = 1\n    def inner(y):\n"

GOOD = [
    (METHOD, "        self.items.append(item)\n"),
    (
        METHOD,
        "        self.items.append(item)\n        return self.",
    ),
    (METHOD, '        """Add an item."""\n        return item\n'),
    (METHOD, "        # a remark\n\n        pass\n"),
    (METHOD, "        self.items = [\n            item,\n        ]\n"),
    (METHOD, "        for x in item:\n            self.a(x)\n"),
    (METHOD, "        try:\n            x = 1\n        except OSError:\n            pass\n"),
    (METHOD, "        x = 1\n    )) broken afterwards\n"),
    (WITH_DOC, "    return os.stat(path).st_size\n"),
    (WITH_DOC, "\ndef other():\n    return 1\n"),  # the body may be the docstring alone
    (INNER, "        return x + y\n"),
    (METHOD, "        if item:\n            return 1\n        elif self:\n"),  # cut off inside
    (METHOD, "        if item:\n            return 1\n        y = = 2\n"),  # the next one
]

BAD = [
    (METHOD, ""),
    (METHOD, "        return item"),  # never finished: no newline
    (METHOD, "        return item)\n"),
    (METHOD, "        self.items.append(item\n        return 1\n"),
    (METHOD, '        """Only a docstring."""\n'),
    (METHOD, '        """A docstring that never ends\n        return 1\n'),
    (METHOD, "        # only a remark\n"),
    (METHOD, "    return item\n"),  # not inside the method
    (METHOD, "\n    def pop(self):\n        return 1\n"),  # the method has no body
    (METHOD, "        if item\n            return 1\n"),
    (METHOD, "        try:\n            x = 1\n"),
    (METHOD, "        x = = 1\n        y = 2\n"),
    (METHOD, "        if item:\n            return 1\n        elif self\n        else:\n"),
    (METHOD, "        for x in item:\n            self.a(x)\n            e f\n"),
    (WITH_DOC, "      return 1\n"),
    (WITH_DOC, "    return return\n    x = 1\n"),
]


@pytest.mark.parametrize(("prompt", "continuation"), GOOD)
def test_accepts_a_complete_statement_in_its_place(prompt: str, continuation: str) -> None:
    assert prompts.judge(prompt, continuation)


@pytest.mark.parametrize(("prompt", "continuation"), BAD)
def test_rejects_everything_else(prompt: str, continuation: str) -> None:
    assert not prompts.judge(prompt, continuation)


def test_a_prompt_must_end_at_a_line_start_inside_a_function() -> None:
    with pytest.raises(ValueError, match="start of a line"):
        prompts.judge("def f():", "\n    pass\n")
    with pytest.raises(ValueError, match="no function"):
        prompts.judge("x = 1\n", "y = 2\n")


def test_twenty_prompts_are_committed_and_none_answers_itself() -> None:
    committed = prompts.load()
    assert len(committed) == prompts.COUNT
    paths = [p.path for p in committed]
    assert max(paths.count(p) for p in paths) <= 2
    for prompt in committed:
        assert prompt.text.endswith("\n")
        assert not prompts.judge(prompt.text, "")

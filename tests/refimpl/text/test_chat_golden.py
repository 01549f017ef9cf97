"""Prompts equal to those that transformers renders (tests/golden/chat.json)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from chat_cases import CASES, without_instructions

from refimpl.text.builtin import PLAIN, STEP
from refimpl.text.template import ChatTemplate

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "chat.json").read_text())["cases"]


@pytest.fixture(scope="module")
def render():
    with ChatTemplate(STEP, "step", {"bos_token": "<s>"}) as step, \
            ChatTemplate(PLAIN, "plain", {"bos_token": "<s>"}) as plain:  # fmt: skip

        def run(name: str, case: dict[str, Any]) -> str:
            return {"step": step, "plain": plain}[name].render(
                messages=case["messages"],
                tools=case.get("tools"),
                add_generation_prompt=case["generation"],
            )

        yield run


def test_every_case_is_recorded() -> None:
    assert set(GOLDEN) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_built_in_format_is_the_published_one_but_for_the_tool_instructions(
    name: str, render
) -> None:
    made = render("step", CASES[name])
    assert without_instructions(made) == GOLDEN[name]["published_without_instructions"]
    if "tools" not in CASES[name]:
        assert hashlib.sha256(made.encode()).hexdigest() == GOLDEN[name]["published_sha256"]


@pytest.mark.parametrize("name", CASES)
def test_our_renderer_gives_what_transformers_gives(name: str, render) -> None:
    made = render("step", CASES[name])
    assert hashlib.sha256(made.encode()).hexdigest() == GOLDEN[name]["step_sha256"]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.get("plain")])
def test_the_plain_format(name: str, render) -> None:
    assert render("plain", CASES[name]) == GOLDEN[name]["plain"]

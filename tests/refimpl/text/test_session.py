"""A chat session over a model that says what the test tells it to."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl.text.session as session_module
from refimpl.backend import Step
from refimpl.backends import OpenModel, model_path, open_model
from refimpl.chat_screen import Commands, Screen
from refimpl.decoding.generation import GenerateOptions
from refimpl.errors import InputError
from refimpl.text.builtin import PLAIN, STEP
from refimpl.text.conversation import ROLES, Conversation, checked
from refimpl.text.output import Piece
from refimpl.text.session import ChatSession
from refimpl.text.template import ChatTemplate
from refimpl.text.tools import Tools

END = "<|im_end|>"
TOOLS = Tools([{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}])
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"


@dataclass
class Tape:
    capacity: int
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, n: int) -> None:
        del self.tokens[len(self.tokens) - n :]

    def snapshot(self) -> int:
        return self.length

    def restore(self, snapshot: int) -> None:
        del self.tokens[snapshot:]


class Parrot:
    """After each prompt, says the next of its texts, token by token."""

    def __init__(self, mini: OpenModel, says: list[str]) -> None:
        assert mini.tokenizer is not None
        self.config, self._encode = mini.backend.config, mini.tokenizer.encode
        self._decode, self._says = mini.tokenizer.decode, iter(says)
        self._start, self._text = -1, [0]
        self.prefilled: list[int] = []

    def new_cache(self, capacity: int) -> Tape:
        return Tape(capacity)

    def prefill(self, tokens, cache: Tape, all_logits: bool = False) -> Step:
        cache.tokens += tokens
        self.prefilled += tokens
        if self._decode(cache.tokens[-9:]).endswith(("<think>\n", "Assistant:")):
            self._start, self._text = (
                cache.length,
                self._encode(next(self._says), add_special=False),
            )
        return self._step(self._text)

    def decode(self, tokens, cache: Tape) -> Step:
        cache.tokens += tokens
        return self._step(self._text[cache.length - self._start :])

    def _step(self, text: list[int]) -> Step:
        logits = np.zeros((1, self.config.vocab_size), np.float32)
        logits[0, text[0]] = 9
        return Step(logits, np.zeros((1, 4), np.float32))


@pytest.fixture(scope="module")
def mini() -> Iterator[OpenModel]:
    with open_model("mini", "reference") as model:
        yield model


@pytest.fixture
def chat(mini, request):
    opened = []

    def start(*says: str, source: str = STEP, context: int = 600, tools=None, system=None, **more):
        template = ChatTemplate(source, "template", {"bos_token": ""})
        opened.append(template)
        backend = Parrot(mini, list(says))
        model = OpenModel(path=mini.path, name="fake", backend=backend, tokenizer=mini.tokenizer,
                          warnings=())  # fmt: skip
        conversation = Conversation(template, system, tools, **more)
        options = GenerateOptions(max_new_tokens=300, context=context)
        return ChatSession(model, conversation, options), backend

    yield start
    for template in opened:
        template.close()


def ask(session: ChatSession, text: str):
    session.conversation.add({"role": "user", "content": text})
    pieces: list = []
    return session.answer(pieces.append), pieces


def test_reasoning_and_content_come_apart_and_into_the_history(chat) -> None:
    session, _ = chat(f"two and two\n</think>\nFour.{END}")
    turn, pieces = ask(session, "2 + 2?")
    assert turn.generation.finish_reason == "stop"
    assert (turn.answer.reasoning, turn.answer.content) == ("two and two", "Four.")
    assert "".join(p.text for p in pieces if p.kind == "content") == "Four."
    assert session.conversation.messages[-1] == {
        "role": "assistant", "content": "Four.", "reasoning_content": "two and two",
    }  # fmt: skip


def test_dropped_reasoning_goes_back_to_the_mark_and_only_the_rest_runs(chat, mini) -> None:
    session, backend = chat(f"long thought\n</think>\nA.{END}", f"b\n</think>\nB.{END}")
    first, _ = ask(session, "one")
    backend.prefilled.clear()
    second, _ = ask(session, "two")
    ran = mini.tokenizer.decode(backend.prefilled)
    assert ran == "<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n" \
        "<|im_start|>assistant\n<think>\n"  # fmt: skip
    before = mini.tokenizer.encode("<|im_start|>user\none<|im_end|>\n")
    assert second.generation.timings.reused_tokens == len(before)
    assert first.generation.timings.reused_tokens == 0
    assert session.totals.turns == 2


def test_kept_reasoning_runs_only_what_is_new(chat, mini) -> None:
    session, backend = chat(f"t\n</think>\nA.{END}", f"b\n</think>\nB.{END}", keep_reasoning=True)
    ask(session, "one")
    backend.prefilled.clear()
    ask(session, "two")
    assert mini.tokenizer.decode(backend.prefilled) == (
        f"{END}\n<|im_start|>user\ntwo{END}\n<|im_start|>assistant\n<think>\n"
    )


def test_a_tool_call_its_result_and_the_reasoning_that_goes_on(chat, mini) -> None:
    session, backend = chat(f"add\n</think>\n{CALL}{END}", f"so\n</think>\n4{END}", tools=TOOLS)
    turn, pieces = ask(session, "2 + 2?")
    assert [c.arguments for c in turn.answer.calls] == [{"a": 2}]
    assert pieces[-1].call is turn.answer.calls[0]
    session.conversation.add({"role": "tool", "name": "add", "content": "4"})
    backend.prefilled.clear()
    session.answer(lambda piece: None)
    assert mini.tokenizer.decode(backend.prefilled) == (
        f"{END}\n<|im_start|>tool_response\n<tool_response>4</tool_response>{END}\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_results_are_given_by_command_and_the_last_one_is_answered(chat) -> None:
    two = CALL + "\n" + CALL.replace("2", "3")
    session, _ = chat(f"add\n</think>\n{two}{END}", f"so\n</think>\n5{END}", tools=TOOLS)
    ask(session, "2 + 3?")
    commands = Commands(session)
    with pytest.raises(InputError, match="calls without a result: add, add"):
        commands.run("/tool sub 1")
    assert not commands.run('/tool add {"sum": 2}')
    assert commands.run("/tool add 3")
    assert session.answer(lambda piece: None).answer.content == "5"
    contents = [m["content"] for m in session.conversation.messages if m["role"] == "tool"]
    assert contents == ['{"sum": 2}', "3"]
    assert commands.run("//etc is a folder")
    assert session.conversation.messages[-1]["content"] == "/etc is a folder"
    assert not commands.run("/system New.")
    assert session.conversation.messages == [{"role": "system", "content": "New."}]


def test_at_a_terminal_a_model_cannot_send_control_sequences(capsys) -> None:
    screen = Screen(hide_reasoning=False)
    screen._terminal = True
    screen.show(Piece("content", "a\x1b]0;title\x07\x9bb\tc\n"))
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffd\ufffdb\tc\n"


def test_an_answer_that_is_stopped_counts_and_the_cache_stays_good(chat) -> None:
    session, _ = chat(f"a\n</think>\none two three four five{END}", f"b\n</think>\nB{END}")
    session.conversation.add({"role": "user", "content": "count"})
    seen: list[str] = []
    turn = session.answer(lambda p: seen.append(p.text), lambda: "two" in "".join(seen))
    assert turn.generation.finish_reason == "interrupted"
    assert turn.answer.content.startswith("one two") and "five" not in turn.answer.content
    again, _ = ask(session, "go on")
    assert again.answer.content == "B"
    assert again.generation.timings.reused_tokens > 0


def test_a_full_context_is_a_sentence(chat) -> None:
    session, _ = chat(f"a\n</think>\nA{END}", context=40)
    with pytest.raises(InputError, match="the context holds 40: begin a new one with /reset"):
        ask(session, "many words " * 30)
    session.conversation.reset()
    assert ask(session, "hi")[0].answer.content == "A"


def test_plain_text_has_no_reasoning_and_stops_at_the_next_user(chat) -> None:
    session, _ = chat(" Hello.\nUser: and", source=PLAIN)
    session._options = GenerateOptions(max_new_tokens=300, stop_strings=("\nUser:",), context=600)
    turn, _ = ask(session, "Hi")
    assert (turn.answer.reasoning, turn.answer.content) == ("", " Hello.")


def test_the_system_message_stays_over_a_reset(chat) -> None:
    session, _ = chat(f"a\n</think>\nA{END}", system="S")
    ask(session, "hi")
    session.conversation.reset()
    assert session.conversation.messages == [{"role": "system", "content": "S"}]
    session.conversation.set_system(None)
    with pytest.raises(InputError, match="say something first"):
        session.conversation.prompt()


def test_keeping_reasoning_needs_a_template_that_can(chat) -> None:
    with pytest.raises(InputError, match="preserve_thinking"):
        chat("x", source=PLAIN, keep_reasoning=True)


def test_tools_need_a_template_that_knows_them(chat) -> None:
    with pytest.raises(InputError, match="no place for tools"):
        chat("x", source=PLAIN, tools=TOOLS)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "god", "content": "x"}, "the role is 'god'"),
        ({"role": "user"}, "the content of a user message is not text"),
        ({"role": "user", "content": [1]}, "is not text"),
        ({"role": "assistant", "tool_calls": [{}]}, "no function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]},
            "arguments of 'f' are not a JSON object",
        ),
    ],
)
def test_messages_that_are_none_are_refused(message, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        checked(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(ROLES),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["function", "name", "arguments", "id", "content"]), x)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "reasoning_content", "name"]), JSON
    )
)
def test_any_object_is_a_message_or_refused(message) -> None:
    try:
        made = checked(message)
    except InputError:
        return
    assert made["role"] in ROLES and isinstance(made["content"], str)
    assert all(isinstance(c["function"]["arguments"], dict) for c in made.get("tool_calls") or [])


def test_arguments_may_come_as_json_text() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    made = checked({"role": "assistant", "tool_calls": [call]})
    assert made["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_the_embedded_model_says_the_same_with_and_without_the_kept_cache(mini) -> None:
    with ChatTemplate(STEP, "step", {"bos_token": ""}) as template:
        options = GenerateOptions(max_new_tokens=6, mtp=1)
        session = ChatSession(mini, Conversation(template), options)
        for text in ("def f(x):", "import os"):
            turn, _ = ask(session, text)
            fresh = ChatSession(mini, Conversation(template), options)
            for message in session.conversation.messages[:-1]:
                fresh.conversation.add(message)
            other = fresh.answer(lambda piece: None)
            assert other.generation.ids == turn.generation.ids
        assert session.totals.reused_tokens > 0
    assert model_path("mini") == mini.path


def test_what_one_answer_taught_about_drafts_the_next_one_uses(mini, monkeypatch) -> None:
    policies = []

    def generate(*args, policy, **more):
        policies.append(policy)
        return real(*args, policy=policy, **more)

    real = session_module.generate
    monkeypatch.setattr(session_module, "generate", generate)
    with ChatTemplate(STEP, "step", {"bos_token": ""}) as template:
        options = GenerateOptions(max_new_tokens=6, mtp="auto")
        session = ChatSession(mini, Conversation(template), options)
        for text in ("def f(x):", "import os"):
            ask(session, text)
    first, second = policies
    assert first is second
    assert first.costs.unit > 0

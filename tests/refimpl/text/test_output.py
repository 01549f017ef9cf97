"""Reasoning, content and tool calls taken apart, from pieces of any size."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.text.output import OutputParser
from refimpl.text.tools import Tools


def tool(name: str, required: tuple[str, ...] = (), **properties: object) -> dict[str, object]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


STRING = {"type": "string"}
TOOLS = Tools(
    [
        tool("weather", ("city",), city=STRING, unit=STRING, days={"type": "integer"}),
        tool("area", shape=STRING, dimensions={"type": "object"}, precision={"type": "integer"}),
        tool("write_file", path=STRING, content=STRING),
    ]
)


def parse(text: str, sizes=None, in_reasoning: bool = False, cut: bool = False, tools=TOOLS):
    """(reasoning, content, [(name, arguments)]) of a text that came in pieces of `sizes`."""
    parser = OutputParser(tools, in_reasoning)
    shown, at = [], 0
    for size in sizes or [len(text)]:
        shown += parser.push(text[at : at + size])
        at += size
    shown += parser.push(text[at:])
    shown += parser.finish(cut)
    answer = parser.answer
    for kind, whole in (("reasoning", answer.reasoning), ("content", answer.content)):
        assert "".join(p.text for p in shown if p.kind == kind) == whole
    return answer.reasoning, answer.content, [(c.name, c.arguments) for c in answer.calls]


def call(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


CASES = {
    "reasoning and content": ("why\n</think>\nBecause.", True, ("why", "Because.", [])),
    "one line break is dropped, no more": ("a\n\n</think>\n\nb", True, ("a\n", "\nb", [])),
    "no line breaks": ("a</think>b", True, ("a", "b", [])),
    "reasoning that never ends": ("a < b </thin", True, ("a < b </thin", "", [])),
    "the opening tag repeated": ("<think>\nhm\n</think>\nyes", True, ("hm", "yes", [])),
    "the model opens the reasoning": ("<think>\nhm\n</think>\nyes", False, ("hm", "yes", [])),
    "no reasoning": ("plain <b>text</b>", False, ("", "plain <b>text</b>", [])),
    "a tag in the reasoning is text": (
        "use <tool_call> now\n</think>\nok", True, ("use <tool_call> now", "ok", []),
    ),
    "one call": (
        "Sure.\n" + call("weather", city="Turin", days="3"), False,
        ("", "Sure.\n", [("weather", {"city": "Turin", "days": 3})]),
    ),
    "reasoning, then a call": (
        "hm\n</think>\n" + call("weather", city="Turin"), True,
        ("hm", "", [("weather", {"city": "Turin"})]),
    ),
    "a value over lines, an object": (
        call("area", shape="a\n\nb", dimensions='{"w": 1, \n"h": [2, {"x": "}"}]}'), False,
        ("", "", [("area", {"shape": "a\n\nb", "dimensions": {"w": 1, "h": [2, {"x": "}"}]}})]),
    ),
    "two calls, nothing between": (
        call("weather", city="A") + call("weather", city="B"), False,
        ("", "", [("weather", {"city": "A"}), ("weather", {"city": "B"})]),
    ),
    "two calls, a line break between and after": (
        call("weather", city="A") + "\n" + call("weather", city="B") + "\n", False,
        ("", "", [("weather", {"city": "A"}), ("weather", {"city": "B"})]),
    ),
    "content around calls": (
        "hello" + call("weather", city="A") + "hi" + call("area", shape="B"), False,
        ("", "hellohi", [("weather", {"city": "A"}), ("area", {"shape": "B"})]),
    ),
    "no parameters": (call("weather"), False, ("", "", [("weather", {})])),
    "without the outer tag": (
        "<function=weather>\n<parameter=city>\nA\n</parameter>\n</function>", False,
        ("", "", [("weather", {"city": "A"})]),
    ),
    "an unknown bare function is text": (
        "<function=print>x</function>", False, ("", "<function=print>x</function>", []),
    ),
    "two functions in one tag": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA\n</parameter>\n"
        "<function=area>\n<parameter=shape>\nB\n</parameter>\n</function>\n</tool_call>", False,
        ("", "", [("weather", {"city": "A"}), ("area", {"shape": "B"})]),
    ),
    "a parameter is not closed": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA\n<parameter=unit>\nC\n</parameter>\n"
        "</function>\n</tool_call>", False, ("", "", [("weather", {"city": "A", "unit": "C"})]),
    ),
    "the last parameter is not closed": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA\n</function>\n</tool_call>", False,
        ("", "", [("weather", {"city": "A"})]),
    ),
    "nor is it before another call": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA\n</function>\n</tool_call>\n"
        + call("area", shape="B"), False,
        ("", "", [("weather", {"city": "A"}), ("area", {"shape": "B"})]),
    ),
    "the function is not closed": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA\n</parameter>\n</tool_call>", False,
        ("", "", [("weather", {"city": "A"})]),
    ),
    "nothing is closed": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nA", False,
        ("", "", [("weather", {"city": "A"})]),
    ),
    "the value holds the closing tags": (
        call("write_file", path="n.xml", content="<function=demo>\n</function>\n</tool_call>\nx"),
        False,
        ("", "", [("write_file", {
            "path": "n.xml", "content": "<function=demo>\n</function>\n</tool_call>\nx"})]),
    ),
    "the value holds a parameter of something else": (
        call("write_file", content="a\n<parameter=z>\n1\n</parameter> b"), False,
        ("", "", [("write_file", {"content": "a\n<parameter=z>\n1\n</parameter> b"})]),
    ),
    "a JSON object instead": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "A", "days": 2}}\n</tool_call>',
        False, ("", "", [("weather", {"city": "A", "days": 2})]),
    ),
    "no call at all in the tags": (
        "<tool_call>\nnothing here\n</tool_call> end", False,
        ("", "<tool_call>\nnothing here\n</tool_call> end", []),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whole_and_in_pieces_of_any_size(name: str) -> None:
    text, in_reasoning, expected = CASES[name]
    assert parse(text, None, in_reasoning) == expected
    assert parse(text, [1] * len(text), in_reasoning) == expected
    rng = random.Random(name)
    for _ in range(30):
        sizes = [rng.randint(1, 12) for _ in text]
        assert parse(text, sizes, in_reasoning) == expected, sizes


def test_a_call_that_a_limit_cut_off_is_text_and_not_a_call() -> None:
    text = "<tool_call>\n<function=write_file>\n<parameter=path>\n/etc/pas"
    assert parse(text, cut=True) == ("", text, [])
    whole = call("weather", city="A")
    assert parse(whole[: -len("</tool_call>")], cut=True)[2] == [("weather", {"city": "A"})]


def test_no_part_of_a_tag_is_ever_shown() -> None:
    parser = OutputParser(TOOLS, in_reasoning=True)
    shown = ""
    for char in "think\n</think>\nsay" + call("weather", city="A"):
        shown += "".join(p.text for p in parser.push(char))
        assert "<" not in shown and not shown.startswith("think\n")
    assert shown == "thinksay"


def test_only_the_first_repeated_tag_is_dropped() -> None:
    for sizes in (None, [1] * 15, [8, 7]):
        assert parse("<think>\n<think>", sizes, True, True) == ("<think>", "", [])


PARTS = ["<tool_call>", "</tool_call>", "<function=area>", "</function>", "<parameter=shape>",
         "</parameter>", "<think>", "</think>", "\n", "x", "<", "{}", "<function="]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), seed=st.integers(0, 9), data=st.data())
def test_any_text_gives_the_same_in_pieces_and_loses_no_words(parts, seed, data) -> None:
    text, in_reasoning = "".join(parts), data.draw(st.booleans())
    cut = data.draw(st.booleans())
    rng = random.Random(seed)
    sizes = [rng.randint(1, 9) for _ in text]
    whole = parse(text, None, in_reasoning, cut)
    assert parse(text, sizes, in_reasoning, cut) == whole
    reasoning, content, calls = whole
    kept = reasoning + content + "".join(str(a) for _, a in calls)
    assert kept.count("x") == text.count("x") or len(calls) > 0

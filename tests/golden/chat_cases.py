"""Conversations whose prompts are recorded in chat.json (see make_chat.py)."""

import re
from typing import Any


def tool(name: str, **properties: object) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    described = {"name": name, "description": f"The tool «{name}» <b>&</b> more."}
    return {"type": "function", "function": {**described, "parameters": parameters}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str, **more: str) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def said(text: str, reasoning: str | None = None, *calls: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def call(name: str, **arguments: object) -> dict[str, Any]:
    return {"id": "call_0", "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_0", "content": text}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool("search", query={"type": "string"}, filters={"type": "object"}),
]
WEATHER = call("weather", city="Torino", days=3)
SEARCH = call("search", query="a\nb <c> & 'd'", filters={"lang": ["it", "日本"], "n": None})
TYPES = call("weather", city="", days=-1, on=True, none=None, share=0.5, list=[])

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "user": {"messages": [user("Hi")], "plain": True},
    "system": {"messages": [system("Be brief."), user("Hi")], "plain": True},
    "several turns": {
        "messages": [system("S"), user("a"), said("A"), user("b"), said("B"), user("c")],
        "plain": True,
    },
    "reasoning of earlier turns is dropped": {
        "messages": [user("a"), said("A", "because"), user("b"), said("B", "hm\n\nhm"), user("c")],
    },
    "reasoning since the last question is kept": {
        "messages": [user("a"), said("A", "old"), user("b"), said("B", "new")],
    },
    "unicode, tags and line breaks": {
        "messages": [user(" «é» 日本 🙂\n\n<think>x</think> {{ y }} \n"), said("\n ok \n", "\n"),
                     user("")],
        "plain": True,
    },
    "later system message": {"messages": [user("a"), said("A"), system("now"), user("b")]},
    "observation": {"messages": [user("a"), said("A"), system("seen", name="observation")]},
    "tools": {"messages": [user("Weather?")], "tools": TOOLS},
    "tools and system": {"messages": [system("Be brief."), user("Weather?")], "tools": TOOLS},
    "a call and its result": {
        "messages": [user("Weather?"), said("", "call it", WEATHER), result('{"t": 21}')],
        "tools": TOOLS,
    },
    "two calls and their results": {
        "messages": [user("?"), said("Let me see.", "both", WEATHER, SEARCH), result("21"),
                     result("none\n"), said("It is 21.", "done"), user("Thanks")],
        "tools": TOOLS,
    },
    "reasoning goes on between calls": {
        "messages": [user("?"), said("", "one", WEATHER), result("21"), said("", "two", SEARCH),
                     result("x"), said("End", "three")],
        "tools": TOOLS,
    },
    "arguments of every type": {"messages": [user("?"), said("", "", TYPES)], "tools": TOOLS},
    "calls without definitions": {"messages": [user("?"), said("x", None, WEATHER), result("y")]},
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    f"{name}, {'to be answered' if generation else 'as it is'}": {**case, "generation": generation}
    for name, case in CONVERSATIONS.items()
    for generation in (True, False)
}


def without_instructions(prompt: str) -> str:
    """The prompt without the instructions around the tools."""
    instructions = r"# Tools\n\n.*?<tools>\n(.*?)\n</tools>\n.*?<\|im_end\|>"
    return re.sub(instructions, r"\1<|im_end|>", prompt, count=1, flags=re.S)

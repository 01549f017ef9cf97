"""A chat as JSON lines, for scripts: one message a line in, one answer a line out."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import click

from refimpl.errors import InputError, RefimplError
from refimpl.text.session import ChatSession


def serve(session: ChatSession) -> int:
    """Answer the lines of stdin; how many of them could not be used.

    Raises:
        InputError: stdin is closed.
        KeyboardInterrupt: Ctrl-C, after the line of the answer that it stopped.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed; nothing can be said")
    bad = 0
    for line in sys.stdin.buffer:
        if not line.strip():
            continue
        try:
            made = _line(session, _object(line))
        except RefimplError as error:
            bad += 1
            made = {"error": " ".join(str(error).splitlines())}
        if made is not None:
            click.echo(json.dumps(made, allow_nan=False))
            if made.get("finish_reason") == "interrupted":
                raise KeyboardInterrupt
    return bad


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(found, dict):
        raise InputError("the line is not a JSON object with role and content, or command")
    return found


def _line(session: ChatSession, given: dict[str, Any]) -> dict[str, Any] | None:
    command = given.get("command")
    if command == "reset":
        session.conversation.reset()
        return None
    if command == "stats":
        used = {"context_tokens": session.context_tokens, "context": session.context}
        return {"stats": {**dataclasses.asdict(session.totals), **used}}
    if command is not None:
        raise InputError(f"the command is {str(command)[:40]!r}, expected 'reset' or 'stats'")
    more = given.pop("more", False)
    if given.get("role") == "system":
        session.conversation.reset()
        content = given.get("content")
        if not isinstance(content, str):
            raise InputError("the content of a system message is not text")
        session.conversation.set_system(content)
        return None
    before = len(session.conversation.messages)
    session.conversation.add(given)
    if given["role"] == "assistant" or more:
        return None
    try:
        return session.answer(lambda piece: None).as_json()
    except RefimplError:
        del session.conversation.messages[before:]  # as if it had not been said
        raise

"""The command `refimpl chat`: a conversation at the terminal, over a pipe, or as JSON lines."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import click

from refimpl.cli import generate, generate_options
from refimpl.cli_engine import opened_model
from refimpl.cli_support import BAD_INPUT, note, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refimpl.backends import OpenModel
    from refimpl.decoding.generation import GenerateOptions
    from refimpl.text.session import ChatSession

_NOT_SHARED = (
    "prompt", "tokens", "save_state", "load_state", "stats", "simulate_acceptance", "as_json",
)  # fmt: skip
"""Options of `generate` that a chat has not; all others it has too."""


@click.command()
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "--template",
    metavar="FILE|NAME|step|plain",
    help="Chat template: a Jinja file, one of the checkpoint's by name, or a built-in one: "
    "step (the format of Step 3.5) or plain (lines User: and Assistant:, for base models). "
    "[default: the checkpoint's, else plain]",
)
@click.option("--tools", metavar="FILE", help="Tool definitions: a JSON list, as OpenAI's API has.")
@click.option(
    "--context",
    type=int,
    metavar="N",
    help="Most tokens of the conversation. [default: the model's context, at most 32768]",
)
@click.option(
    "--keep-reasoning",
    is_flag=True,
    help="Show the model its reasoning of all turns again (variable preserve_thinking of the "
    "template), not only since the last question.",
)
@click.option("--hide-reasoning", is_flag=True, help="Do not show the reasoning.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines: a message in, an answer out.")
@click.pass_context
def chat(ctx: click.Context, as_json: bool, **given: Any) -> None:
    """Talk with a model.

    At a terminal lines can be edited and called up again; Ctrl-C stops the answer, Ctrl-D ends.
    A line that ends with a backslash goes on in the next. From a pipe every line is a message,
    answers go to stdout, reasoning and notes to stderr. Commands: /help shows them.

    With --json every line is a message {"role": "user", "content": "..."} (or of the role system
    or tool), or {"command": "reset"} or {"command": "stats"}; a user's message, and a tool's
    unless "more": true says that others follow, is answered by one line: message, finish_reason,
    timings. A line that cannot be used is answered by {"error": "..."}; the exit code is then 2.

    \b
    Examples:
      refimpl chat --model step.gguf --system 'Be brief.' --temperature 1
      refimpl chat --model step.gguf --tools tools.json
      echo 'def fibonacci(n):' | refimpl chat --max-new-tokens 40
      echo '{"role": "user", "content": "Hi"}' | refimpl chat --json
    """
    from refimpl.text.conversation import Conversation
    from refimpl.text.session import ChatSession, special_variables, tokenizer_required
    from refimpl.text.template import ChatTemplate
    from refimpl.text.tools import Tools

    file = given["tools"]
    tools = Tools() if file is None else Tools.from_json(read_text(file, "the list of tools"), file)
    options = generate_options(given)
    with opened_model({**given, "stats": False, "simulate_acceptance": None}) as model:
        for warning in model.warnings:
            note(f"note: {warning}")
        found = _template(model, given["template"], bool(tools))
        variables = special_variables(tokenizer_required(model))
        with ChatTemplate(found.source, found.where, variables) as template:
            conversation = Conversation(template, given["system"], tools, given["keep_reasoning"])
            options = _for_chat(options, model, given["context"], found.stops)
            session = ChatSession(model, conversation, options)
            if as_json:
                from refimpl.chat_lines import serve

                if serve(session):
                    ctx.exit(BAD_INPUT)
            else:
                _talk(session, given["hide_reasoning"])


def _shared(option: click.Parameter) -> click.Parameter:
    """An option of `generate`; an answer with its reasoning is longer than a continuation."""
    made = copy.copy(option)
    if made.name == "max_new_tokens":
        made.default = 4096
    return made


chat.params += [_shared(p) for p in generate.params if p.name not in _NOT_SHARED]


def _template(model: OpenModel, wanted: str | None, with_tools: bool) -> Any:
    from refimpl.text.find_template import find_template
    from refimpl.text.session import tokenizer_required

    found = find_template(wanted, model.path, tokenizer_required(model), with_tools)
    if found.note:
        note(f"note: {found.note}")
    return found


def _for_chat(
    options: GenerateOptions, model: OpenModel, context: int | None, stops: tuple[str, ...]
) -> GenerateOptions:
    from dataclasses import replace

    limit = model.backend.config.max_position_embeddings
    stops = (*options.stop_strings, *stops)
    context = min(limit, 32768) if context is None else context
    return replace(options, context=context, stop_strings=stops)


def _talk(session: ChatSession, hide_reasoning: bool) -> None:
    """Lines from the terminal or a pipe until they end."""
    from refimpl.chat_screen import Commands, Screen, answer, lines

    screen = Screen(hide_reasoning)
    commands = Commands(session)
    if screen.interactive:
        note("chat: /help shows the commands, Ctrl-C stops an answer, Ctrl-D ends")
    for line in lines(screen.interactive):
        with _sentences(session, screen.interactive):
            if commands.run(line):
                answer(session, screen)
        if commands.ended:
            break


@contextlib.contextmanager
def _sentences(session: ChatSession, interactive: bool) -> Iterator[None]:
    """At a terminal, a mistake costs a sentence and the message, not the conversation."""
    from refimpl.errors import RefimplError

    messages = session.conversation.messages
    before = len(messages)
    try:
        yield
    except RefimplError as error:
        if not interactive:
            raise
        del messages[before:]
        note(f"error: {error}")

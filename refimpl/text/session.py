"""A chat under way: answers to a conversation, with the cache and the draft policy kept between
the turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from refimpl.backends import OpenModel
from refimpl.decoding.generate import generate, policy_for
from refimpl.decoding.generation import GenerateOptions, Generation
from refimpl.decoding.kept import KeptCache
from refimpl.errors import InputError
from refimpl.text.conversation import Conversation
from refimpl.text.output import Answer, OutputParser, Piece
from refimpl.text.tokenizer import NO_TOKENIZER, Tokenizer

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Turn:
    """One answer.

    Attributes:
        answer: reasoning, content and tool calls.
        generation: how it came about.
        context_tokens: tokens of the conversation, this answer included.
    """

    answer: Answer
    generation: Generation
    context_tokens: int

    def as_json(self) -> dict[str, Any]:
        """The message with figures, ready for `json.dumps`."""
        made = self.generation.as_json()
        problems = [p for call in self.answer.calls for p in call.problems]
        return {
            "message": self.answer.as_message(),
            "problems": problems,
            "context_tokens": self.context_tokens,
            **{key: made[key] for key in ("finish_reason", "seed", "timings", "mtp")},
        }


@dataclass
class Totals:
    """Sums over all turns."""

    turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decoded_tokens: int = 0
    decode_s: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, made: Generation) -> None:
        """Take in one answer."""
        t, m = made.timings, made.mtp
        self.turns += 1
        self.prompt_tokens += t.prompt_tokens
        self.reused_tokens += t.reused_tokens
        self.new_tokens += len(made.ids)
        self.prefill_s += t.prefill_s
        self.decoded_tokens += t.decoded_tokens
        self.decode_s += t.decode_s
        self.steps += m.steps
        self.drafted += m.drafted
        self.accepted += m.accepted


class ChatSession:
    """Answers a conversation with a model.

    Args:
        model: an open model with a tokenizer.
        conversation: what is said; answers are added to it.
        options: how answers are made; `context` is the most tokens of the conversation.

    Raises:
        InputError: the model has no tokenizer, or too few MTP layers for `options.mtp`; no tokens
            are wanted.
    """

    def __init__(
        self, model: OpenModel, conversation: Conversation, options: GenerateOptions
    ) -> None:
        if options.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {options.max_new_tokens}, expected 1 or more")
        self._tokenizer = tokenizer_required(model)
        config = model.backend.config
        self._policy = policy_for(model.backend, options.mtp)  # what one answer taught, the next
        self.context = min(options.context or config.max_position_embeddings,
                           config.max_position_embeddings)  # fmt: skip
        stops = {*config.eos_token_id, *_known(self._tokenizer.id_of(END_OF_TURN))}
        self._options = replace(options, context=self.context, stop_tokens=tuple(sorted(stops)))
        self._backend, self.conversation = model.backend, conversation
        self._kept = KeptCache(model.backend, self.context)
        self.context_tokens = 0
        self.totals = Totals()

    def answer(
        self,
        show: Callable[[Piece], None],
        stopped: Callable[[], bool] = lambda: False,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Turn:
        """The answer to the conversation as it stands, which it then belongs to.

        Args:
            show: called with every piece as it comes.
            stopped: asked after each step; True ends the answer there, and what there is of it
                counts. The cache stays good, unlike after a KeyboardInterrupt amid a step.

        Raises:
            InputError: the conversation does not fit the context any more.
            CheckpointError: the template cannot be used.
        """
        prompt = self.conversation.prompt()
        ids = self._tokenizer.encode(prompt.text, add_special=False)
        if len(ids) >= self.context:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context holds {self.context}: "
                "begin a new one with /reset"
            )
        mark = len(self._tokenizer.encode(prompt.history, add_special=False))
        parser = OutputParser(self.conversation.tools, prompt.in_reasoning)

        def on_tokens(_: object, text: str) -> None:
            for piece in parser.push(text):
                show(piece)
            if stopped():
                raise KeyboardInterrupt

        def progress(done: int, total: int) -> None:
            if on_prefill is not None:
                on_prefill(done, total)
            if stopped():
                raise KeyboardInterrupt

        made = generate(
            self._backend, ids, self._options, new_decoder=self._tokenizer.stream,
            on_tokens=on_tokens, on_prefill=progress, kept=self._kept, mark=mark,
            policy=self._policy,
        )  # fmt: skip
        for piece in parser.finish(cut=made.finish_reason != "stop"):
            show(piece)
        if made.ids:
            self.conversation.add(parser.answer.as_message())
        self.context_tokens = len(ids) + len(made.ids)
        self.totals.add(made)
        return Turn(parser.answer, made, self.context_tokens)


def tokenizer_required(model: OpenModel) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        InputError: it has none.
    """
    if model.tokenizer is None:
        raise InputError(
            NO_TOKENIZER.format(path=model.path).partition(";")[0] + "; chat needs one"
        )
    return model.tokenizer


def special_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, as templates use them."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    tokens, ids = tokenizer.vocabulary.tokens, tokenizer.vocabulary.special_ids
    return {name: tokens[ids[kind]] for kind, name in names.items() if kind in ids}


def _known(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)

"""A text as windows, and which of their tokens are judged.

Without a stride the protocol is llama-perplexity's: the text is cut into chunks of C tokens, the
rest at the end is dropped, the first token of every chunk gives way to bos where the tokenizer
puts one before a text, and of a chunk only the tokens C/2+1 .. C-1 are judged, so that each has
at least half a chunk before it. With a stride S windows of C tokens advance by S and every token
but the text's first is judged once, with at least C - S tokens before it where the text has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.text.tokenizer import Tokenizer

MIN_CONTEXT = 4


@dataclass(frozen=True)
class Window:
    """Tokens to run, and the first position whose next token is judged (to the last but one)."""

    tokens: tuple[int, ...]
    first: int

    @property
    def judged(self) -> int:
        """How many tokens are judged."""
        return len(self.tokens) - 1 - self.first


def chunks(ids: Sequence[int], context: int, bos: int | None) -> Iterator[Window]:
    """llama-perplexity's chunks; `bos` replaces each first token, None leaves it."""
    for start in range(0, len(ids) - context + 1, context):
        tokens = list(ids[start : start + context])
        if bos is not None:
            tokens[0] = bos
        yield Window(tuple(tokens), context // 2)


def strided(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Overlapping windows in which every token but the first of the text is judged once."""
    judged_to, start = 1, 0
    while judged_to < len(ids):
        tokens = tuple(ids[start : start + context])
        yield Window(tokens, judged_to - 1 - start)
        judged_to = start + len(tokens)
        start += stride


def windows_of(
    ids: Sequence[int],
    config: ModelConfig,
    context: int,
    stride: int | None = None,
    bos: int | None = None,
) -> list[Window]:
    """The windows of a text (see the module).

    Raises:
        InputError: a context or stride that cannot be, or fewer than two windows of text.
    """
    limit = config.max_position_embeddings
    if not MIN_CONTEXT <= context <= limit:
        raise InputError(
            f"context is {context}, expected {MIN_CONTEXT} to {limit}, the model's context"
        )
    if stride is not None and not 1 <= stride < context:
        raise InputError(f"stride is {stride}, expected 1 to {context - 1}, less than the context")
    bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if bad is not None:
        raise InputError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
    made = list(chunks(ids, context, bos) if stride is None else strided(ids, context, stride))
    if len(made) < 2:
        need = 2 * context if stride is None else context + 1
        raise InputError(
            f"the text has {len(ids)} tokens, expected at least {need} for two windows of "
            f"{context}; give a longer text or a smaller --context"
        )
    return made


def bos_of(tokenizer: Tokenizer | None) -> int | None:
    """The token that begins a text, where the tokenizer asks for one."""
    wanted = tokenizer is not None and tokenizer.vocabulary.add_bos
    return tokenizer.bos if wanted and tokenizer is not None else None

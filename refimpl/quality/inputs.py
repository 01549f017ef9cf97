"""The token ids that a text file, or a file of ids, stands for."""

from __future__ import annotations

from refimpl.backends import OpenModel
from refimpl.errors import InputError
from refimpl.text.tokenizer import NO_TOKENIZER


def ids_of_text(model: OpenModel, text: str) -> list[int]:
    """Token ids of a plain text, as llama-perplexity takes them: bos before it where the tokenizer
    asks for one, control tokens in it read as text.

    Raises:
        InputError: no text, or no tokenizer.
    """
    if not text:
        raise InputError("the text is empty: give a file with at least some hundred words")
    if model.tokenizer is None:
        raise InputError(NO_TOKENIZER.format(path=model.path))
    return model.tokenizer.encode(text, parse_special=False)


def cut(ids: list[int], max_tokens: int | None) -> list[int]:
    """The first `max_tokens` ids.

    Raises:
        InputError: fewer than one are asked for.
    """
    if max_tokens is None:
        return ids
    if max_tokens < 1:
        raise InputError(f"max-tokens is {max_tokens}, expected 1 or more")
    return ids[:max_tokens]

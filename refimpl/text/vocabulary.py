"""The contents of a tokenizer as GGUF files hold them (`tokenizer.ggml.*` keys)."""

from __future__ import annotations

from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of `tokenizer.ggml.token_type` (llama.cpp, llama_token_type)."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    Attributes:
        tokens: text of every id in the byte alphabet of GPT-2, as many as the model has rows.
        types: one token type per id.
        merges: 'left right' in order of priority.
        pre: llama.cpp's name of the pre-tokenizer.
        special_ids: 'bos', 'eos', 'pad', ... to id, in the order of the file.
        add_bos: whether a bos token is put before a prompt.
        chat_template: the Jinja template, or None.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    special_ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None

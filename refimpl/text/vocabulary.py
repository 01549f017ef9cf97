"""The contents of a tokenizer as GGUF files hold them (`tokenizer.ggml.*` keys)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of `tokenizer.ggml.token_type` that byte-level BPE uses (llama.cpp, llama.h)."""

SPECIAL_KINDS = ("bos", "eos", "eot", "unknown", "seperator", "padding", "mask")
"""Special tokens as the keys `tokenizer.ggml.KIND_token_id` name them (GGUF's own spelling)."""

_PREFIX = "tokenizer.ggml."
_NO_VOCABULARY = ("no_vocab", "none")


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    Attributes:
        tokens: text of every id: normal tokens in GPT-2's byte alphabet, others as they read.
        types: one token type per id.
        merges: 'left right' in order of priority.
        pre: llama.cpp's name of the pre-tokenizer; '' if it has none for it.
        special_ids: kind ('bos', 'eos', 'padding', ...) to id, in the order of the file.
        add_bos, add_eos: whether these are put around a prompt; None where the file is silent.
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

    def padded(self, size: int) -> Vocabulary:
        """With unused entries up to the rows of the embedding table, as llama.cpp names them.

        Raises:
            CheckpointError: the vocabulary has more entries than that.
        """
        n = len(self.tokens)
        if n > size:
            raise CheckpointError(
                f"the tokenizer has {n} entries, the model's vocabulary {size}; "
                "they do not belong together"
            )
        return dataclasses.replace(
            self,
            tokens=self.tokens + tuple(f"[PAD{i}]" for i in range(n, size)),
            types=self.types + (UNUSED,) * (size - n),
        )


def vocabulary_from_gguf(metadata: Mapping[str, Any], where: object) -> Vocabulary | None:
    """The vocabulary in a GGUF file's metadata; None if the file has none.

    Raises:
        CheckpointError: another kind of tokenizer, or arrays that do not fit together.
    """
    model = metadata.get(_PREFIX + "model")
    if model is None or (isinstance(model, str) and model in _NO_VOCABULARY):
        return None
    if not isinstance(model, str) or model != "gpt2":
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model is {str(model)[:50]!r}, expected 'gpt2' "
            "(byte-level BPE)"
        )
    tokens = _strings(metadata, "tokens", where)
    stored = metadata.get(_PREFIX + "token_type")
    types = [NORMAL] * len(tokens) if stored is None else _integers(stored, where)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type has {len(types)} entries, "
            f"tokenizer.ggml.tokens {len(tokens)}"
        )
    return Vocabulary(
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(_strings(metadata, "merges", where)),
        pre=str(metadata.get(_PREFIX + "pre", "default")),
        special_ids=_special_ids(metadata, len(tokens), where),
        add_bos=_flag(metadata, "add_bos_token"),
        add_eos=_flag(metadata, "add_eos_token"),
        chat_template=_text(metadata, "tokenizer.chat_template"),
    )


def _strings(metadata: Mapping[str, Any], name: str, where: object) -> Sequence[str]:
    value = metadata.get(_PREFIX + name)
    ok = isinstance(value, Sequence) and not isinstance(value, str)
    if value is None or not ok or not all(isinstance(v, str) for v in value):
        found = "missing" if value is None else "not an array of strings"
        raise CheckpointError(f"{where}: {_PREFIX + name} is {found}")
    return list(value)


def _integers(value: Any, where: object) -> list[int]:
    try:
        return [int(v) for v in value]
    except (TypeError, ValueError):
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type is not an array") from None


def _special_ids(metadata: Mapping[str, Any], n: int, where: object) -> dict[str, int]:
    found = {}
    for kind in SPECIAL_KINDS:
        key = f"{_PREFIX}{kind}_token_id"
        value = metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise CheckpointError(
                f"{where}: {key} is {str(value)[:50]}, the vocabulary has {n} entries"
            )
        found[kind] = value
    return found


def _flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    value = metadata.get(_PREFIX + name)
    return value if isinstance(value, bool) else None


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None

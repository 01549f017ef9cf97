"""Text to token ids and back, with the ids that llama.cpp gives.

BPE itself is the `tokenizers` package's. Around it, as in llama.cpp: special tokens are cut out
of the text first, the longest first; every piece between them is split and merged on its own;
bytes come from the byte alphabet, so decoding is exact for any text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from refimpl.errors import CheckpointError, InputError
from refimpl.text.byte_alphabet import bytes_of
from refimpl.text.hf_tokenizer import read_tokenizer_json
from refimpl.text.pretokenizer import build_pre_tokenizer
from refimpl.text.vocabulary import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    vocabulary_from_gguf,
)

NO_TOKENIZER = "{path}: the checkpoint has no tokenizer; give token ids with --tokens FILE"


def tokenizer_of(path: str | Path, metadata: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if it has none (see `NO_TOKENIZER`).

    Args:
        path: a folder with tokenizer.json, or a .gguf file.
        metadata: the GGUF file's metadata, if it has been read already.

    Raises:
        CheckpointError: the tokenizer is there but damaged or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        return from_hf(path) if (path / "tokenizer.json").is_file() else None
    if metadata is None:
        from refimpl.checkpoint.gguf_read import read_gguf

        metadata = read_gguf(path).metadata
    vocabulary = vocabulary_from_gguf(metadata, path)
    return None if vocabulary is None else from_vocabulary(vocabulary, path)


def from_hf(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (tokenizer.json, tokenizer_config.json).

    Raises:
        CheckpointError: a file is damaged or not byte-level BPE.
    """
    data, vocabulary = read_tokenizer_json(folder)
    bare = dict(data, added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer(_load(json.dumps(bare), folder / "tokenizer.json"), vocabulary)


def from_vocabulary(vocabulary: Vocabulary, where: object) -> Tokenizer:
    """The tokenizer of a GGUF file, rebuilt from its vocabulary.

    Raises:
        CheckpointError: unknown pre-tokenizer, or merges that do not fit the tokens.
    """
    from tokenizers import Tokenizer as Bpe
    from tokenizers import models

    splitter = build_pre_tokenizer(vocabulary.pre, where)
    ids: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if vocabulary.types[i] == NORMAL:
            ids.setdefault(token, i)
    merges = []
    for n, merge in enumerate(vocabulary.merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{where}: merge {n} {merge[:60]!r} is not made of tokens")
        merges.append((left, right))
    bpe = Bpe(models.BPE(ids, merges))
    bpe.pre_tokenizer = splitter
    return Tokenizer(bpe, vocabulary)


def _load(text: str, path: Path) -> Any:
    from tokenizers import Tokenizer as Bpe

    try:
        return Bpe.from_str(text)
    except Exception as error:  # the package raises plain Exception for whatever is wrong
        raise CheckpointError(f"{path}: cannot be used ({str(error)[:150]})") from None


class Tokenizer:
    """A byte-level BPE tokenizer."""

    def __init__(self, bpe: Any, vocabulary: Vocabulary) -> None:
        self._bpe = bpe
        self.vocabulary = vocabulary
        by_length = sorted(
            (i for i, t in enumerate(vocabulary.types) if t in (CONTROL, USER_DEFINED)),
            key=lambda i: -len(vocabulary.tokens[i].encode()),
        )
        self._special = [(vocabulary.tokens[i], i) for i in by_length if vocabulary.tokens[i]]

    def __len__(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def bos(self) -> int | None:
        """The id that begins a text, or None."""
        return self.vocabulary.special_ids.get("bos")

    @property
    def eos(self) -> int | None:
        """The id that ends a text, or None."""
        return self.vocabulary.special_ids.get("eos")

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the checkpoint, or None."""
        return self.vocabulary.chat_template

    def id_of(self, token: str) -> int | None:
        """The id of a special token such as '<|im_end|>', or of a token in the byte alphabet."""
        for text, i in self._special:
            if text == token:
                return i
        found = self._bpe.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: put bos first and eos last where the checkpoint asks for it.
            parse_special: read control tokens such as '<|im_end|>' in the text as tokens; without
                it they are plain text (user-defined tokens are tokens either way).

        Raises:
            InputError: the text holds half a surrogate pair (it was not valid UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode at character {error.start}; save it as UTF-8"
            ) from None
        ids: list[int] = []
        for piece in self._cut(text, parse_special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
        v = self.vocabulary
        if add_special and v.add_bos and self.bos is not None:
            ids.insert(0, self.bos)
        if add_special and v.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def _cut(self, text: str, parse_special: bool) -> list[str | int]:
        pieces: list[str | int] = [text] if text else []
        for token, i in self._special:
            if token not in text:
                continue
            if not parse_special and self.vocabulary.types[i] == CONTROL:
                continue
            cut: list[str | int] = []
            for piece in pieces:
                cut += _split(piece, token, i) if isinstance(piece, str) else [piece]
            pieces = cut
        return pieces

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; nothing for ids that pad the vocabulary.

        Raises:
            InputError: the id is negative.
        """
        if token < 0:
            raise InputError(f"token id {token} is negative")
        if token >= len(self.vocabulary.tokens):
            return b""
        kind, text = self.vocabulary.types[token], self.vocabulary.tokens[token]
        if kind == NORMAL:
            found = bytes_of(text)
            return text.encode("utf-8") if found is None else found
        return text.encode("utf-8") if kind in (CONTROL, USER_DEFINED) else b""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: leave out control tokens.
        """
        return b"".join(self._shown(i, skip_special) for i in ids).decode("utf-8", "replace")

    def _shown(self, token: int, skip_special: bool) -> bytes:
        types = self.vocabulary.types
        if skip_special and 0 <= token < len(types) and types[token] == CONTROL:
            return b""
        return self.token_bytes(token)

    def stream(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes tokens one by one and never splits a character."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Decodes tokens as they come; bytes of an incomplete character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that becomes complete with `token`."""
        return self._utf8.decode(self._tokenizer._shown(token, self._skip_special))

    def finish(self) -> str:
        """U+FFFD if a character was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _split(piece: str, token: str, i: int) -> list[str | int]:
    parts: list[str | int] = []
    for n, text in enumerate(piece.split(token)):
        if n:
            parts.append(i)
        if text:
            parts.append(text)
    return parts

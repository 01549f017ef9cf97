"""Tokenizer files of Hugging Face folders: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refimpl.errors import CheckpointError
from refimpl.text.pretokenizer import pre_tokenizer_name
from refimpl.text.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary

MAX_TOKENIZER_BYTES = 128 << 20
MAX_TOKENS = 1 << 22


def read_tokenizer_json(folder: Path) -> tuple[dict[str, Any], Vocabulary]:
    """The parsed tokenizer.json of a folder and its vocabulary.

    Special ids, bos/eos behaviour and the chat template come from the same files, by the same
    rules, as in llama.cpp's converter (`gguf.SpecialVocab`).

    Raises:
        CheckpointError: the file is damaged or not byte-level BPE.
    """
    path = folder / "tokenizer.json"
    data = _read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{path}: tokenizer model is {str(kind)[:50]!r}, expected 'BPE'")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(_is_id(v) for v in vocab.values()):
        raise CheckpointError(f"{path}: model.vocab is not a table from tokens to ids")
    tokens, types = _tokens(vocab, _added_tokens(data, path))
    if not all(token.isascii() or _is_unicode(token) for token in tokens):
        raise CheckpointError(f"{path}: a token holds half a surrogate pair; damaged file")
    special = _special_vocabulary(folder, len(tokens))
    template = special.chat_template
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    ids = {names.get(k, k): v for k, v in special.special_token_ids.items() if k != "cls"}
    return data, Vocabulary(
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(special.merges),
        pre=pre_tokenizer_name(data.get("pre_tokenizer")),
        special_ids=ids,
        add_bos=special.add_special_token.get("bos"),
        add_eos=special.add_special_token.get("eos"),
        chat_template=template if isinstance(template, str) else _default_template(template),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, at most {MAX_TOKENIZER_BYTES} are read")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _is_unicode(token: str) -> bool:
    """JSON can spell halves of surrogate pairs, which are no text."""
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _added_tokens(data: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    added = data.get("added_tokens") or []
    ok = isinstance(added, list) and all(
        isinstance(t, dict) and isinstance(t.get("content"), str) and _is_id(t.get("id"))
        for t in added
    )
    if not ok:
        raise CheckpointError(f"{path}: added_tokens is not a list of tokens with id and content")
    return added


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    size = 1 + max([*vocab.values(), *(t["id"] for t in added)], default=-1)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for text, i in vocab.items():
        tokens[i], types[i] = text, NORMAL
    for token in added:
        i, text = token["id"], token["content"]
        special = bool(token.get("special")) or _looks_special(text)
        tokens[i], types[i] = text, CONTROL if special else USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Added tokens that some files fail to mark as special (rule of llama.cpp's converter)."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _special_vocabulary(folder: Path, n: int) -> Any:
    from gguf import SpecialVocab

    try:
        return SpecialVocab(folder, load_merges=True, n_vocab=n)
    except Exception as error:  # it trusts these files; whatever it trips over is their fault
        reason = f"{type(error).__name__}: {error}"[:150]
        raise CheckpointError(f"{folder}: the tokenizer files do not fit ({reason})") from None


def _default_template(template: Any) -> str | None:
    for entry in template or ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            found = entry.get("template")
            return found if isinstance(found, str) else None
    return None

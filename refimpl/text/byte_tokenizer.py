"""A tokenizer that needs no training: the byte alphabet and a few merges, for tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence

from refimpl.text.byte_alphabet import CHAR_OF_BYTE
from refimpl.text.pretokenizer import SPLITS

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_end|>")
"""Ids 0, 1 and 2, spelled as in the published family."""

MERGES = ("Ġ t", "h e", "i n", "r e", "Ġt he", "e r", "o n", "in g", "Ġ s", "Ġ =", "Ã ©", "1 0")
SIZE = len(SPECIAL) + 256 + len(MERGES)


def byte_tokenizer_files(special: Sequence[str] = SPECIAL) -> dict[str, bytes]:
    """File name to contents: tokenizer.json and tokenizer_config.json.

    Ids: the special tokens (bos, eos, then others), the 256 bytes in order, the merges.
    """
    alphabet = list(CHAR_OF_BYTE.values())
    merged = [merge.replace(" ", "") for merge in MERGES]
    vocab = {token: i for i, token in enumerate([*special, *alphabet, *merged])}
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(special)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS["deepseek-v3"]
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [merge.split(" ") for merge in MERGES]},
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": special[0],
        "eos_token": special[1],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": (json.dumps(tokenizer, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False) + "\n").encode(),
    }

"""The mini tokenizer: byte-level BPE with the published family's pre-tokenizer, 4096 entries.

Ids: 0 bos, 1 eos, 2 pad, 3..10 chat markers (reserved, untrained), 11..266 the byte alphabet,
then the merges.  The splits are those of the published tokenizer, so every program that knows
the "deepseek-v3" pre-tokenizer cuts text in the same places.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB = 4096
BOS, EOS, PAD = 0, 1, 2
BOS_TEXT = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS_TEXT = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD_TEXT = "<\uff5c\u2581pad\u2581\uff5c>"
CHAT_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
SPECIAL = (BOS_TEXT, EOS_TEXT, PAD_TEXT, *CHAT_MARKERS)
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the texts; returns a `tokenizers.Tokenizer` of exactly VOCAB ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != VOCAB:
        raise ValueError(f"{bpe.get_vocab_size()} entries instead of {VOCAB}: too little text")
    return bpe


def save(bpe: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as the published layout names them."""
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS_TEXT,
        "eos_token": EOS_TEXT,
        "pad_token": PAD_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "added_tokens_decoder": {
            str(i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)
        },
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

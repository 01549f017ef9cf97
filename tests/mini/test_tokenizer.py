"""The committed tokenizer: ids, splits and round trips."""

import json

import pytest
from tokenizers import Tokenizer

from refimpl.mini import data, tokenizer

FOLDER = data.HERE / "bf16"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_special_ids_come_first(bpe: Tokenizer) -> None:
    assert bpe.get_vocab_size() == tokenizer.VOCAB
    assert [bpe.token_to_id(t) for t in tokenizer.SPECIAL] == list(range(len(tokenizer.SPECIAL)))


def test_config_agrees_with_the_tokenizer() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == tokenizer.VOCAB
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.BOS, tokenizer.EOS)
    own = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert own["add_bos_token"] is False


@pytest.mark.parametrize(
    "text",
    ["def f(self, x=1234567):\n    return x\n", "  \t\n\n  x", "naïve café – 漢字 ひらがな 🙂", ""],
)
def test_text_survives_the_round_trip(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text).ids) == text


def test_digits_are_split_in_threes(bpe: Tokenizer) -> None:
    pieces = bpe.pre_tokenizer.pre_tokenize_str("12345678")
    assert [piece for piece, _ in pieces] == ["123", "456", "78"]


def test_newlines_end_a_line_for_the_sampler(bpe: Tokenizer) -> None:
    table = data.newline_table(FOLDER)
    ids = bpe.encode("x = 1\ny = (\n    2)\n").ids
    assert bpe.decode([i for i in ids if table[i]]).count("\n") == 3

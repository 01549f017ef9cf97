"""Tokenizers: llama.cpp's ids, exact decoding, streaming, and clear refusals."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.errors import CheckpointError, InputError
from refimpl.text.byte_alphabet import BYTE_OF_CHAR, CHAR_OF_BYTE
from refimpl.text.pretokenizer import pre_tokenizer_name
from refimpl.text.tokenizer import Tokenizer, from_vocabulary, tokenizer_of
from refimpl.text.vocabulary import CONTROL, UNUSED, USER_DEFINED, vocabulary_from_gguf

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenizer.json").read_text())
NAMES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


def write(folder, tokenizer=GOLDEN["tokenizer"], config=NAMES):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory) -> Tokenizer:
    found = tokenizer_of(write(tmp_path_factory.mktemp("tokenizer")))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def rebuilt(from_folder) -> Tokenizer:
    """As it comes out of a GGUF file: from the vocabulary alone, padded."""
    return from_vocabulary(from_folder.vocabulary.padded(1100), "m.gguf")


@pytest.fixture(scope="module", params=["from_folder", "rebuilt"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_ids_are_llama_cpps(tokenizer):
    """197 texts: scripts, combining marks, digits, code, controls, any code points, specials."""
    assert len(GOLDEN["cases"]) == 197
    for case in GOLDEN["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], parse_special=False) == case["plain"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["plain"]) == case["text"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(), special=st.booleans())
def test_decoding_gives_the_text_back(from_folder, rebuilt, text, special):
    ids = from_folder.encode(text, parse_special=special)
    assert rebuilt.encode(text, parse_special=special) == ids
    assert from_folder.decode(ids) == text == rebuilt.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streaming_gives_the_same_text_in_whole_characters(rebuilt, data):
    ids = data.draw(st.lists(st.integers(0, 1099), max_size=40))
    stream = rebuilt.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == rebuilt.decode(ids)


def test_a_character_waits_for_its_last_byte(from_folder):
    ids = [from_folder.id_of(CHAR_OF_BYTE[b]) for b in "é🙂".encode()]
    stream = from_folder.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.finish() == ""


def test_an_incomplete_character_is_marked_at_the_end(from_folder):
    first = from_folder.id_of(CHAR_OF_BYTE["🙂".encode()[0]])
    stream = from_folder.stream()
    assert stream.push(first) == "" and stream.finish() == "\ufffd"
    assert from_folder.decode([first]) == "\ufffd"


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(from_folder):
    first = from_folder.id_of(CHAR_OF_BYTE[0xF0])
    stream = from_folder.stream()
    letter = from_folder.id_of("a")
    assert [stream.push(i) for i in (first, letter, letter)] == ["", "\ufffda", "a"]


def test_special_tokens(tokenizer):
    end = tokenizer.id_of("<|im_end|>")
    assert tokenizer.vocabulary.types[end] == CONTROL
    assert tokenizer.encode("<|im_end|>") == [end]
    assert end not in tokenizer.encode("<|im_end|>", parse_special=False)
    assert tokenizer.decode([end]) == "<|im_end|>"
    assert tokenizer.decode([end], skip_special=True) == ""
    stream = tokenizer.stream(skip_special=True)
    assert stream.push(end) == ""
    fim = tokenizer.id_of("<fim>")
    assert tokenizer.vocabulary.types[fim] == USER_DEFINED
    assert tokenizer.encode("<fim>", parse_special=False) == [fim]
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.id_of("no such token") is None


def test_bos_is_added_where_the_checkpoint_asks_for_it(tmp_path):
    assert tokenizer_of(write(tmp_path)).encode("a")[0] != 0
    asks = tokenizer_of(write(tmp_path, config=NAMES | {"add_bos_token": True}))
    assert asks.encode("a")[0] == 0 and len(asks.encode("a")) == 2
    assert asks.encode("a", add_special=False) == asks.encode("a")[1:]
    assert from_vocabulary(asks.vocabulary, "m.gguf").encode("")[0] == 0


def test_padding_ids_have_no_text(rebuilt):
    assert rebuilt.vocabulary.types[1099] == UNUSED
    assert rebuilt.decode([1099, 5000]) == ""
    with pytest.raises(InputError, match="negative"):
        rebuilt.decode([-1])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\ud800")


def test_the_byte_alphabet_is_a_bijection():
    assert sorted(CHAR_OF_BYTE) == list(range(256)) and len(BYTE_OF_CHAR) == 256
    assert CHAR_OF_BYTE[ord(" ")] == "Ġ" and CHAR_OF_BYTE[ord("\n")] == "Ċ"


def test_through_a_checkpoint(tmp_path):
    """Folder -> GGUF -> folder: the same ids; the chat template travels along."""
    folder = synthesize(PRESETS["tiny_a"](), 0, tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "m.gguf", "q8_0")
    a, b = tokenizer_of(folder), tokenizer_of(tmp_path / "m.gguf")
    text = "the <|im_end|>\tringing = 10 é"
    assert a.encode(text) == b.encode(text) and len(a.encode(text)) < len(text.encode())
    assert a.chat_template == b.chat_template == "{{ messages[0].content }}"
    assert len(b) == 320 and a.vocabulary.padded(320) == b.vocabulary


def test_no_tokenizer_is_none(tmp_path):
    folder = synthesize(PRESETS["tiny_a"](), 0, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    convert(folder, tmp_path / "m.gguf", "q8_0")
    assert tokenizer_of(folder) is None and tokenizer_of(tmp_path / "m.gguf") is None


def changed(**model):
    data = json.loads(json.dumps(GOLDEN["tokenizer"]))
    data["model"].update(model)
    return data


BAD_FILES = {
    "not JSON": ("{", "not valid JSON"),
    "not an object": ("[]", "expected a JSON object"),
    "another model": (json.dumps(changed(type="Unigram")), "model is 'Unigram', expected 'BPE'"),
    "no model": ("{}", "expected 'BPE'"),
    "vocab is a list": (json.dumps(changed(vocab=[])), "not a table from tokens to ids"),
    "an id of 2^40": (json.dumps(changed(vocab={"a": 2**40})), "not a table from tokens to ids"),
    "a negative id": (json.dumps(changed(vocab={"a": -1})), "not a table from tokens to ids"),
    "merges of nothing": (json.dumps(changed(merges=[["q", "zzz"]])), "cannot be used"),
    "merges of numbers": (json.dumps(changed(merges=[1, 2])), "do not fit"),
    "added token without id": (
        json.dumps(GOLDEN["tokenizer"] | {"added_tokens": [{"content": "x"}]}), "added_tokens"),
    "unknown pre-tokenizer": (
        json.dumps(GOLDEN["tokenizer"] | {"pre_tokenizer": {"type": "Nope"}}), "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_tokenizer_files_are_refused(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        tokenizer_of(tmp_path)
    assert "\n" not in str(refusal.value)


def gguf_keys(**changes):
    keys = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": ["<s>", "a", "b", "ab"],
        "token_type": [3, 1, 1, 1],
        "merges": ["a b"],
        "bos_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def test_the_smallest_vocabulary():
    found = tokenizer_of("m.gguf", gguf_keys())
    assert found.encode("ab<s>a") == [3, 0, 1]


BAD_KEYS = {
    "another kind": ({"model": "llama"}, "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
    "another pre-tokenizer": ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' is not known here"),
    "no pre-tokenizer": ({"pre": None}, "pre-tokenizer 'default' is not known here"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "tokens are numbers": ({"tokens": [1, 2]}, "not an array of strings"),
    "types do not fit": ({"token_type": [1]}, "token_type has 1 entries, .*tokens 4"),
    "types are a number": ({"token_type": 3}, "token_type is not an array"),
    "bos outside": ({"bos_token_id": 4}, "bos_token_id is 4, the vocabulary has 4 entries"),
    "a merge of unknown tokens": ({"merges": ["a c"]}, "merge 0 'a c' is not made of tokens"),
    "a merge of one part": ({"merges": ["ab"]}, "merge 0 'ab' is not made of tokens"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_damaged_gguf_vocabularies_are_refused(name):
    changes, message = BAD_KEYS[name]
    with pytest.raises(CheckpointError, match=message):
        tokenizer_of("m.gguf", gguf_keys(**changes))


def test_a_vocabulary_larger_than_the_model_is_refused(from_folder):
    n = len(from_folder)
    with pytest.raises(CheckpointError, match=f"{n} entries, the model's vocabulary {n - 1}"):
        from_folder.vocabulary.padded(n - 1)


def test_an_unknown_pre_tokenizer_still_reads_but_cannot_be_named_in_gguf(tmp_path):
    folder = synthesize(PRESETS["tiny_a"](), 0, tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"].pop(0)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert pre_tokenizer_name(data["pre_tokenizer"]) == ""
    assert tokenizer_of(folder).decode(tokenizer_of(folder).encode("x 12345")) == "x 12345"
    with pytest.raises(CheckpointError, match="pre-tokenizer is not one that GGUF files can name"):
        convert(folder, tmp_path / "m.gguf", "q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_without_any_vocabulary_key_has_none():
    assert vocabulary_from_gguf({}, "m.gguf") is None

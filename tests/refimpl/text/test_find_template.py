"""Where the template comes from: GGUF keys, the files of a folder, a file, built in."""

import json
from pathlib import Path

import gguf
import pytest

from refimpl.backends import model_path
from refimpl.errors import CheckpointError, InputError
from refimpl.text.find_template import checkpoint_templates, find_template
from refimpl.text.tokenizer import tokenizer_of


def write(path: Path, **templates: str) -> Path:
    writer = gguf.GGUFWriter(path, "step35")
    for name, text in templates.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        writer.add_string(key, text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def mini():
    return tokenizer_of(model_path("mini"))


def test_gguf_named_templates(tmp_path: Path, mini) -> None:
    path = write(tmp_path / "a.gguf", default="D", tool_use="T")
    assert checkpoint_templates(path) == {"default": "D", "tool_use": "T"}
    assert find_template(None, path, mini).source == "D"
    assert find_template(None, path, mini, with_tools=True).source == "T"
    assert find_template("tool_use", path, mini).source == "T"


def test_folder_files_in_the_order_of_transformers(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "C"}))
    assert checkpoint_templates(tmp_path) == {"default": "C"}
    named = [{"name": "default", "template": "L"}, {"name": "rag", "template": "R"}, 3]
    config.write_text(json.dumps({"chat_template": named}))
    assert checkpoint_templates(tmp_path) == {"default": "L", "rag": "R"}
    (tmp_path / "chat_template.jinja").write_text("F")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert checkpoint_templates(tmp_path) == {"default": "F", "rag": "R", "tool_use": "T"}


def test_a_base_model_talks_in_plain_text_and_says_so(mini) -> None:
    found = find_template(None, model_path("mini"), mini)
    assert found.stops == ("\nUser:",)
    assert "has no chat template" in found.note
    assert find_template("plain", model_path("mini"), mini).note == ""


def test_a_file_goes_before_a_name(tmp_path: Path, mini) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("M")
    assert find_template(str(file), model_path("mini"), mini).source == "M"


def test_damaged_files_and_unknown_names_are_sentences(tmp_path: Path, mini) -> None:
    with pytest.raises(InputError, match="there are: plain, step"):
        find_template("nosuch", model_path("mini"), mini)
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        find_template(str(tmp_path / "bad.jinja"), model_path("mini"), mini)
    for text in ("{", "[" * 100_000, "3"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        if text == "3":
            assert checkpoint_templates(tmp_path) == {}
            continue
        with pytest.raises(CheckpointError, match="not valid JSON"):
            checkpoint_templates(tmp_path)
    with (tmp_path / "chat_template.jinja").open("wb") as big:
        big.truncate(1 << 30)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="at most"):
        checkpoint_templates(tmp_path)

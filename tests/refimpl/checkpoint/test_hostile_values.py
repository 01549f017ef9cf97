"""Values that are well formed and make no sense: found by tests/fuzz, one test for each finding."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from refimpl.checkpoint.gguf_parts import read_gguf_parts
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.gguf_source import config_of
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.config_gguf import from_gguf
from refimpl.errors import CheckpointError, ConfigError, InputError, RefimplError
from refimpl.golden.files import read_golden, read_npy
from refimpl.reference.model import ReferenceModel
from refimpl.text.tokenizer import from_hf
from refimpl.text.vocabulary import vocabulary_from_gguf

LONG = np.arange(5000, dtype=np.uint64)  # arrays of this length stay NumPy's, which do not compare


@pytest.fixture
def folder(made: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("micro", "hf-f32"), tmp_path / "m"))


def refused(action: Any, message: str, error: type[RefimplError] = CheckpointError) -> None:
    with pytest.raises(error, match=message) as refusal:
        action()
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_messages_are_one_printable_line_whatever_they_quote() -> None:
    assert str(InputError("a\nb\x1b[31m\ud800\u2028é")) == "a b\\x1b[31m\\ud800 é"
    quoted = str(ConfigError("field", f"is {'x' * 100_000!r}, expected a number"))
    assert len(quoted) < 500 and quoted.endswith("xxx', expected a number")


def test_a_number_of_five_thousand_digits(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"vocab_size": 288', f'"vocab_size": {"9" * 5000}')
    )
    refused(lambda: open_checkpoint(folder), "not valid JSON")


def test_a_long_value_is_quoted_in_part(folder: Path) -> None:
    edit(folder / "config.json", head_dim="1" * 5000)
    refused(lambda: open_checkpoint(folder), "'head_dim': is '111", ConfigError)


def test_tensor_names_with_line_breaks(folder: Path) -> None:
    index = {"weight_map": {"a\nb": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: open_checkpoint(folder), "tensor a b is missing")


def test_names_of_any_length(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "9" * 5000 + ".safetensors"}}))
    refused(lambda: open_checkpoint(folder), "is not the name of a safetensors file")
    index.write_text(json.dumps({"weight_map": {"a" * 100_000: "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="says it is here") as refusal:
        open_checkpoint(folder)
    assert len(str(refusal.value)) < 1600


def test_half_a_surrogate_pair_in_a_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    data = json.loads(text)
    data["model"]["vocab"]["\ud800"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(lambda: from_hf(folder), "half a surrogate pair")


def test_a_huge_window_costs_no_memory(folder: Path) -> None:
    edit(folder / "config.json", sliding_window=1 << 24)
    model = ReferenceModel(open_checkpoint(folder))
    tracemalloc.start()
    cache = model.new_cache(16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert np.isfinite(model.prefill([1, 2, 3], cache).logits).all()


def test_long_arrays_where_a_word_or_number_is_expected(made: Any, tmp_path: Path) -> None:
    file = read_gguf(made("micro", "q8_0"))
    for key, message in (
        ("general.architecture", "general.architecture is"),
        ("step35.block_count", r"block_count': is array\(\[ *0, *1,"),
        ("step35.attention.head_count", "is not an array of numbers|5000 entries"),
    ):
        file.metadata[key], before = LONG, file.metadata[key]
        refused(lambda: config_of(file), message, RefimplError)
        file.metadata[key] = before
    refused(lambda: vocabulary_from_gguf({"tokenizer.ggml.model": LONG}, "m"), "expected 'gpt2'")


@pytest.mark.parametrize("heads", [float("nan"), float("inf"), 1.5])
def test_heads_that_are_no_integers(made: Any, heads: float) -> None:
    keys = read_gguf(made("micro", "q8_0")).metadata
    for name in ("head_count", "head_count_kv"):
        bad = keys | {f"step35.attention.{name}": [heads] * 3}
        refused(lambda bad=bad: from_gguf(bad, 288, [1]), f"{name}': is .*expected integers",
                ConfigError)  # fmt: skip


def test_a_part_whose_number_is_an_array(tmp_path: Path) -> None:
    for part in (1, 2):
        path = tmp_path / f"m-0000{part}-of-00002.gguf"
        writer = GGUFWriter(path, "step35")
        writer.add_uint16("split.count", 2)
        if part == 1:
            writer.add_uint16("split.no", 0)
        else:
            writer.add_array("split.no", LONG.tolist())
        writer.add_tensor(f"t{part}", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    refused(lambda: read_gguf_parts(tmp_path / "m-00001-of-00002.gguf"), "is not part 2 of 2")


def test_values_at_the_edge_are_judged_without_warnings(folder: Path) -> None:
    """Whole norms that are no numbers, and the largest float32 among zeros."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    fields = json.loads(content[8:start])
    for name, entry in fields.items():
        low, high = (start + n for n in entry.get("data_offsets", (0, 0)))
        if name.endswith("norm.weight"):
            content[low:high] = np.full((high - low) // 4, np.nan, "<f4").tobytes()
        elif name == "lm_head.weight":
            values = np.zeros((high - low) // 4, "<f4")
            values[5] = np.finfo(np.float32).max
            content[low:high] = values.tobytes()
    path.unlink()
    path.write_bytes(content)
    findings = inspect(folder, check=True).findings
    assert findings is not None and any("not finite" in f.problem for f in findings)


def npy(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + data


LIES = {
    "fractional size": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}", bytes(4)),
    "negative size": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", bytes(4)),
    "true as a size": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", bytes(4)),
    "more than there is": npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", bytes(4)
    ),
    "product beyond 64 bits": npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4)}", bytes(4)
    ),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)),
    "no such type": npy("{'descr': 7, 'fortran_order': False, 'shape': (1,)}", bytes(8)),
    "deep brackets": npy("(" * 300),
    "a giant header": npy("{" + " " * 60_000),
    "version 9": b"\x93NUMPY\x09\0" + bytes(20),
}


@pytest.mark.parametrize("name", LIES)
def test_npy_headers_that_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.npy").write_bytes(LIES[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("logits.npy", LIES[name])
    (tmp_path / "a.npz").write_bytes(packed.getvalue())
    tracemalloc.start()
    refused(lambda: read_npy(tmp_path / "a.npy"), r"not a readable \.npy", InputError)
    refused(lambda: read_golden(tmp_path / "a.npz"), "not a readable golden file", InputError)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_arrays_are_read_as_numpy_wrote_them(tmp_path: Path) -> None:
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3, 2, dtype="f4")),
                  np.array(7), np.zeros((0, 4)), np.array("meta")):  # fmt: skip
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), array, strict=True)

"""The safetensors reader: agrees with the `safetensors` package, refuses every known trick."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl.checkpoint import safetensors_read
from refimpl.checkpoint.safetensors_read import read_safetensors
from refimpl.errors import CheckpointError


def build(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start=0, end=8, shape=(2,), dtype="F32", **other):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **other}


def test_files_of_the_package_are_read(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5, -2], np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"format": "np"})
    found = read_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].shape == value.shape and found[name].data.tobytes() == value.tobytes()


def test_our_files_are_read_by_the_package(made):
    path = made("micro", "hf-f16") / "model.safetensors"
    theirs = load_file(path)
    for name, found in read_safetensors(path).items():
        assert theirs[name].shape == found.shape
        assert theirs[name].tobytes() == found.data.tobytes()


A = entry()
THREATS = {
    "too short": (b"\0\0\0", "3 bytes are too few"),
    "length beyond the file": (build(b"{}")[:-1], "header of 2 bytes does not fit"),
    "length of 2^64-1": (b"\xff" * 8 + b"{}", "does not fit a file of 10 bytes"),
    "length of 0": (bytes(8) + b"{}", "header of 0 bytes"),
    "not JSON": (build(b"{nope"), "not valid JSON"),
    "not an object": (build(b"[1, 2]"), "not a JSON object"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (build(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "huge number": (build(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a tensor twice": (
        build(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}'.encode(), bytes(8)), "twice"),
    "entry is a number": (build({"a": 3}), "lacks dtype, shape or data_offsets"),
    "no offsets": (build({"a": {"dtype": "F32", "shape": [2]}}), "lacks dtype"),
    "unknown dtype": (build({"a": entry(dtype="F99")}, bytes(8)), "unknown dtype 'F99'"),
    "dtype is a list": (build({"a": entry(dtype=[])}, bytes(8)), "unknown dtype"),
    "negative size": (build({"a": entry(shape=(-2,))}, bytes(8)), "expected up to 8 sizes"),
    "fractional size": (build({"a": entry(shape=(2.0,))}, bytes(8)), "expected up to 8 sizes"),
    "true as a size": (build({"a": entry(shape=(True,))}, bytes(8)), "expected up to 8 sizes"),
    "size of 2^62": (build({"a": entry(shape=(2**62,))}, bytes(8)), "expected up to 8 sizes"),
    "nine dimensions": (build({"a": entry(shape=(1,) * 9)}, bytes(8)), "expected up to 8 sizes"),
    "product wraps": (
        build({"a": entry(shape=(2**32, 2**32, 2))}, bytes(8)), "takes 147573952589676412928"),
    "shape lies": (build({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes, its range has 8"),
    "offsets beyond the data": (build({"a": entry(0, 8)}, bytes(4)), "outside the 4 bytes"),
    "offsets reversed": (build({"a": entry(8, 0)}, bytes(8)), "outside the 8 bytes"),
    "three offsets": (
        build({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
        "data_offsets"),
    "overlap": (build({"a": A, "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "same range": (build({"a": A, "b": A}, bytes(8)), "overlaps"),
    "gap": (build({"a": A, "b": entry(12, 20)}, bytes(20)), "gap"),
    "data left over": (build({"a": A}, bytes(9)), "9 bytes of data, the header describes 8"),
    "100,000 entries": (
        build({f"t{i}": entry(0, 0, (0,)) for i in range(100_000)}), "100000 tensors, at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", THREATS)
def test_threats_are_refused_with_a_sentence(tmp_path, name):
    content, message = THREATS[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_safetensors(path)
    assert str(refusal.value).isprintable() and "m.safetensors" in str(refusal.value)


def test_a_header_of_100_megabytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:  # sparse: takes no room on disk
        file.write((100 << 20).to_bytes(8, "little") + b"{")
        file.truncate(200 << 20)
    monkeypatch.setattr(safetensors_read, "_parse", lambda *a: pytest.fail("parsed"))
    with pytest.raises(CheckpointError, match="header of 104857600 bytes, at most"):
        read_safetensors(path)

"""The GGUF reader: agrees with the `gguf` package on good files, refuses every known trick."""

import struct

import numpy as np
import pytest
from gguf import GGUFReader

from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.gguf_source import open_gguf
from refimpl.errors import CheckpointError

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def u32(key, value):
    return pair(key, U32, struct.pack("<I", value))


def info(name, dims, kind=0, offset=0, n_dims=None):
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    n = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack("<I", n) + sizes + struct.pack("<IQ", kind, offset)


def build(pairs=(), infos=(), data=b"", version=3, counts=None, magic=b"GGUF", align=32):
    n_infos, n_pairs = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_infos, n_pairs)
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


def read(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return read_gguf(path)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_agrees_with_the_gguf_package(made, kind):
    path = made("tiny_a", kind)
    ours, theirs = read_gguf(path), GGUFReader(path)
    keys = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: v if isinstance(v, int | float | str) else list(v)
            for k, v in ours.metadata.items()} == keys  # fmt: skip
    assert ours.tensors.keys() == {t.name for t in theirs.tensors}
    for t in theirs.tensors:
        tensor = ours.tensors[t.name]
        assert tensor.dims == tuple(int(d) for d in t.shape)
        assert tensor.kind.name == t.tensor_type.name
        assert tensor.data.tobytes() == t.data.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_the_smallest_file(tmp_path, version):
    values = np.arange(8, dtype="<f4")
    content = build([u32("a", 7)], [info("t", (4, 2))], values.tobytes(), version)
    file = read(tmp_path, content)
    assert file.metadata == {"a": 7}
    assert file.tensors["t"].shape == (2, 4)
    np.testing.assert_array_equal(file.tensors["t"].rows.view("<f4"), values.reshape(2, 4))


def test_every_kind_of_value(tmp_path):
    pairs = [
        pair("u8", 0, b"\xff"), pair("i8", 1, b"\xff"),
        pair("u16", 2, b"\xff\xff"), pair("i16", 3, b"\xff\xff"),
        pair("i32", 5, b"\xff" * 4), pair("u64", 10, b"\xff" * 8), pair("i64", 11, b"\xff" * 8),
        pair("f32", 6, struct.pack("<f", 0.5)), pair("f64", 12, struct.pack("<d", 0.1)),
        pair("yes", BOOL, b"\1"), pair("s", STRING, text("né")),
        pair("list", ARRAY, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        pair("flags", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\0\1"),
        pair("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
        pair("none", ARRAY, struct.pack("<IQ", F32, 0)),
    ]  # fmt: skip
    found = read(tmp_path, build(pairs)).metadata
    assert list(found.pop("words")) == ["a", ""]
    assert found == {
        "u8": 255, "i8": -1, "u16": 65535, "i16": -1, "i32": -1, "u64": 2**64 - 1, "i64": -1,
        "f32": 0.5, "f64": 0.1, "yes": True, "s": "né", "list": [1, -2, 3],
        "flags": [False, True], "none": [],
    }  # fmt: skip


def test_a_long_array_makes_no_object_per_element(tmp_path):
    n = 200_000
    scores = pair("scores", ARRAY, struct.pack("<IQ", F32, n) + bytes(4 * n))
    words = pair("words", ARRAY, struct.pack("<IQ", STRING, n) + text("ab") * n)
    found = read(tmp_path, build([scores, words])).metadata
    assert isinstance(found["scores"], np.ndarray) and len(found["scores"]) == n
    assert len(found["words"]) == n and found["words"]._decoded is None
    assert found["words"][n - 1] == "ab"


ONE = bytes(64)
BIG = 2**62
ALIGNED = [u32("general.alignment", 64)]

THREATS = {
    "wrong magic": (build(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (build(version=1), "version 1, this program reads"),
    "big-endian": (build(version=0x03000000), "big-endian"),
    "only magic": (b"GGUF", "version needs 4 bytes, 0 are left"),
    "tensor count of 2^62": (build(counts=(BIG, 0)), "tensor count .* more than a file"),
    "key count of 2^62": (build(counts=(0, BIG)), "metadata count .* more than a file"),
    "counts beyond the file": (build([u32("a", 1)], counts=(3, 1)), "more than a file of this"),
    "five dimensions": (build([], [info("t", (1,) * 5)], ONE), "5 dimensions, expected 1 to 4"),
    "2^32-1 dimensions": (
        build([], [info("t", (1,), n_dims=2**32 - 1)], ONE), "4294967295 dimensions"),
    "no dimensions": (build([], [info("t", (), n_dims=0)], bytes(99)), "0 dimensions"),
    "a dimension of 0": (build([], [info("t", (4, 0))], ONE), "each must be at least 1"),
    "product wraps 64 bits": (
        build([], [info("t", (2**32, 2**32, 4))], ONE), "ends at byte .*truncated"),
    "product wraps to a small size": (
        build([], [info("t", (2**40, 2**24))], ONE), "ends at byte .*truncated"),
    "dimension of 2^63": (build([], [info("t", (2**63,))], ONE), "each must be at least 1"),
    "unknown type": (build([], [info("t", (4,), kind=99)], ONE), "unknown type 99"),
    "removed type": (build([], [info("t", (32,), kind=4)], ONE), "unknown type 4"),
    "row not whole blocks": (build([], [info("t", (33,), kind=8)], ONE), "multiple of 32"),
    "offset beyond the file": (
        build([], [info("t", (4,), offset=2**40)], ONE), "ends at byte .*truncated"),
    "offset near 2^64": (
        build([], [info("t", (4,), offset=2**64 - 32)], ONE), "ends at byte .*truncated"),
    "offset not aligned": (build([], [info("t", (4,), offset=4)], ONE), "not a multiple of 32"),
    "overlap": (
        build([], [info("t", (16,)), info("u", (4,), offset=32)], ONE), "overlaps"),
    "duplicate tensor": (
        build([], [info("t", (4,)), info("t", (4,), offset=32)], ONE), "t appears twice"),
    "duplicate key": (build([u32("a", 1), u32("a", 2)]), "a appears twice"),
    "empty key": (build([u32("", 1)], [], bytes(99)), "has 0 bytes, expected 1 to"),
    "empty tensor name": (build([], [info("", (4,))], ONE), "has 0 bytes, expected 1 to 64"),
    "long tensor name": (build([], [info("n" * 65, (4,))], ONE), "has 65 bytes, expected 1 to 64"),
    "key length of 2^62": (
        build([struct.pack("<Q", BIG) + bytes(32)]), "key 0 has 4611686018427387904 bytes"),
    "string length of 2^62": (
        build([pair("a", STRING, struct.pack("<Q", BIG))]), "a has 4611686018427387904 bytes"),
    "string beyond the file": (
        build([pair("a", STRING, struct.pack("<Q", 9999))]), "needs 9999 bytes"),
    "string that is not UTF-8": (build([pair("a", STRING, text(b"\xff"))]), "a is not UTF-8"),
    "array of 2^62": (
        build([pair("a", ARRAY, struct.pack("<IQ", U32, BIG))]), "array of 4611686018427387904"),
    "array beyond the file": (
        build([pair("a", ARRAY, struct.pack("<IQ", U32, 10**6))]), "needs 4000000 bytes"),
    "strings of 2^62": (
        build([pair("a", ARRAY, struct.pack("<IQ", STRING, BIG))]), "array of 46116860184273"),
    "strings beyond the file": (
        build([pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, 10**6))]), "bytes are left|needs"),
    "more strings than bytes": (
        build([pair("a", ARRAY, struct.pack("<IQ", STRING, 3) + text("b"))], counts=(0, 1)),
        "truncated"),
    "nested arrays": (
        build([pair("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U32, 0))]), "nested arrays"),
    "unknown value type": (build([pair("a", 77, bytes(8))]), "a has unknown type 77"),
    "unknown element type": (
        build([pair("a", ARRAY, struct.pack("<IQ", 13, 1))]), "unknown type 13"),
    "a truth value of 2": (build([pair("a", BOOL, b"\2")]), "expected 0 or 1"),
    "truth values of 2": (
        build([pair("a", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\2")]), "other than 0 or 1"),
    "alignment 0": (build([u32("general.alignment", 0)]), "expected a power of two"),
    "alignment 48": (build([u32("general.alignment", 48)]), "expected a power of two"),
    "alignment 2^30": (build([u32("general.alignment", 2**30)]), "expected a power of two"),
    "alignment of a wrong type": (
        build([pair("general.alignment", U64, struct.pack("<Q", 32))]), "expected a power of two"),
    "alignment as text": (
        build([pair("general.alignment", STRING, text("32"))]), "expected a power of two"),
    "control characters in a name": (
        build([], [info("\x1b[31m\n", (4,), kind=99)], ONE), r"\\x1b\[31m"),
}  # fmt: skip


@pytest.mark.parametrize("name", THREATS)
def test_threats_are_refused_with_a_sentence(tmp_path, name):
    content, message = THREATS[name]
    with pytest.raises(CheckpointError, match=message) as refusal:
        read(tmp_path, content)
    assert str(refusal.value).isprintable() and "m.gguf" in str(refusal.value)


def test_an_alignment_of_64_is_followed(tmp_path):
    content = build(ALIGNED, [info("t", (1,)), info("u", (1,), offset=64)], bytes(68), align=64)
    assert read(tmp_path, content).tensors["u"].data.size == 4


def test_each_truncation_of_a_file_is_refused(made, tmp_path):
    """Cut anywhere, in the header or in the data: refused at opening, with the arithmetic."""
    content = made("micro", "q8_0").read_bytes()
    cut = tmp_path / "m.gguf"
    for n in [1, 3, 7, 23, 24, 100, 3000, 9000, len(content) // 2, len(content) - 64]:
        cut.write_bytes(content[:n])
        with pytest.raises(CheckpointError, match=r"left|more than a file|ends at byte|begins"):
            open_gguf(cut)

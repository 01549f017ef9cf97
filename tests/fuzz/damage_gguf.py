"""Structure-aware damage to GGUF files: header fields, keys, tensor descriptions, weights."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from damage import damaged_bytes, near, number, scrambled

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """Where things lie in a GGUF header: fields (what, start, size), and spans of whole keys and
    of whole tensor descriptions."""

    fields: tuple[tuple[str, int, int], ...]
    keys: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[int, int], ...]
    end: int


@lru_cache(maxsize=64)
def gguf_header(data: bytes) -> Header:
    """Walk a header that is still whole enough.

    Raises:
        struct.error, IndexError: it is not.
    """
    fields: list[tuple[str, int, int]] = [("magic", 0, 4), ("version", 4, 4)]
    fields += [("tensor count", 8, 8), ("key count", 16, 8)]
    at = 24

    def take(what: str, size: int) -> int:
        nonlocal at
        fields.append((what, at, size))
        (value,) = struct.unpack_from({1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[size], data, at)
        at += size
        return int(value)

    def text(what: str) -> None:
        nonlocal at
        n = take(f"length of {what}", 8)
        if n > len(data) - at:
            raise IndexError
        fields.append((what, at, n))
        at += n

    def value(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text("string")
        elif kind == _ARRAY:
            element, n = take("element type", 4), take("array length", 8)
            if element == _STRING:
                for i in range(n):
                    if i < 3:
                        text("string")
                        continue
                    (size,) = struct.unpack_from("<Q", data, at)
                    at += 8 + size
            else:
                at += n * _SIZES[element]
                fields.append(("array", at - n * _SIZES[element], min(n * _SIZES[element], 4096)))
        else:
            take("value", _SIZES[kind])

    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    keys, tensors = [], []
    for _ in range(n_keys):
        start = at
        text("key")
        value(take("value type", 4))
        keys.append((start, at))
    for _ in range(n_tensors):
        start = at
        text("tensor name")
        for _ in range(take("dimensions", 4)):
            take("dimension", 8)
        take("tensor type", 4)
        take("offset", 8)
        tensors.append((start, at))
    return Header(tuple(fields), tuple(keys), tuple(tensors), at)


def damaged_gguf(data: bytes, rng: random.Random) -> bytes:
    """A change of one header field, key or tensor description, or of the tensors' bytes."""
    header = gguf_header(data)
    change = rng.choice((_gguf_field, _gguf_field, _gguf_field, _gguf_keys, _gguf_new_key,
                         _gguf_tensors, _gguf_shape, _gguf_string, _tail))  # fmt: skip
    return change(data, header, rng)


def _gguf_field(data: bytes, header: Header, rng: random.Random) -> bytes:
    kinds = sorted({what for what, _, _ in header.fields})
    chosen = rng.choice(kinds)
    _, start, size = rng.choice([f for f in header.fields if f[0] == chosen])
    if not size:
        return damaged_bytes(data, rng)
    if chosen in ("tensor type", "value type", "element type"):
        new = rng.randrange(45).to_bytes(4, "little")
    elif size in (1, 2, 4, 8):
        new = near(int.from_bytes(data[start : start + size], "little"), size, rng)
    else:
        start += rng.randrange(size)
        new = rng.choice((rng.randbytes(1), number(rng, 4), b"\x1b", b"\n", b"\xff"))
    return data[:start] + new + data[start + len(new) :]


def _respliced(data: bytes, header: Header, start: int, stop: int, new: bytes, where: int,
               change: int) -> bytes:  # fmt: skip
    """Other bytes in the header, the count at `where` changed, tensor data aligned again."""
    body = data[-(-header.end // 32) * 32 :]
    head = bytearray(data[:start] + new + data[stop : header.end])
    count = int.from_bytes(head[where : where + 8], "little") + change
    head[where : where + 8] = (count & 2**64 - 1).to_bytes(8, "little")
    return bytes(head) + bytes(-len(head) % 32) + body


def _spans(data: bytes, header: Header, rng: random.Random, spans: Any, where: int) -> bytes:
    start, stop = rng.choice(spans)
    fixed = rng.random() < 0.8
    kind = rng.randrange(3)
    if kind == 0:
        return _respliced(data, header, start, stop, b"", where, -fixed)
    if kind == 1:
        twice = data[start:stop] * 2
        return _respliced(data, header, start, stop, twice, where, int(fixed))
    other = rng.choice(spans)
    return _respliced(data, header, start, stop, data[other[0] : other[1]], where, 0)


def _gguf_keys(data: bytes, header: Header, rng: random.Random) -> bytes:
    return _spans(data, header, rng, header.keys, 16)


def _gguf_tensors(data: bytes, header: Header, rng: random.Random) -> bytes:
    return _spans(data, header, rng, header.tensors, 8)


def _gguf_new_key(data: bytes, header: Header, rng: random.Random) -> bytes:
    """The value of a key replaced by another of any type, well formed."""
    start, stop = rng.choice(header.keys)
    n = int.from_bytes(data[start : start + 8], "little")
    key = data[start : start + 8 + n]
    if rng.random() < 0.1:
        name = rng.choice((b"general.alignment", b"split.count", b"split.no", b"", b"\xff", b"a\nb",
                           b"step35.nextn_predict_layers", b"tokenizer.ggml.pre"))  # fmt: skip
        key = len(name).to_bytes(8, "little") + name
    return _respliced(data, header, start, stop, key + _gguf_value(rng), 16, 0)


def _gguf_value(rng: random.Random) -> bytes:
    kind = rng.choice((*_SIZES, _STRING, _STRING, _ARRAY, _ARRAY))
    if kind == _STRING:
        text = rng.choice(("", "step35", "gpt2", "é\n", "x" * 300)).encode()
        return struct.pack("<IQ", kind, len(text)) + text
    if kind == _ARRAY:
        element, n = rng.choice((4, 5, 6, 7, 8, 10)), rng.choice((0, 1, 3, 48, 5000))
        if element == _STRING:
            return struct.pack("<IIQ", kind, element, n) + struct.pack("<Q", 1) * 0 + (
                b"\1\0\0\0\0\0\0\0a" * n)  # fmt: skip
        item = number(rng, _SIZES[element])
        return struct.pack("<IIQ", kind, element, n) + item * n
    return struct.pack("<I", kind) + number(rng, _SIZES[kind])


def _gguf_shape(data: bytes, header: Header, rng: random.Random) -> bytes:
    """Another shape with the same number of values, or another type of the same size."""
    start, stop = rng.choice(header.tensors)
    n = int.from_bytes(data[start : start + 8], "little")
    at = start + 8 + n
    count = int.from_bytes(data[at : at + 4], "little")
    dims = [int.from_bytes(data[at + 4 + 8 * i : at + 12 + 8 * i], "little") for i in range(count)]
    kind = rng.randrange(4)
    if kind == 0:
        rng.shuffle(dims)
    elif kind == 1 and count > 1:
        dims[0], dims[1] = dims[0] * 2, max(1, dims[1] // 2)
    elif kind == 2:
        dims = [*dims, 1][:5]
    else:
        dims = [1 << 32, 1 << 32, max(dims)]
    new = data[start:at] + len(dims).to_bytes(4, "little")
    new += b"".join((d & 2**64 - 1).to_bytes(8, "little") for d in dims)
    return _respliced(data, header, start, stop, new + data[at + 4 + 8 * count : stop], 8, 0)


def _gguf_string(data: bytes, header: Header, rng: random.Random) -> bytes:
    """A string or name of another length, its length right."""
    texts = [f for f in header.fields if f[0] in ("key", "string", "tensor name")]
    _, start, size = rng.choice(texts)
    old = data[start : start + size]
    new = rng.choice((b"", old * 2, old[:-1], old + b"\n", b"\xff" + old, rng.randbytes(40),
                      b"A" * 70, "\u202e".encode() + old, b"[" * 5000))  # fmt: skip
    new = len(new).to_bytes(8, "little") + new
    return _respliced(data, header, start - 8, start + size, new, 8, 0)


def _tail(data: bytes, header: Header, rng: random.Random) -> bytes:
    return data[: header.end] + scrambled(data[header.end :], rng)

"""Damage that knows no structure, and numbers and bytes that readers stumble over."""

from __future__ import annotations

import random

Files = dict[str, bytes]
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 48, 63, 64, 100, 127, 128, 255, 256, 65535, 65536,
    2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**53, 2**56, 2**62,
    2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, overwrites, cuts and insertions that know no structure."""
    out = bytearray(data)
    n = len(out)
    at = rng.randrange(min(n, 4096) if rng.random() < 0.7 else n) if n else 0
    kind = rng.randrange(7)
    if kind == 0 and n:
        for _ in range(rng.choice((1, 1, 2, 8))):
            out[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        size = rng.choice((1, 2, 4, 8))
        out[at : at + size] = number(rng, size)
    elif kind == 2:
        del out[rng.randrange(n + 1) :]
    elif kind == 3:
        del out[at : at + rng.randrange(1, 64)]
    elif kind == 4:
        out[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == 5:
        out[at:at] = out[at : at + rng.randrange(1, 256)]
    else:
        out += rng.randbytes(rng.choice((1, 32, 4096)))
    return bytes(out)


def number(rng: random.Random, size: int) -> bytes:
    return (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")


def near(value: int, size: int, rng: random.Random) -> bytes:
    """A number related to the one that is there, or one of `NUMBERS`."""
    if rng.random() < 0.4:
        return number(rng, size)
    change = rng.choice((1, -1, 2, -2, 32, -32, value, -value, value // 2 - value, 255))
    return (value + change & (1 << 8 * size) - 1).to_bytes(size, "little")


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Weights or rows that are infinite, not numbers, huge or random."""
    out = bytearray(data)
    if not out:
        return data
    start = rng.randrange(len(out))
    size = min(len(out) - start, rng.choice((2, 64, 4096, 1 << 20)))
    fill = rng.choice((b"\xff", b"\x7f", b"\x00", b"\x80", b"\x7c", b""))
    out[start : start + size] = fill * size if fill else rng.randbytes(size)
    return bytes(out)

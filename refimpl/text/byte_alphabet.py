"""The byte alphabet of GPT-2's byte-level BPE: one printable character for each byte.

Source: GPT-2's `bytes_to_unicode`; the printable Latin-1 bytes stand for themselves, the others
follow from U+0100 in order.
"""

from __future__ import annotations


def _alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return dict(sorted(table.items()))


CHAR_OF_BYTE = _alphabet()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token in the byte alphabet stands for; None if it is not in it."""
    try:
        return bytes(BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return None

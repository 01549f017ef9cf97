"""Each block format decoded one value at a time from its definition, against the decoder in use.

Definitions: the block structures of ggml-common.h in llama.cpp.
Written out here with Python integers, so that a decoder is not its own judge.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import IQ3_XXS, dequantize

from refimpl.checkpoint.block_scales import SCALE_FIELDS
from refimpl.checkpoint.block_types import block_type, decode

Values = list[float]
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ3_XXS_GRID_SHA256 = (
    "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d"  # of ggml-common.h
)


def half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """6-bit scale and minimum of sub-block j of eight, in 12 bytes (Q4_K, Q5_K)."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    low = packed[j + 4]
    return low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4


def q4_k(b: bytes) -> Values:
    """fp16 d, fp16 dmin, 12 B scales, 128 B codes; 64 values share 32 bytes, low nibbles first."""
    d, dmin, out = half(b, 0), half(b, 2), []
    for i in range(256):
        scale, minimum = scale_and_minimum(b[4:16], i // 32)
        byte = b[16 + i // 64 * 32 + i % 32]
        code = byte >> 4 if i % 64 >= 32 else byte & 15
        out.append(d * scale * code - dmin * minimum)
    return out


def q5_k(b: bytes) -> Values:
    """As Q4_K, with a fifth bit: bit i div 32 of byte i mod 32 of the 32 B before the codes."""
    d, dmin, out = half(b, 0), half(b, 2), []
    for i in range(256):
        scale, minimum = scale_and_minimum(b[4:16], i // 32)
        byte = b[48 + i // 64 * 32 + i % 32]
        code = byte >> 4 if i % 64 >= 32 else byte & 15
        code |= (b[16 + i % 32] >> i // 32 & 1) << 4
        out.append(d * scale * code - dmin * minimum)
    return out


def q6_k(b: bytes) -> Values:
    """128 B low nibbles, 64 B high pairs of bits, 16 int8 scales, fp16 d; halves of 128 values."""
    d, out = half(b, 208), []
    for i in range(256):
        n, k, lane = i // 128, i % 128 // 32, i % 32
        byte = b[64 * n + 32 * (k % 2) + lane]
        low = byte >> 4 if k >= 2 else byte & 15
        high = b[128 + 32 * n + lane] >> 2 * k & 3
        scale = struct.unpack_from("b", b, 192 + i // 16)[0]
        out.append(d * scale * ((low | high << 4) - 32))
    return out


def q3_k(b: bytes) -> Values:
    """32 B inverted third bits, 64 B pairs of bits, 12 B of 16 6-bit scales less 32, fp16 d."""
    d, out = half(b, 108), []
    for i in range(256):
        n, k, lane, j = i // 128, i % 128 // 32, i % 32, i // 16
        low = b[96 + j % 8] >> 4 if j >= 8 else b[96 + j % 8] & 15
        scale = (low | (b[104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
        code = b[32 + 32 * n + lane] >> 2 * k & 3
        code -= 0 if b[lane] >> (4 * n + k) & 1 else 4
        out.append(d * scale * code)
    return out


def iq4_nl(b: bytes) -> Values:
    """fp16 d, 16 B codes into a table of 16 values; low nibbles are the first half."""
    d = half(b, 0)
    return [d * IQ4[b[2 + i % 16] >> 4 if i >= 16 else b[2 + i % 16] & 15] for i in range(32)]


def iq4_xs(b: bytes) -> Values:
    """fp16 d, u16 high pairs and 4 B low nibbles of eight 6-bit scales less 32, 128 B codes."""
    d, high, out = half(b, 0), struct.unpack_from("<H", b, 2)[0], []
    for i in range(256):
        j = i // 32
        low = b[4 + j // 2] >> 4 if j % 2 else b[4 + j // 2] & 15
        byte = b[8 + 16 * j + i % 16]
        code = byte >> 4 if i % 32 >= 16 else byte & 15
        out.append(d * ((low | (high >> 2 * j & 3) << 4) - 32) * IQ4[code])
    return out


def grid() -> np.ndarray:
    """The 256 quadruples of magnitudes of IQ3_XXS (256, 4), known by their digest."""
    IQ3_XXS.init_grid()
    table = IQ3_XXS.grid.reshape(256, 4).astype(np.uint8)
    assert hashlib.sha256(table.tobytes()).hexdigest() == IQ3_XXS_GRID_SHA256
    return table


def iq3_xxs(b: bytes) -> Values:
    """fp16 d, 64 B indices of quadruples, then per 32 values four 7-bit sign sets and a 4-bit
    scale; the eighth sign of a set makes the number of minus signs even."""
    d, table, out = half(b, 0), grid(), []
    for i in range(256):
        j, lane = i // 32, i % 8
        word = struct.unpack_from("<I", b, 66 + 4 * j)[0]
        signs = word >> 7 * (i % 32 // 8) & 127
        signs |= (signs.bit_count() & 1) << 7
        value = d * (0.5 + (word >> 28)) * 0.5 * float(table[b[2 + i // 4], i % 4])
        out.append(-value if signs >> lane & 1 else value)
    return out


DEFINITIONS: dict[str, Callable[[bytes], Values]] = {
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "Q3_K": q3_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "IQ3_XXS": iq3_xxs,
}


def random_rows(name: str, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """Random codes under random finite scales, (rows, blocks x block_bytes)."""
    kind, rng = block_type(name), np.random.default_rng(6)
    data = rng.integers(0, 256, (rows * blocks, kind.block_bytes), dtype=np.uint8)
    for place in SCALE_FIELDS[name]:
        scales = rng.uniform(0.01, 2, rows * blocks).astype("<f2")
        data[:, place.offset : place.offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_decoder_follows_the_definition(name: str) -> None:
    kind, rows = block_type(name), random_rows(name)
    found = decode(kind, rows).astype(np.float64)
    expected = [
        [v for at in range(0, len(row), kind.block_bytes)
         for v in DEFINITIONS[name](row[at : at + kind.block_bytes].tobytes())]
        for row in rows
    ]  # fmt: skip
    assert found.shape == (3, 2 * kind.block_values)
    # float32 against exact products: at most three roundings
    np.testing.assert_allclose(found, expected, rtol=4e-7, atol=4e-7 * np.abs(found).max())


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_decoder_gives_what_the_gguf_package_gives(name: str) -> None:
    kind, rows = block_type(name), random_rows(name)
    expected = dequantize(rows, GGMLQuantizationType[name])
    np.testing.assert_array_equal(decode(kind, rows), expected)
    np.testing.assert_array_equal(decode(kind, rows[1:2]), expected[1:2])  # any slice of rows


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_bit_of_a_block_counts(name: str) -> None:
    """No bit of a block is ignored, scales aside: a flip changes at least one value."""
    kind = block_type(name)
    row = random_rows(name, 1, 1)
    scales = {p.offset + k for p in SCALE_FIELDS[name] for k in (0, 1)}
    before = decode(kind, row)
    for byte in (b for b in range(kind.block_bytes) if b not in scales):
        for bit in range(8):
            flipped = row.copy()
            flipped[0, byte] ^= 1 << bit
            assert not np.array_equal(decode(kind, flipped), before), (byte, bit)

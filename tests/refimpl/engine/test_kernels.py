"""Matrix kernels against float64 products with the `gguf` package's dequantised values."""

from collections.abc import Callable

import numpy as np
import pytest

from refimpl.engine.activations import (
    FLOAT,
    form_bytes,
    form_of,
    prepare,
    scratch_bytes,
)
from refimpl.engine.formats import FORMATS
from refimpl.engine.kernels import PLAIN, kernel
from refimpl.engine.memory import address, zeroed
from refimpl.engine.simd import available, choose_simd

Rows = Callable[[str, int, int], tuple[np.ndarray, np.ndarray]]
BLOCKS = [name for name in FORMATS if name not in PLAIN]
INTEGER = [name for name in available() if name != "portable"]
COLUMNS = 1280  # as in the published model's expert down projections
NARROW = 96  # three blocks of 32: no whole step of the wide kernels


def blobs(x: np.ndarray, form: int, simd_name: str) -> list[np.ndarray]:
    """Activation rows (M, n) in a form, as `refimpl.engine.records` lays them out."""
    n = x.shape[1]
    at = form_bytes(FLOAT, n)
    made = []
    for row in x:
        blob = zeroed(at + form_bytes(form, n))
        blob[: 4 * n] = np.ascontiguousarray(row, np.float32).view(np.uint8)
        if form != FLOAT:
            plan = np.array([1, 1, form, at], dtype=np.int64)
            scratch = zeroed(scratch_bytes(n))
            function = prepare(choose_simd(simd_name)).ctypes
            function(address(blob), n, address(plan), 0, address(scratch))
            blob = blob[at:]
        made.append(blob)
    return made


def products(name: str, data: np.ndarray, x: np.ndarray, simd_name: str, exact: bool) -> np.ndarray:
    """The kernel's results (M, rows) for M = 1, 2 or 4 activation rows."""
    simd, count = choose_simd(simd_name), len(x)
    form = form_of(simd, FORMATS[name], exact)
    kept = blobs(x, form, simd_name)
    kept += [kept[-1]] * (4 - count)
    out = np.full((4, len(data)), np.nan, dtype=np.float32)
    function = kernel(simd, name, count, exact).ctypes
    function(address(data), data.shape[1], len(data), x.shape[1],
             *(address(b) for b in kept), *(address(y) for y in out), 0)  # fmt: skip
    return out[:count]


def check(stored_rows: Rows, name: str, columns: int, simd: str, exact: bool) -> np.ndarray:
    """Relative rms error; also that a row has the same bits alone and among four."""
    data, values = stored_rows(name, 7, columns)
    x = np.random.default_rng(5).standard_normal((4, columns)).astype(np.float32)
    four = products(name, data, x, simd, exact)
    for m in range(4):
        np.testing.assert_array_equal(products(name, data, x[m : m + 1], simd, exact)[0], four[m])
    expected = x.astype(np.float64) @ values.T
    return np.sqrt(np.mean((four - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("name", FORMATS)
def test_float_kernels_round_only_in_float32(stored_rows: Rows, name: str) -> None:
    """The arithmetic of `exact` and of machines without integer kernels."""
    assert check(stored_rows, name, COLUMNS, "portable", exact=True) < 5e-7


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("simd", INTEGER)
def test_integer_kernels_differ_by_the_rounding_of_activations(
    stored_rows: Rows, name: str, simd: str
) -> None:
    """Codes of +-127 over the largest of 32 normal values: a step of about 2/127, uniform
    rounding error of step / sqrt(12), which is 0.5 %; a wrong scale or order gives 100 %."""
    assert check(stored_rows, name, COLUMNS, simd, exact=False) < 8e-3


@pytest.mark.parametrize("name", [n for n in BLOCKS if FORMATS[n].block_values == 32])
@pytest.mark.parametrize("simd", INTEGER)
def test_rows_that_do_not_fill_a_step(stored_rows: Rows, name: str, simd: str) -> None:
    assert check(stored_rows, name, NARROW, simd, exact=False) < 1.2e-2


@pytest.mark.parametrize(
    "name", [n for n in BLOCKS if FORMATS[n].kind512[:5] != "super"] + ["Q4_K", "Q6_K"]
)
def test_rows_whose_activations_are_done_piece_by_piece(stored_rows: Rows, name: str) -> None:
    """As long as the widest of the published model, and a part of a step."""
    rest = 96 if FORMATS[name].block_values == 32 else 256
    assert check(stored_rows, name, 12288 + rest, INTEGER[0], exact=False) < 8e-3


@pytest.mark.parametrize("simd", INTEGER)
def test_two_rows_equal_each_alone(stored_rows: Rows, simd: str) -> None:
    data, _ = stored_rows("Q8_0", 7, COLUMNS)
    x = np.random.default_rng(5).standard_normal((2, COLUMNS)).astype(np.float32)
    two = products("Q8_0", data, x, simd, exact=False)
    alone = [products("Q8_0", data, x[m : m + 1], simd, exact=False)[0] for m in range(2)]
    np.testing.assert_array_equal(two, np.stack(alone))


@pytest.mark.parametrize("simd", INTEGER)
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_NL"])
def test_extreme_codes_do_not_saturate(stored_rows: Rows, simd: str, name: str) -> None:
    """All codes and activations at their ends: sums of byte products at their largest."""
    data, _ = stored_rows(name, 1, 256)
    fmt = FORMATS[name]
    ends = data.reshape(-1, fmt.block_bytes)
    scales = {"Q8_0": slice(0, 2), "IQ4_NL": slice(0, 2), "Q6_K": slice(208, 210)}[name]
    kept = ends[:, scales].copy()
    ends[:] = 0x80 if name == "Q8_0" else 0x00
    ends[:, scales] = kept
    if name == "Q6_K":
        ends[:, 192:208] = 0x7F
    from gguf import GGMLQuantizationType, quants

    values = quants.dequantize(data, GGMLQuantizationType[name]).astype(np.float64)
    x = np.ones((1, 256), dtype=np.float32)
    got = products(name, data, x, simd, exact=False)
    np.testing.assert_allclose(got[0], values.sum(axis=1), rtol=1e-5)


def test_zero_activations_give_zero(stored_rows: Rows) -> None:
    data, _ = stored_rows("Q4_0", 7, COLUMNS)
    x = np.zeros((1, COLUMNS), dtype=np.float32)
    for simd in available():
        assert not products("Q4_0", data, x, simd, exact=False).any()

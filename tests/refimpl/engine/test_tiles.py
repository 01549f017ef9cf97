"""Products of unpacked weights with many rows of activations, against float64."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tile_products import error, products

from refimpl.engine.formats import FORMATS
from refimpl.engine.kernels import PLAIN
from refimpl.engine.simd import available, choose_simd
from refimpl.engine.tiles import tiling

Rows = Callable[[str, int, int], tuple[np.ndarray, np.ndarray]]
BLOCKS = [name for name in FORMATS if name not in PLAIN]
SETS = {name: choose_simd(name) for name in available()}
if "avx2" in SETS:
    SETS["avx2 without VNNI"] = replace(SETS["avx2"], dot="")
INTEGER = [name for name, simd in SETS.items() if simd.integer]
COLUMNS = 1280
INT8_ERROR, BF16_ERROR, FLOAT_ERROR = 8e-3, 2.5e-3, 5e-7


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("simd", INTEGER)
def test_integer_products_differ_by_the_rounding_of_activations(
    stored_rows: Rows, name: str, simd: str
) -> None:
    made = tiling(SETS[simd], name, exact=False)
    assert error(made, SETS[simd], stored_rows(name, 32, COLUMNS), 9) < INT8_ERROR


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("simd", SETS)
def test_exact_products_round_only_in_float32(stored_rows: Rows, name: str, simd: str) -> None:
    made = tiling(SETS[simd], name, exact=True)
    assert error(made, SETS[simd], stored_rows(name, 32, COLUMNS), 9) < FLOAT_ERROR


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("simd", SETS)
def test_plain_types_round_at_most_activations_to_bfloat16(
    stored_rows: Rows, name: str, simd: str
) -> None:
    made = tiling(SETS[simd], name, exact=False)
    most = BF16_ERROR if name == "BF16" else FLOAT_ERROR
    assert error(made, SETS[simd], stored_rows(name, 32, COLUMNS), 9) < most


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11, 16, 17])
@pytest.mark.parametrize("simd", SETS)
def test_any_number_of_rows_of_activations(stored_rows: Rows, simd: str, count: int) -> None:
    made = tiling(SETS[simd], "Q4_0", exact=False)
    assert error(made, SETS[simd], stored_rows("Q4_0", 16, 96), count) < 1.2e-2


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("simd", SETS)
def test_long_rows_are_unpacked_piece_by_piece(stored_rows: Rows, simd: str, name: str) -> None:
    made = replace(tiling(SETS[simd], name, exact=False), columns=512)
    assert error(made, SETS[simd], stored_rows(name, 16, COLUMNS), 9) < INT8_ERROR


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_NL", "Q5_K", "Q4_0"])
@pytest.mark.parametrize("simd", INTEGER)
def test_extreme_codes_do_not_saturate(stored_rows: Rows, simd: str, name: str) -> None:
    """All codes and activations at their ends, in both directions."""
    from gguf import GGMLQuantizationType, quants

    data, _ = stored_rows(name, 16, 256)
    fmt = FORMATS[name]
    for byte in (0x00, 0x80, 0x7F, 0xFF):
        ends = data.copy().reshape(-1, fmt.block_bytes)
        scales = {"Q6_K": slice(208, 210), "Q5_K": slice(0, 16)}.get(name, slice(0, 2))
        kept = ends[:, scales].copy()
        ends[:] = byte
        ends[:, scales] = kept
        if name == "Q6_K":
            ends[:, 192:208] = 0x7F
        rows = ends.reshape(data.shape)
        values = quants.dequantize(rows, GGMLQuantizationType[name]).astype(np.float64)
        made = tiling(SETS[simd], name, exact=False)
        for sign in (1, -1):
            x = np.full((2, 256), sign, dtype=np.float32)
            got = products(made, SETS[simd], rows, x)
            expected = x.astype(np.float64) @ values.T
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_products_are_found_compiled_on_disk(stored_rows: Rows) -> None:
    """Numba's name for a compiled function on disk depends on what the function encloses; that
    must be the same in every process."""
    from numba.core.serialize import dumps

    from refimpl.engine.tiles import Unpacking
    from refimpl.engine.tiles_products import Product

    simd = choose_simd()
    for enclosed in (Product("floats", simd, 8), Unpacking("floats", simd, FORMATS["F32"])):
        assert dumps(enclosed) == dumps(replace(enclosed))
    for made in (tiling(simd, name, exact=False) for name in ("Q4_0", "F32")):
        for function in (made.unpack, made.multiply):
            cells = [cell.cell_contents for cell in function._pyfunc.__closure__]
            kinds = {type(cell).__name__ for cell in cells}
            assert kinds <= {"Product", "Unpacking", "int", "bool"}

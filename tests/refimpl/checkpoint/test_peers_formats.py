"""Quantised folders that other programs wrote, against what these programs make of them.

The folders and golden files are those of `tests/golden/make_fp8.py` and `make_mlx_quantised.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.inventory import inventory

GOLDEN = Path(__file__).parents[2] / "golden"


def test_fp8_values_are_those_of_transformers() -> None:
    source = open_checkpoint(GOLDEN / "fp8")
    compared = 0
    with np.load(GOLDEN / "fp8_transformers.npz") as theirs:
        for spec in inventory(source.config):
            if spec.hf_name in theirs:
                found = source.stored(spec.key, spec.layer).values(0, 10**6)
                np.testing.assert_array_equal(found.reshape(spec.shape), theirs[spec.hf_name])
                compared += 1
    assert compared == 3


def test_the_fp8_folder_is_whole() -> None:
    found = inspect(GOLDEN / "fp8", check=True)
    assert found.problems == ()
    assert found.listing.unexpected == ()
    assert found.types["F8_E4M3"] == (3, 3 * 4 * 64 * 64)

"""Quantised folders that other programs wrote, against what these programs make of them.

The folders and golden files are those of `make_fp8.py`, `make_fp8_converter.py` and
`make_mlx_quantised.py` in tests/golden.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from refimpl.backends import open_backend
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.mlx import Affine, GroupScales, mlx_name
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
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


def test_mlx_values_are_those_of_mlx_bit_for_bit() -> None:
    source = open_checkpoint(GOLDEN / "mlx4")
    with np.load(GOLDEN / "mlx4_mlx.npz") as theirs:
        digests = json.loads(str(theirs["meta"]))["sha256"]
    found = {}
    for spec in inventory(source.config):
        stored = source.stored(spec.key, spec.layer)
        if stored.scales is not None:
            values = np.ascontiguousarray(stored.values(0, 10**6), "<f4")
            found[mlx_name(spec)] = hashlib.sha256(values.tobytes()).hexdigest()
    assert found == digests
    assert len(found) == 22


def test_logits_over_a_quantised_folder_are_those_of_mlx_lm() -> None:
    """Float32 against float32: names, norms as 1 + w, the 8-bit router and every group count."""
    model = open_backend(open_checkpoint(GOLDEN / "mlx4"), dtype="float32")
    with np.load(GOLDEN / "mlx4_mlx.npz") as theirs:
        ids, expected = theirs["prompt"].tolist(), theirs["logits"]
    logits = model.prefill(ids, model.new_cache(len(ids)), all_logits=True).logits
    assert expected.shape == (70, 128)
    assert np.abs(logits - expected).max() <= 5e-5 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_of_mlx_is_decoded(bits: int, group: int) -> None:
    with np.load(GOLDEN / "mlx_bits.npz") as theirs:
        packed, scales, biases, values = (
            theirs[f"{bits}_{group}_{name}"] for name in ("packed", "scales", "biases", "values")
        )
    form = Affine(bits, group)
    assert packed.shape == (4, form.words(256))
    rows = packed.astype("<u4").view(np.uint8)
    found = GroupScales(form, scales, biases).decode(rows, np.arange(4))
    np.testing.assert_array_equal(found, values)


def test_fp8_values_are_those_of_the_converter_of_llama_cpp(tmp_path: Path) -> None:
    """It reads the folder that this project writes, and every tensor of its file has our bytes."""
    theirs = json.loads((GOLDEN / "fp8_converter.json").read_text())
    folder = synthesize(PRESETS[theirs["preset"]](), theirs["seed"], tmp_path / "m", "fp8")
    convert(folder, tmp_path / "m.gguf", "f32")
    ours = {
        t.name: [t.kind.name, list(t.dims), hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
        for t in read_gguf(tmp_path / "m.gguf").tensors.values()
    }
    assert ours == {name: rest for name, *rest in theirs["tensors"]}
    assert len(ours) == 198

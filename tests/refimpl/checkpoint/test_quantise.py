"""Quantised types: layout, error against llama-quantize's, and the mixtures it would choose.

The record tests/golden/quantize.json was made by llama.cpp's own program (make_quantize.py).
"""

import json
import shutil
from pathlib import Path

import convert_speed
import numba
import numpy as np
import perplexity_llamacpp
import pytest
import quantize_report
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as library_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_shared import CONFIGS, MINI, RECORD, SEED, compact, heavy_chunks, rms, wide

from refimpl.checkpoint.block_types import block_type, encode
from refimpl.checkpoint.mixtures import MIXTURES, mixture
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.quantise import LARGEST, numerics, quantise
from refimpl.checkpoint.synth import PRESETS, random_weights
from refimpl.errors import CheckpointError
from refimpl.inventory import gguf_inventory

SEARCHED = ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
SIMPLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
GOLDEN = json.loads(RECORD.read_text())
ALLOWED = 1.02


def decoded(name, rows):
    return dequantize(quantise(name, rows), GGMLQuantizationType[name])


def gaussian(rows=64, values=512, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, values), np.float32) * 0.02


@pytest.fixture(scope="module")
def tensor():
    """tensor(source, name): the values that the record's errors are about, (rows, n) float32."""
    cache = {}

    def weights(source):
        if source == "mini":
            checkpoint = open_checkpoint(MINI)
            return {
                spec.gguf_name: checkpoint.stored(spec.key, spec.layer)
                for spec in gguf_inventory(checkpoint.config)
                if spec.key != "rope_freqs"
            }
        config = PRESETS[source]() if source in PRESETS else wide()
        specs = [s for s in gguf_inventory(config) if s.key != "rope_freqs"]
        if source == "heavy":
            return {s.gguf_name: heavy_chunks(s) for s in specs}
        values = random_weights(config, SEED)
        return {s.gguf_name: values[s.hf_name] for s in specs}

    def get(source, name):
        if source not in cache:
            cache[source] = weights(source)
        found = cache[source][name]
        if source == "mini":
            return found.values(0, found.rows.shape[0]).astype(np.float32)
        if source == "heavy":
            found = np.concatenate(list(found))
        return found.reshape(-1, found.shape[-1])

    return get


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", [k for k in MIXTURES if k not in ("f32", "f16", "bf16")])
def test_every_tensor_gets_the_type_that_llama_quantize_chooses(name, kind):
    """The published model with and without its MTP layers among them."""
    config = CONFIGS[name]()
    type_of = mixture(kind, config)
    types = {spec.gguf_name: type_of(spec) for spec in gguf_inventory(config)}
    assert compact(types) == GOLDEN["types"][name][kind]


def test_files_have_the_keys_of_those_of_llama_quantize():
    """What the script found in pairs of files: keys, names, shapes and types are all equal."""
    assert GOLDEN["keys"]["files"] >= 10 and GOLDEN["keys"]["different"] == []


@pytest.mark.parametrize("kind", [k for k in MIXTURES if k not in ("f16", "bf16")])
def test_files_of_every_type_have_run_in_llama_cpp(kind):
    """The script's record for the embedded model: llama.cpp chooses the reference's token on the
    same file, but for what activations of 8 bits cost; from F32 always."""
    row = GOLDEN["running"][kind]
    assert row["rows"] > 1000
    exact = kind == "f32"
    for pair in ("llama.cpp / reference", "llama.cpp / engine", "engine / reference"):
        agreement, error = row[pair]
        assert agreement == 1.0 if exact else agreement > 0.96, pair
        assert error < (0.01 if exact else 0.15), pair
    assert row["reference / source"][0] > 0.9


@pytest.mark.parametrize("source", GOLDEN["errors"])
def test_errors_are_at_most_1_02_of_llama_quantizes(tensor, source):
    """On its own tensors, type by type; no importance matrix on either side."""
    for kind, row in GOLDEN["errors"][source].items():
        assert row["rms"][1] <= ALLOWED * row["rms"][0] and row["worst_ratio"] <= ALLOWED
        for name, (theirs, ours) in row["some"].items():
            x = tensor(source, name)
            error = rms(decoded(kind, x) - x)
            assert error <= ALLOWED * theirs, (kind, name)
            assert error == pytest.approx(ours, rel=1e-3), (kind, name)
        if source == "heavy":
            break  # its values are drawn once; one type tells


@pytest.mark.parametrize("name", SIMPLE)
def test_simple_types_are_those_of_the_gguf_package_bit_for_bit(name):
    x = gaussian()
    integers = np.random.default_rng(1).integers(-20, 20, (16, 256)).astype(np.float32)
    for rows in (x, abs(x), integers, np.zeros((2, 64), np.float32), -np.ones((1, 32), np.float32)):
        expected = library_quantize(rows, GGMLQuantizationType[name])
        np.testing.assert_array_equal(quantise(name, rows), expected)


@pytest.mark.parametrize("name", [*SEARCHED, *SIMPLE])
def test_a_block_depends_on_its_own_values_alone(name):
    """Alone, first, last, or among others: the same bytes."""
    size = block_type(name).block_values
    x = gaussian(1, 70 * size, seed=3)
    whole = quantise(name, x).reshape(70, -1)
    for i in (0, 1, 7, 33, 69):
        np.testing.assert_array_equal(whole[i], quantise(name, x[:, i * size : (i + 1) * size])[0])


@pytest.mark.parametrize("name", SEARCHED)
def test_what_the_type_can_hold_is_found_again(name):
    """Decoded values, quantised again, change by less than a quarter of the first error."""
    x = gaussian(seed=4)
    once = decoded(name, x)
    assert rms(decoded(name, once) - once) < 0.25 * rms(once - x)


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-9, 4), st.sampled_from(["normal", "sparse", "steps"]))
def test_errors_stay_below_a_step_of_the_block(name, seed, magnitude, shape):
    """Any scale, down to halves without precision: the error of a value is bounded by its block's
    largest magnitude over the codes, and by what a half can still resolve."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    if shape == "sparse":
        x *= rng.random((2, 256)) < 0.05
    elif shape == "steps":
        x = np.round(x)
    x = np.clip(x * np.float32(10.0**magnitude), -LARGEST[name], LARGEST[name])
    y = decoded(name, x)
    step = {"Q4_K": 1 / 7, "Q5_K": 1 / 14, "Q6_K": 1 / 28, "IQ4_NL": 1 / 5, "IQ4_XS": 1 / 5}[name]
    peak = np.abs(x).max(axis=1, keepdims=True)
    assert np.isfinite(y).all()
    assert np.all(np.abs(y - x) <= step * peak + 64 * 127 * 2.0**-25)


@pytest.mark.parametrize("name", SEARCHED)
def test_constant_rows_and_zeros(name):
    rows = np.array([[0.0], [1.0], [-1.0], [1e-30], [3e-39]], np.float32).repeat(512, axis=1)
    y = decoded(name, rows)
    np.testing.assert_array_equal(y[[0, 3, 4]], 0.0)
    assert np.abs(y[1:3] - rows[1:3]).max() < 0.04
    np.testing.assert_allclose(y[:, 0:1].repeat(512, axis=1), y, rtol=0.05)


@pytest.mark.parametrize("name", [*SEARCHED, *SIMPLE])
def test_values_beyond_a_half_are_refused(name):
    at_most = LARGEST[name]
    rows = np.full((1, 256), at_most, np.float32)
    assert np.isfinite(decoded(name, rows)).all()
    with pytest.raises(CheckpointError, match=f"x holds 1e\\+09, beyond {name}; choose bf16"):
        encode(block_type(name), np.full((1, 256), 1e9, np.float32), "x")
    with pytest.raises(CheckpointError, match="not finite"):
        encode(block_type(name), np.full((1, 256), np.nan, np.float32), "x")


def test_types_without_a_quantiser_are_named():
    with pytest.raises(CheckpointError, match="cannot be turned into IQ2_XS"):
        encode(block_type("IQ2_XS"), gaussian(), "x")


def test_the_report_says_what_was_recorded() -> None:
    records = (RECORD, convert_speed.RECORD, perplexity_llamacpp.RECORD)
    page = quantize_report.page(*(json.loads(path.read_text()) for path in records))
    assert page == quantize_report.OUT.read_text(encoding="utf-8")


def test_perplexity_equals_llamacpps_as_far_as_it_prints() -> None:
    record = json.loads(perplexity_llamacpp.RECORD.read_text())
    ours, theirs = record["refimpl"], record["llamacpp"]
    assert f"{ours['final']:.4f}" == f"{theirs['final']:.4f}"
    assert np.abs(np.subtract(ours["running"], theirs["running"])).max() < 1e-4


def test_where_nothing_can_be_written_quantisers_are_compiled_without_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(function: object) -> object:
        raise RuntimeError(message)

    def twice(x):
        return 2 * x

    monkeypatch.setattr(numerics, "_Cache", refuse)
    message = "cannot cache function 'twice': no locator available for file"
    assert numerics.compiled(twice)(21) == 42
    message = "another error"
    with pytest.raises(RuntimeError, match="another"):
        numerics.compiled(twice)


def test_code_on_disk_is_of_use_until_any_quantiser_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are compiled into each other: one file's code holds what was in others."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))

    def hits() -> int:
        def twice(x):
            return 2 * x

        made = numerics.compiled(twice)
        assert made(21) == 42
        return sum(made.stats.cache_hits.values())

    assert [hits(), hits()] == [0, 1]
    sources = Path(numerics.__file__).parent
    copy = shutil.copytree(sources, tmp_path / "quantise")
    monkeypatch.setattr(numerics, "__file__", str(copy / "numerics.py"))
    monkeypatch.setattr(numerics, "_sources", numerics._sources.__wrapped__)
    assert hits() == 1
    with (copy / "flat.py").open("a") as file:
        file.write("# changed\n")
    assert [hits(), hits()] == [0, 1]

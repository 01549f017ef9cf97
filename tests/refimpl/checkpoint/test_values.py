"""What a source hands out is what was written, for every type and both file forms."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from ml_dtypes import bfloat16

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, random_weights
from refimpl.errors import InputError
from refimpl.inventory import inventory

SEED = 5
PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": bfloat16}


def whole(source, spec, dtype=np.float64):
    """A tensor in its own shape, through the public methods only."""
    if spec.plus_one:
        return source.norm_scale(spec.key, spec.layer, dtype)
    if spec.is_stacked:
        parts = [source.expert(spec.key, spec.layer, e, dtype) for e in range(spec.shape[0])]
        return np.stack(parts)
    get = source.matrix if len(spec.shape) == 2 else source.vector
    return get(spec.key, spec.layer, dtype)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_folder_gives_back_the_rounded_weights(made, preset, dtype):
    source = open_checkpoint(made(preset, f"hf-{dtype}"))
    weights = random_weights(PRESETS[preset](), SEED)
    assert source.warnings == ()
    for spec in inventory(source.config):
        kind = np.float32 if spec.key == "router_bias" else PLAIN[dtype]
        expected = weights[spec.hf_name].astype(kind).astype(np.float64)
        if spec.plus_one:
            expected = 1.0 + expected
        np.testing.assert_array_equal(whole(source, spec), expected, spec.hf_name)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gguf_file_gives_back_what_the_gguf_package_would(made, preset, kind):
    """Bit for bit the library's dequantise(quantise(w)); norms, router and bias in full."""
    source = open_checkpoint(made(preset, kind))
    weights = random_weights(PRESETS[preset](), SEED)
    assert source.config.num_nextn_predict_layers == PRESETS[preset]().num_nextn_predict_layers
    for spec in inventory(source.config):
        w = weights[spec.hf_name]
        if spec.plus_one:
            expected = (1.0 + w.astype(np.float64)).astype(np.float32)
        else:
            stored = source.stored(spec.key, spec.layer).kind.name
            assert stored == expected_type(spec, kind, preset), spec.hf_name
            ggml = GGMLQuantizationType[stored]
            expected = dequantize(quantize(w, ggml), ggml).reshape(w.shape)
        np.testing.assert_array_equal(whole(source, spec, np.float32), expected, spec.hf_name)


Q8_0_IN_Q4_0 = {"tiny_a": ("lm_head",), "tiny_b": ("lm_head", "k_proj", "v_proj")}
"""The head's rows are too short for Q6_K; models of eight experts have better keys and values."""


def expected_type(spec, kind, preset):
    if spec.stays_f32:
        return "F32"
    return "Q8_0" if kind == "q4_0" and spec.key in Q8_0_IN_Q4_0[preset] else kind.upper()


@pytest.mark.parametrize(("kind", "bound"), [("q8_0", 1 / 254), ("q4_0", 1 / 8)])
def test_quantisation_error_stays_within_half_a_step(made, kind, bound):
    """Q8_0 steps are max/127, Q4_0 steps max/8 of a block of 32 (ggml-quants.c); Q4_0 has
    no code for +8 steps, so there the error can reach a whole one. Scales are float16: 2^-11."""
    exact, source = open_checkpoint(made("tiny_a", "hf-f32")), open_checkpoint(made("tiny_a", kind))
    for key, layer in (("q_proj", 0), ("o_proj", 3), ("shared.down", 8)):
        w = exact.matrix(key, layer, np.float64).reshape(-1, 32)
        q = source.matrix(key, layer, np.float64).reshape(-1, 32)
        largest = np.abs(w).max(axis=1, keepdims=True)
        assert np.all(np.abs(w - q) <= (bound + 2**-11) * largest)
        assert np.abs(w - q).max() > 0


@pytest.mark.parametrize("form", ["hf-bf16", "f16", "q4_0"])
def test_rows_are_the_rows_of_the_matrix(made, form):
    source = open_checkpoint(made("tiny_a", form))
    table = source.matrix("embed_tokens", None, np.float32)
    ids = [319, 0, 7, 7]
    np.testing.assert_array_equal(source.rows("embed_tokens", None, ids, np.float32), table[ids])
    assert source.rows("embed_tokens", None, [], np.float32).shape == (0, 64)


def test_norm_scale_is_formed_before_rounding(made):
    """bf16 w near 0 would be lost in a bf16 sum; the scale keeps it."""
    source = open_checkpoint(made("tiny_a", "hf-bf16"))
    w = source.vector("input_layernorm", 0, np.float64)
    scale = source.norm_scale("input_layernorm", 0, np.float64)
    np.testing.assert_array_equal(scale - 1.0, w)
    assert not np.array_equal(scale.astype(bfloat16).astype(np.float64), scale)


@pytest.mark.parametrize("form", ["hf-f32", "q8_0"])
def test_arrays_are_read_only_and_outlive_the_source(made, form):
    source = open_checkpoint(made("tiny_a", form))
    matrix = source.matrix("q_proj", 0, np.float32)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1.0
    before = matrix.copy()
    source.close()
    np.testing.assert_array_equal(matrix, before)
    with pytest.raises(InputError, match="closed"):
        source.matrix("q_proj", 0, np.float32)


def test_questions_that_make_no_sense_are_refused(made):
    source = open_checkpoint(made("tiny_a", "q8_0"))
    with pytest.raises(InputError, match="no tensor 'router' in layer 0"):
        source.matrix("router", 0, np.float32)
    with pytest.raises(InputError, match=r"expert 16 .* has 16"):
        source.expert("experts.up", 3, 16, np.float32)
    with pytest.raises(InputError, match=r"row -1 .* 320 rows"):
        source.rows("embed_tokens", None, [3, -1], np.float32)
    with pytest.raises(InputError, match=r"3 dimensions, asked for 2"):
        source.matrix("experts.up", 3, np.float32)
    with pytest.raises(InputError, match="not the weight of a norm"):
        source.norm_scale("router_bias", 3, np.float32)

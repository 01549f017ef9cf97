"""The pieces of the mathematics, each against a value known from elsewhere or by hand."""

import math

import numpy as np
import pytest

from refimpl.config import published
from refimpl.errors import InputError
from refimpl.reference.attention import attend, sigmoid
from refimpl.reference.ffn import swiglu
from refimpl.reference.moe import route
from refimpl.reference.norm import rms_norm
from refimpl.reference.numerics import numerics, round_bf16
from refimpl.reference.rope import frequencies, lanes


def test_norm_with_zero_weight_is_plain_rmsnorm() -> None:
    x = np.random.default_rng(0).normal(size=(3, 8))
    plain = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, 1 + np.zeros(8), 1e-5), plain, rtol=1e-15)


def test_llama3_divisors_of_the_published_full_layers() -> None:
    spec = published().layers[0]
    base = spec.rope_theta ** (-np.arange(0, 64, 2) / 64)
    divisors = base / frequencies(spec)
    assert np.all(divisors[:14] == 1.0)
    known = [1.138363, 1.374499, 1.576436, 1.733729, 1.847569, 1.925649, 1.977251]
    np.testing.assert_allclose(divisors[14:21], known, atol=5e-7)
    np.testing.assert_allclose(divisors[21:], 2.0, rtol=1e-15)


def test_sliding_layers_are_not_scaled() -> None:
    freqs = frequencies(published().layers[1])
    np.testing.assert_allclose(freqs, 1e4 ** (-np.arange(0, 128, 2) / 128), rtol=1e-15)


def test_full_layers_rotate_the_first_half_of_the_lanes_in_half_split_pairs() -> None:
    first, second = lanes(published().layers[0])
    assert first.tolist() == list(range(32))
    assert second.tolist() == list(range(32, 64))


def test_window_is_512_keys_with_self() -> None:
    rng = np.random.default_rng(1)
    n = 600
    q, k, v = (rng.normal(size=(n, 1, 4)) for _ in range(3))
    at = np.arange(n)
    out = attend(q, k, v, at, at, 512)
    for distance, seen in ((511, True), (512, False)):
        changed = v.copy()
        changed[n - 1 - distance] += 1.0
        same = np.array_equal(attend(q, k, changed, at, at, 512)[-1], out[-1])
        assert same is not seen


def test_grouped_heads_use_consecutive_kv_heads() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(5, 6, 4)), rng.normal(size=(5, 2, 4))
    v = np.zeros((5, 2, 4))
    v[:, 1] = 1.0
    out = attend(q, k, v, np.arange(5), np.arange(5), None)
    np.testing.assert_allclose(out[:, :3], 0.0)
    np.testing.assert_allclose(out[:, 3:], 1.0)


def test_attention_is_causal_softmax() -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(4, 1, 8)) for _ in range(3))
    out = attend(q, k, v, np.arange(4), np.arange(4), None)
    scores = (q[2, 0] @ k[:3, 0].T) / math.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(out[2, 0], weights @ v[:3, 0], rtol=1e-12)


def test_clamp_bounds_silu_above_and_up_on_both_sides() -> None:
    gate = np.array([[10.0, -10.0, 1.0]])
    up = np.array([[9.0, -9.0, 2.0]])
    silu = gate * sigmoid(gate)
    expected = np.minimum(silu, 7.0) * np.clip(up, -7.0, 7.0)
    np.testing.assert_array_equal(swiglu(gate, up, 7.0), expected)
    np.testing.assert_array_equal(swiglu(gate, up, math.inf), silu * up)


def test_router_bias_selects_but_does_not_weigh() -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0]])
    bias = np.array([0.0, 0.0, 0.0, 1.0])
    routing = route(logits, bias, 2, 3.0)
    assert routing.experts.tolist() == [[0, 3]]
    scores = sigmoid(logits)[0, [0, 3]]
    np.testing.assert_allclose(routing.weights[0], 3.0 * scores / scores.sum(), rtol=1e-12)
    biased = np.sort(sigmoid(logits)[0] + bias)
    np.testing.assert_allclose(routing.margin, biased[-2] - biased[-3])


def test_routing_weights_sum_to_the_scaling_factor() -> None:
    logits = np.random.default_rng(4).normal(size=(20, 16))
    np.testing.assert_allclose(route(logits, np.zeros(16), 4, 3.0).weights.sum(axis=-1), 3.0)


def test_router_ties_go_to_the_lower_index_and_all_experts_have_margin_one() -> None:
    routing = route(np.zeros((1, 6)), np.zeros(6), 2, 1.0)
    assert routing.experts.tolist() == [[0, 1]]
    assert routing.margin.tolist() == [0.0]
    assert route(np.zeros((1, 6)), np.zeros(6), 6, 1.0).margin.tolist() == [1.0]


def test_bf16_rounding_is_to_nearest_even() -> None:
    import ml_dtypes

    x = np.random.default_rng(5).normal(size=10_000).astype(np.float32)
    x[:4] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, -0.0]
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_bf16(x), expected)
    assert np.isnan(round_bf16(np.array([np.nan]))).all()


def test_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(InputError, match="float16"):
        numerics("float16")

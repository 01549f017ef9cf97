"""Logits to probabilities: what each option keeps, in which order, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.decoding.sampling import SamplingParams, argmax, distribution, draw, fresh_seed
from refimpl.errors import InputError

# Probabilities 0.4, 0.3, 0.2, 0.1 at temperature 1, in shuffled order of ids.
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def test_temperature_1_without_cuts_is_the_softmax() -> None:
    p = distribution(LOGITS, SamplingParams(temperature=1.0))
    np.testing.assert_allclose(p, [0.1, 0.4, 0.2, 0.3], rtol=1e-15)
    assert p.dtype == np.float64


def test_temperature_divides_the_logits() -> None:
    p = distribution(LOGITS, SamplingParams(temperature=0.5))
    squares = np.array([0.01, 0.16, 0.04, 0.09])
    np.testing.assert_allclose(p, squares / squares.sum(), rtol=1e-14)


def test_temperature_0_is_certain_of_the_largest_logit() -> None:
    assert distribution(LOGITS, SamplingParams()).tolist() == [0, 1, 0, 0]


def test_ties_go_to_the_lower_id() -> None:
    tied = np.array([0.0, 2.0, 2.0, 2.0, 1.0])
    assert argmax(tied) == 1
    p = distribution(tied, SamplingParams(temperature=1.0, top_k=2))
    np.testing.assert_allclose(p, [0, 0.5, 0.5, 0, 0])


def test_top_k_keeps_the_k_most_probable() -> None:
    p = distribution(LOGITS, SamplingParams(temperature=1.0, top_k=2))
    np.testing.assert_allclose(p, [0, 4 / 7, 0, 3 / 7], rtol=1e-14)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.95, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_token_that_crosses_the_sum(top_p: float, kept: set[int]) -> None:
    p = distribution(LOGITS, SamplingParams(temperature=1.0, top_p=top_p))
    assert set(np.flatnonzero(p)) == kept


def test_min_p_is_relative_to_the_most_probable() -> None:
    p = distribution(LOGITS, SamplingParams(temperature=1.0, min_p=0.6))
    assert set(np.flatnonzero(p)) == {1, 3}


def test_top_p_judges_what_top_k_left() -> None:
    # Of 4/7 and 3/7 the first alone reaches 0.5; before the cut, 0.4 would not have.
    p = distribution(LOGITS, SamplingParams(temperature=1.0, top_k=2, top_p=0.5))
    assert set(np.flatnonzero(p)) == {1}


def test_cuts_judge_the_tempered_distribution() -> None:
    # At temperature 0.5 the first token has 16/30 > 0.5; untempered only 0.4.
    p = distribution(LOGITS, SamplingParams(temperature=0.5, top_p=0.5))
    assert set(np.flatnonzero(p)) == {1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1e300])
def test_any_temperature_gives_probabilities(temperature: float) -> None:
    logits = np.array([3e38, -3e38, 0.0], dtype=np.float32)
    p = distribution(logits, SamplingParams(temperature=temperature))
    assert p.sum() == pytest.approx(1.0)


def test_minus_infinity_forbids_a_token() -> None:
    p = distribution(np.array([0.0, -np.inf, 0.0]), SamplingParams(temperature=1.0))
    assert p.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0])
    with pytest.raises(InputError, match=f"{bad} as the logit of token 1 .1 of 3"):
        distribution(logits, SamplingParams(temperature=temperature))


def test_all_tokens_forbidden_is_refused() -> None:
    with pytest.raises(InputError, match="forbids every token"):
        argmax(np.full(3, -np.inf))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"top_p": math.nan}, "top-p is nan"),
        ({"min_p": -0.5}, "min-p is -0.5"),
        ({"min_p": 1.01}, "min-p is 1.01"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(params: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**params)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    logits=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32)),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_cuts_keep_the_most_probable_tokens_in_their_proportions(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    plain = distribution(logits, SamplingParams(temperature))
    p = distribution(logits, SamplingParams(temperature, top_k, top_p, min_p))
    kept = p > 0
    assert p.sum() == pytest.approx(1.0)
    assert plain[kept].max() == plain.max()
    assert top_k == 0 or kept.sum() <= top_k
    if kept.any() and not kept.all():
        assert plain[kept].min() >= plain[~kept].max()
    np.testing.assert_allclose(p[kept], plain[kept] / plain[kept].sum(), rtol=1e-9)


def test_draw_follows_the_probabilities_and_never_takes_an_impossible_token() -> None:
    p = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    rng = np.random.default_rng(0)
    drawn = np.bincount([draw(p, rng) for _ in range(4000)], minlength=5)
    assert drawn[[0, 2, 4]].tolist() == [0, 0, 0]
    assert drawn[1] / 4000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_draw_is_safe_at_both_ends_of_the_random_number(u: float) -> None:
    class Fixed:
        def random(self) -> float:
            return u

    token = draw(np.array([0.0, 0.5, 0.5, 0.0]), Fixed())  # type: ignore[arg-type]
    assert token == (1 if u == 0 else 2)


def test_fresh_seeds_differ() -> None:
    assert len({fresh_seed() for _ in range(8)}) > 1

"""Simulated acceptance: a backend whose drafts stand at given rates, whatever the model says."""

from collections.abc import Callable

import numpy as np
import pytest

from refimpl.benchmark.simulated import SimulatedAcceptance
from refimpl.checkpoint.source import WeightSource
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.reference.model import ReferenceModel


@pytest.fixture
def model(tiny: Callable[[str], WeightSource]) -> ReferenceModel:
    return ReferenceModel(tiny("tiny_a"))


@pytest.mark.parametrize(
    ("rates", "accepted"), [((1.0, 1.0, 1.0), 3), ((1.0, 0.0), 1), ((0.0,), 0)]
)
def test_certain_rates_give_the_same_count_in_every_step(
    model: ReferenceModel, rates: tuple[float, ...], accepted: int
) -> None:
    backend = SimulatedAcceptance(model, rates)
    made = generate(backend, [1, 2, 3], GenerateOptions(max_new_tokens=25, mtp=3, stop_tokens=()))
    assert made.mtp.steps == -(-24 // (1 + accepted))
    assert made.mtp.accepted == 24 - made.mtp.steps


def test_numbers_of_accepted_drafts_come_close_to_the_rates(model: ReferenceModel) -> None:
    backend = SimulatedAcceptance(model, (0.88, 0.77, 0.69))
    counts = np.array([backend._accepted(3) for _ in range(40)])
    for k, expected in enumerate(np.cumprod([0.88, 0.77, 0.69]), 1):
        assert np.mean(counts >= k) == pytest.approx(expected, abs=0.03)


def test_tokens_are_random_and_repeat_with_the_seed(model: ReferenceModel) -> None:
    def ids(seed: int) -> tuple[int, ...]:
        backend = SimulatedAcceptance(model, (0.5,), seed)
        options = GenerateOptions(max_new_tokens=12, mtp=1, stop_tokens=())
        return generate(backend, [1, 2, 3], options).ids

    assert ids(1) == ids(1) != ids(2)
    assert len(set(ids(1))) > 6


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_drafts_that_are_not_verified_would_stand_at_the_rate(
    model: ReferenceModel, rate: float
) -> None:
    backend = SimulatedAcceptance(model, (rate,))
    cache = backend.new_cache(16)
    step = backend.prefill([1, 2, 3], cache)
    token = int(np.argmax(step.logits[-1]))
    (draft,) = backend.draft(cache, step.hidden, [2, 3, token], 1, lambda row: int(np.argmax(row)))
    found = int(np.argmax(backend.decode([token], cache).logits[-1]))
    assert (found == draft) == (rate == 1.0)

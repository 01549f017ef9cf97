"""A draft that is only compared with the token that comes changes nothing of the text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from refimpl.decoding import generate as loop
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import SamplingParams
from refimpl.decoding.speculative import Picker


class Watching:
    """Looks at a share of the steps, and drafts one or two tokens in others."""

    def __init__(self, seed: int) -> None:
        self._rng, self.looking = random.Random(seed), False
        self.stood: list[float] = []
        self.steps: list[int] = []

    def next_depth(self, limit: int) -> int:
        depth = min(self._rng.choice([0, 1, 1, 2]), limit)
        self.looking = depth == 1 and self._rng.random() < 0.7
        return depth

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        assert not self.looking
        self.steps.append(depth)

    def looked(self, stood: float, seconds: float) -> None:
        assert self.looking and seconds > 0
        self.stood.append(stood)
        self.steps.append(0)


def watched(monkeypatch: pytest.MonkeyPatch, backend, options, seed: int = 0):
    policy = Watching(seed)
    monkeypatch.setattr(loop, "draft_policy", lambda *_: policy)
    return loop.generate(backend, [1, 2, 3], options), policy


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_greedy_text_is_the_same(markov, config, wrong: float, monkeypatch) -> None:
    plain = loop.generate(markov(config(), 1, wrong), [1, 2, 3], GenerateOptions(60))
    for seed in range(5):
        made, policy = watched(
            monkeypatch, markov(config(), 1, wrong), GenerateOptions(60, mtp=1), seed
        )
        assert made.ids == plain.ids
        assert [len(policy.steps), sum(policy.steps)] == [made.mtp.steps, made.mtp.drafted]
        assert set(policy.stood) <= {0.0, 1.0}
        if wrong == 0.0:
            assert policy.stood and set(policy.stood) == {1.0}


def test_in_sampled_text_it_says_the_chance_that_verification_would_have_given(
    markov, config, monkeypatch
) -> None:
    options = GenerateOptions(400, sampling=SamplingParams(temperature=1.0, seed=3), mtp=1)
    _, policy = watched(monkeypatch, markov(config(), 1, 0.4), options)
    assert any(0 < p < 1 for p in policy.stood)
    assert len(policy.stood) > 60
    monkeypatch.undo()
    verified = loop.generate(markov(config(), 1, 0.4), [1, 2, 3], options).mtp
    rate = verified.accepted / verified.drafted
    assert np.mean(policy.stood) == pytest.approx(rate, abs=0.12)


def test_what_was_looked_at_is_forgotten_before_the_next_verification() -> None:
    picker = Picker(SamplingParams(temperature=1.0, seed=1), np.random.default_rng(1))
    picker.begin()
    row = np.array([0.0, 3.0, 0.0], np.float32)
    draft = picker.choose(row)
    assert picker.would_stand(row, draft) == 1.0
    assert picker.verify(row[None], []).accepted == 0

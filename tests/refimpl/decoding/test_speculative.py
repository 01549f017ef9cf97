"""Speculation is exact: each verified token has the trunk's own distribution.

The chi-square tests compare 24,000 draws of draft-and-verify with the exact distribution, under
a draft distribution that is deliberately wrong; two broken acceptance rules fail the same test.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from refimpl.decoding import speculative
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import SamplingParams, distribution
from refimpl.decoding.speculative import Picker

DRAWS = 24_000
PARAMS = SamplingParams(temperature=0.8, top_k=5, top_p=0.98, min_p=0.01)


def run_steps(backend, params: SamplingParams, depth: int, n: int) -> Iterator[tuple[int, ...]]:
    """The tokens of `n` draft-and-verify steps, each from the same prompt [1, 2]."""
    picker = Picker(params, np.random.default_rng(5))
    for _ in range(n):
        cache = backend.new_cache(16)
        prompt = backend.prefill([1], cache)
        picker.begin()
        drafts = backend.draft(cache, prompt.hidden, [2], depth, picker.choose)
        step = backend.decode([2, *drafts], cache)
        verdict = picker.verify(step.logits, drafts)
        yield (*drafts[: verdict.accepted], verdict.token)


def exact_first_two(backend, params: SamplingParams) -> dict[tuple[int, int], float]:
    """The joint distribution of the two tokens after the prompt [1, 2], by enumeration."""
    first = distribution(backend.logits(1, 2), params)
    joint = {}
    for a in np.flatnonzero(first):
        second = distribution(backend.logits(2, int(a)), params)
        for b in np.flatnonzero(second):
            joint[int(a), int(b)] = float(first[a] * second[b])
    return joint


def p_value_of_first_token(backend) -> float:
    exact = distribution(backend.logits(1, 2), PARAMS)
    seen = Counter(tokens[0] for tokens in run_steps(backend, PARAMS, 1, DRAWS))
    possible = np.flatnonzero(exact)
    assert set(seen) <= set(possible), "a token that plain sampling never takes"
    counts = [seen[int(i)] for i in possible]
    return float(chisquare(counts, exact[possible] * DRAWS).pvalue)


@pytest.fixture(autouse=True)
def remember_distributions(monkeypatch) -> None:
    """The same few rows come up thousands of times: their softmax is computed once."""
    known: dict[bytes, np.ndarray] = {}

    def remembered(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
        key = logits.tobytes() + repr(params).encode()
        if key not in known:
            known[key] = distribution(logits, params)
        return known[key]

    monkeypatch.setattr(speculative, "distribution", remembered)


@pytest.fixture
def wrong(markov, config):
    """A model whose drafts come from a distribution quite unlike the trunk's."""
    return markov(config(), seed=3, wrong=0.6)


def test_the_draft_distribution_of_these_tests_is_wrong(wrong) -> None:
    rows: list[np.ndarray] = []

    def note(logits: np.ndarray) -> int:
        rows.append(distribution(logits, PARAMS))
        return 0

    cache = wrong.new_cache(4)
    wrong.draft(cache, wrong.prefill([1], cache).hidden, [2], 1, note)
    exact = distribution(wrong.logits(1, 2), PARAMS)
    overlap = np.minimum(rows[0], exact).sum()
    assert 0.2 < overlap < 0.8  # total variation distance between 0.2 and 0.8


def test_sampled_first_token_has_the_exact_distribution(wrong) -> None:
    assert p_value_of_first_token(wrong) > 0.01


def test_sampled_pairs_have_the_exact_joint_distribution(wrong) -> None:
    # Pairs span accepted drafts, replacements and the token after them; where a step gave one
    # token only, the next comes from plain sampling, as the next step's would.
    picker = Picker(PARAMS, np.random.default_rng(6))
    joint = exact_first_two(wrong, PARAMS)
    seen: Counter[tuple[int, int]] = Counter()
    for tokens in run_steps(wrong, PARAMS, 3, DRAWS):
        a = tokens[0]
        b = tokens[1] if len(tokens) > 1 else picker.pick(wrong.logits(2, a))
        seen[a, b] += 1
    assert set(seen) <= set(joint)
    common = [pair for pair, p in joint.items() if p * DRAWS >= 5]
    rare = 1.0 - sum(joint[pair] for pair in common)
    counts = [seen[pair] for pair in common]
    expected = [joint[pair] * DRAWS for pair in common]
    if rare > 1e-12:
        counts.append(DRAWS - sum(counts))
        expected.append(rare * DRAWS)
    expected = list(np.array(expected) / sum(expected) * DRAWS)
    assert chisquare(counts, expected).pvalue > 0.01


def test_accepting_too_often_fails_the_chi_square(wrong, monkeypatch) -> None:
    rule = speculative.accept_probability
    monkeypatch.setattr(
        speculative, "accept_probability", lambda p, q, token: min(1.0, 1.15 * rule(p, q, token))
    )
    assert p_value_of_first_token(wrong) < 1e-4


def test_replacing_from_the_whole_distribution_fails_the_chi_square(wrong, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    assert p_value_of_first_token(wrong) < 1e-4


def test_unprocessed_draft_probabilities_fail_the_chi_square(wrong, monkeypatch) -> None:
    """q must be what the draft was really drawn from, cuts included."""
    rule = speculative.accept_probability

    def flattened(p, q, token):
        return rule(p, 0.7 * q + 0.3 / len(q), token)

    monkeypatch.setattr(speculative, "accept_probability", flattened)
    assert p_value_of_first_token(wrong) < 1e-4


def test_perfect_drafts_are_all_accepted(markov, config) -> None:
    right = markov(config(), seed=3, wrong=0.0)
    steps = run_steps(right, PARAMS, 3, 200)
    assert {len(tokens) for tokens in steps} == {4}


def one_hot_rows(*tokens: int, vocab: int = 6) -> np.ndarray:
    return np.eye(vocab)[list(tokens)]


@pytest.mark.parametrize(
    ("drafts", "accepted", "token"),
    [([], 0, 3), ([3], 1, 1), ([3, 1, 4], 3, 5), ([3, 2, 4], 1, 1), ([0, 1, 4], 0, 3)],
)
def test_greedy_keeps_the_longest_prefix_that_the_trunk_agrees_with(
    drafts: list[int], accepted: int, token: int
) -> None:
    rows = one_hot_rows(3, 1, 4, 5)[: len(drafts) + 1]
    verdict = Picker(SamplingParams(), np.random.default_rng(0)).verify(rows, drafts)
    assert (verdict.accepted, verdict.token) == (accepted, token)


def test_residual_of_equal_distributions_is_the_distribution() -> None:
    p = np.array([0.25, 0.75])
    assert speculative.residual(p, p.copy()).tolist() == p.tolist()


def p_value_of_a_run(backend, mtp: int) -> float:
    """Goodness of fit of one long generation: the successors of every pair of tokens."""
    options = GenerateOptions(
        max_new_tokens=DRAWS, mtp=mtp, sampling=dataclasses.replace(PARAMS, seed=11)
    )
    made = generate(backend, [1, 2], options)
    assert made.mtp.accepted > DRAWS // 10
    text = [1, 2, *made.ids]
    followers: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for before, last, token in zip(text, text[1:], text[2:], strict=False):
        followers[before, last][token] += 1
    statistic, freedom = 0.0, 0
    for (before, last), seen in followers.items():
        exact = distribution(backend.logits(before, last), PARAMS)
        expected = exact * seen.total()
        assert all(exact[token] > 0 for token in seen)
        if seen.total() < 50:
            continue
        common = np.flatnonzero(expected >= 5)
        rare = expected.sum() - expected[common].sum()
        counts = np.array([seen[int(i)] for i in common], dtype=float)
        pairs = [(counts, expected[common])]
        if rare >= 1:  # the improbable ones together
            pairs.append((np.array([seen.total() - counts.sum()]), np.array([rare])))
        statistic += sum(float(((c - e) ** 2 / e).sum()) for c, e in pairs)
        freedom += sum(len(c) for c, _ in pairs) - 1
    return float(chi2.sf(statistic, freedom))


def test_a_whole_generation_has_the_exact_distribution_after_every_context(markov, config) -> None:
    backend = markov(config(context=2 * DRAWS), seed=3, wrong=0.4)
    assert p_value_of_a_run(backend, mtp=3) > 0.01


def test_a_whole_generation_under_a_broken_rule_does_not(markov, config, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    backend = markov(config(context=2 * DRAWS), seed=3, wrong=0.4)
    assert p_value_of_a_run(backend, mtp=3) < 1e-4

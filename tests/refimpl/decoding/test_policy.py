"""The automatic draft depth finds what pays off, and gives up drafts that do not."""

import random

import pytest

from refimpl.decoding.policy import AutoDepth, FixedDepth

# Seconds of a step with 0..3 drafts on a machine where drafts are cheap, and on one where the
# rows of a verification cost nearly as much as steps of their own.
CHEAP = [1.0, 1.1, 1.2, 1.3]
DEAR = [1.0, 1.8, 2.6, 3.4]


def run(policy, chances: list[float], seconds: list[float], steps: int = 2000) -> float:
    """Tokens per second in a simulated run; draft i stands with chances[i]."""
    rng = random.Random(4)
    tokens, spent = 0, 0.0
    for _ in range(steps):
        depth = policy.next_depth(3)
        accepted = 0
        while accepted < depth and rng.random() < chances[accepted]:
            accepted += 1
        took = seconds[depth] * rng.uniform(0.95, 1.3)
        policy.update(depth, accepted, took)
        tokens, spent = tokens + 1 + accepted, spent + took
    return tokens / spent


@pytest.mark.parametrize("seconds", [CHEAP, DEAR])
@pytest.mark.parametrize(
    "chances", [[0.95] * 3, [0.7, 0.6, 0.5], [0.6, 0.1, 0.1], [0.3] * 3, [0.0] * 3]
)
def test_auto_is_nearly_as_fast_as_the_best_fixed_depth(
    chances: list[float], seconds: list[float]
) -> None:
    auto = run(AutoDepth(3), chances, seconds)
    fixed = [run(FixedDepth(k), chances, seconds) for k in range(4)]
    assert auto >= 0.94 * max(fixed)
    assert auto >= 0.98 * fixed[0]


@pytest.mark.parametrize("steps", [10, 30, 100, 300])
def test_short_runs_lose_next_to_nothing_where_drafts_do_not_pay(steps: int) -> None:
    """Every draft is wrong and costs nearly a step: the worst case, from the first step on."""
    policy, spent, plain = AutoDepth(3), 0.0, 0.0
    for _ in range(steps):
        took = DEAR[policy.next_depth(3)]
        policy.update(policy_depth(took), 0, took)
        spent, plain = spent + took, plain + DEAR[0]
    assert spent <= 1.03 * plain


def policy_depth(seconds: float) -> int:
    """The depth that took so long."""
    return DEAR.index(seconds)


def test_auto_follows_when_drafts_stop_standing() -> None:
    policy = AutoDepth(3)
    run(policy, [0.95] * 3, DEAR, steps=300)
    late = run(policy, [0.05] * 3, DEAR, steps=1000)
    assert late >= 0.93 * run(FixedDepth(0), [0.05] * 3, DEAR)


def test_a_single_slow_step_decides_nothing() -> None:
    policy = AutoDepth(1)
    for _ in range(60):
        depth = policy.next_depth(1)
        policy.update(depth, depth, CHEAP[depth])
    assert policy.next_depth(1) == 1
    policy.update(1, 1, 1000.0)
    assert policy.next_depth(1) == 1


@pytest.mark.parametrize("limit", range(4))
def test_the_depth_never_exceeds_what_remains(limit: int) -> None:
    policy = AutoDepth(3)
    for _ in range(80):
        depth = policy.next_depth(limit)
        assert 0 <= depth <= limit
        policy.update(depth, depth, CHEAP[depth])
    assert FixedDepth(3).next_depth(limit) == limit


def test_without_mtp_layers_there_are_no_drafts() -> None:
    policy = AutoDepth(0)
    policy.update(0, 0, 0.0)
    assert policy.next_depth(3) == 0


def test_expected_tokens_count_only_judged_drafts() -> None:
    policy = AutoDepth(3)
    for _ in range(300):
        policy.update(3, 1, 1.0)  # first always stands, second never; the third is never judged
    assert policy.tokens_per_step(1) == pytest.approx(2.0, abs=0.02)
    assert policy.tokens_per_step(3) == pytest.approx(2.0, abs=0.05)

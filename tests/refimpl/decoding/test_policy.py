"""The automatic draft depth finds what pays off, loses next to nothing where drafts do not, and
follows when that changes. All clocks are simulated: the same figures on any machine."""

import random
from collections.abc import Callable, Sequence

import pytest

from refimpl.decoding.policy import AutoDepth, DraftPolicy, FixedDepth, StepCosts

# Seconds of a step with 0..3 drafts: where drafts are cheap, as bytes of the published model tell
# it, as measured on slices of it, and where rows of a verification cost as much as steps.
CHEAP = (1.0, 1.1, 1.2, 1.3)
BYTES = (1.0, 1.4, 1.75, 2.05)
SLICE = (1.0, 1.6, 2.1, 2.6)
DEAR = (1.0, 1.9, 2.9, 3.9)
COSTS = [CHEAP, BYTES, SLICE, DEAR]
# Chances that drafts stand: as published for the model, and from perfect to useless.
PUBLISHED = (0.88, 0.77, 0.69)
CHANCES = [(0.97, 0.97, 0.97), PUBLISHED, (0.7, 0.6, 0.5), (0.3, 0.2, 0.1), (0.0, 0.0, 0.0)]

ENDLESS = 10**6


class Machine:
    """Runs a policy over a simulated clock; `start` seconds more where drafting begins. A draft's
    half of its costs is what drafting it takes."""

    def __init__(self, costs: Sequence[float], seed: int = 0, start: float = 0.0) -> None:
        self._costs, self._rng, self._start = costs, random.Random(seed), start
        self.pace = 1.0  # seconds of a plain step
        self._pause = 10  # steps since the last drafts

    def text(self, policy: DraftPolicy, chances: Sequence[float]) -> float:
        """`run` for a new text of 96 tokens, in which no draft was made before."""
        self._pause = 10
        return self.run(policy, chances, 96)

    def run(self, policy: DraftPolicy, chances: Sequence[float], tokens: int) -> float:
        """Tokens per plain step's time, over at least so many tokens."""
        made, spent = 0, 0.0
        while made < tokens:
            depth = policy.next_depth(ENDLESS)
            start = self._start * (depth > 0 and self._pause > 3)
            self._pause = 0 if depth else self._pause + 1
            noise = self._rng.uniform(0.97, 1.03)
            if policy.looking:
                took = (1 + (self._costs[1] - 1) / 2) * noise + start
                policy.looked(float(self._rng.random() < chances[0]), took * self.pace)
                made, spent = made + 1, spent + took
                continue
            accepted = 0
            while accepted < depth and self._rng.random() < chances[accepted]:
                accepted += 1
            took = self._costs[depth] * noise + start
            policy.update(depth, accepted, took * self.pace)
            made, spent = made + 1 + accepted, spent + took
        return made / spent


def auto(costs: Sequence[float]) -> AutoDepth:
    """A policy whose guesses are bytes: at most what is true."""
    return AutoDepth(3, [1 + 0.8 * (c - 1) for c in costs[1:]])


def speed_up(costs: Sequence[float], chances: Sequence[float], depth: int) -> float:
    """Tokens of a step at a depth over what it costs."""
    tokens = chance = 1.0
    for p in chances[:depth]:
        chance *= p
        tokens += chance
    return tokens / costs[depth]


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("chances", CHANCES)
@pytest.mark.parametrize("costs", COSTS)
def test_after_a_while_it_is_nearly_as_fast_as_the_best_fixed_depth(
    costs: Sequence[float], chances: Sequence[float], start: float
) -> None:
    best = max(speed_up(costs, chances, k) for k in range(4))
    for seed in range(5):
        machine, policy = Machine(costs, seed, start), auto(costs)
        machine.run(policy, chances, 1500)
        assert machine.run(policy, chances, 3000) >= 0.9 * best


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("chances", CHANCES)
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("tokens", [32, 96, 400, 2000])
def test_it_is_never_slower_than_no_drafts_by_more_than_its_budget(
    tokens: int, costs: Sequence[float], chances: Sequence[float], start: float
) -> None:
    """Budget and allowance, what one step more can lose, and the clock's noise; in the mean over
    runs one plain step, a start and the budget."""
    lost = []
    for seed in range(20):
        spent = tokens / Machine(costs, seed, start).run(auto(costs), chances, tokens)
        lost.append(spent - tokens)
    once = max(AutoDepth.ALLOWANCE, AutoDepth.RISK) + max(costs) - 1 + start
    assert max(lost) <= AutoDepth.BUDGET * tokens + once + 0.01 * tokens
    assert (
        sum(lost) / len(lost) <= AutoDepth.BUDGET * tokens + AutoDepth.RISK + start + 0.004 * tokens
    )


@pytest.mark.parametrize("costs", [BYTES, SLICE])
def test_a_short_run_already_gains_from_drafts_that_stand(costs: Sequence[float]) -> None:
    runs = [Machine(costs, seed).run(auto(costs), PUBLISHED, 96) for seed in range(41)]
    gain = speed_up(costs, PUBLISHED, 1) - 1
    assert sorted(runs)[20] >= 1 + 0.6 * gain


def test_where_drafts_are_as_cheap_as_bytes_say_unlucky_ones_do_not_end_them() -> None:
    best = max(speed_up(BYTES, PUBLISHED, k) for k in range(4))
    for tokens in (96, 400):
        runs = [Machine(BYTES, seed).run(auto(BYTES), PUBLISHED, tokens) for seed in range(40)]
        assert sum(runs) / len(runs) >= 0.93 * best


def test_drafting_that_did_not_pay_begins_again_with_a_draft_that_is_not_verified() -> None:
    policy, found = AutoDepth(1, [1.7]), ""
    for _ in range(400):
        depth = policy.next_depth(ENDLESS)
        assert not policy.looking or depth == 1
        if policy.looking:
            policy.looked(0.0, 1.3)
        else:
            policy.update(depth, 0, 1.0 + 0.7 * depth)
        found += "L" if policy.looking else str(depth)
    assert found.startswith("0" * StepCosts.FIRST + "1")
    assert found.count("1") == 1
    looks = [i for i, what in enumerate(found) if what == "L"]
    assert 2 <= len(looks) <= 6
    assert looks[-1] - looks[-2] > looks[1] - looks[0]


def test_looks_that_hit_start_drafting() -> None:
    policy, found = AutoDepth(1, [1.7]), ""
    for step in range(600):
        depth = policy.next_depth(ENDLESS)
        stood = step > 10  # drafts begin to stand
        if policy.looking:
            policy.looked(float(stood), 1.3)
        else:
            policy.update(depth, int(stood and depth > 0), 1.0 + 0.7 * depth)
        found += "L" if policy.looking else str(depth)
    assert found[: StepCosts.FIRST + 2] == "0" * StepCosts.FIRST + "10"
    assert found[StepCosts.FIRST + 2 :].strip("0").startswith("L")
    assert found[-40:].count("1") >= 39


def test_what_cannot_pay_by_its_bytes_is_never_tried() -> None:
    policy = AutoDepth(3, [2.0, 3.0, 4.0])
    used = [depths(policy, lambda k: 1.0 + k) for _ in range(1000)]
    assert set(used) == {0}


def test_what_promises_to_pay_is_tried_at_once() -> None:
    policy = AutoDepth(3, [1.4, 1.75, 2.05])
    used = [depths(policy, lambda k: 1.0 + 0.4 * k) for _ in range(12)]
    assert used[: StepCosts.FIRST + 1] == [0] * StepCosts.FIRST + [1]
    assert used[-1] == 3


def depths(policy: AutoDepth, seconds: Callable[[int], float]) -> int:
    """The depth of one more step, of which all drafts stand."""
    depth = policy.next_depth(ENDLESS)
    policy.update(depth, depth, seconds(depth))
    return depth


@pytest.mark.parametrize("costs", [BYTES, SLICE])
def test_it_follows_when_drafts_stop_standing_and_when_they_stand_again(
    costs: Sequence[float],
) -> None:
    machine, policy = Machine(costs, seed=3), auto(costs)
    machine.run(policy, PUBLISHED, 600)
    assert machine.run(policy, (0.05, 0.05, 0.05), 1000) >= 0.97
    machine.run(policy, PUBLISHED, 2500)
    best = max(speed_up(costs, PUBLISHED, k) for k in range(4))
    assert machine.run(policy, PUBLISHED, 1500) >= 0.9 * best


def test_a_memory_that_changes_its_speed_changes_no_decision() -> None:
    """All steps become slower or faster together: drafts are not taken for the cause."""
    for chances, expected in ((PUBLISHED, 1.1), ((0.3, 0.2, 0.1), 0.985)):
        machine, policy = Machine(SLICE, seed=5), auto(SLICE)
        machine.run(policy, chances, 600)
        made = []
        for i in range(12):
            machine.pace = 1.4 if i % 2 else 1.0
            made.append(machine.run(policy, chances, 150))
        assert sum(made) / len(made) >= expected


def test_a_single_slow_step_decides_nothing() -> None:
    policy = AutoDepth(1, [1.1])
    for _ in range(60):
        depths(policy, lambda k: CHEAP[k])
    assert policy.next_depth(ENDLESS) == 1
    policy.update(1, 1, 1000.0)
    assert policy.costs.of(1) == pytest.approx(1.1)


def test_a_slow_first_trial_is_repaired_by_later_ones() -> None:
    """The first step with drafts may have to touch memory for the first time."""
    policy, first = AutoDepth(1, [1.1]), [50.0]
    used = [depths(policy, lambda k: first.pop() if k and first else CHEAP[k]) for _ in range(800)]
    assert used[-20:].count(1) >= 19  # now and then a plain step, to compare with


@pytest.mark.parametrize("limit", range(4))
def test_the_depth_never_exceeds_what_remains(limit: int) -> None:
    policy = AutoDepth(3, [1.1, 1.2, 1.3])
    for _ in range(80):
        depths(policy, lambda k: CHEAP[k])
    depth = policy.next_depth(limit)
    assert 0 <= depth <= limit
    assert FixedDepth(3).next_depth(limit) == limit


def test_drafting_does_not_start_when_little_is_left() -> None:
    policy = AutoDepth(3, [1.1, 1.2, 1.3])
    for left in range(AutoDepth.LEAST_LEFT - 1, 0, -1):
        assert policy.next_depth(left) == 0
        policy.update(0, 0, 1.0)


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


def test_costs_compare_only_times_of_the_same_moment() -> None:
    """Plain steps at one speed of the memory, drafts and the next plain steps at another."""
    costs = StepCosts([1.5])
    for _ in range(20):
        costs.add(0, 1.0)
    for _ in range(StepCosts.SAMPLES):
        costs.add(1, 1.6)
    for _ in range(20):
        costs.add(1, 3.2)  # twice as slow
    assert costs.unit == pytest.approx(2.0)
    costs.add(0, 2.0)
    assert costs.of(1) == pytest.approx(1.6)


USELESS = (0.05, 0.05, 0.05)


def texts(
    costs: Sequence[float], kinds: Sequence[Sequence[float]], kept: bool, seeds: int = 60
) -> list[list[float]]:
    """Speed of each of several texts one after the other, for each seed; with one policy, or with
    a new one for each."""
    found = []
    for seed in range(seeds):
        machine, policy = Machine(costs, seed, start=0.3), auto(costs)
        speeds = []
        for number, chances in enumerate(kinds):
            if number and kept:
                policy.begin()
            elif number:
                policy = auto(costs)
            speeds.append(machine.text(policy, chances))
        found.append(speeds)
    return found


def together(found: list[list[float]]) -> float:
    """Mean over seeds of the speed over all texts."""
    return sum(len(speeds) / sum(1 / v for v in speeds) for speeds in found) / len(found)


def tenth(found: list[list[float]]) -> float:
    """Speed of the text that is slower than nine tenths of all."""
    speeds = sorted(v for one in found for v in one)
    return speeds[len(speeds) // 10]


def last(found: list[list[float]]) -> float:
    """Mean speed of the last text."""
    return sum(speeds[-1] for speeds in found) / len(found)


@pytest.mark.parametrize(("costs", "more"), [(SLICE, 0.015), (BYTES, 0.01)])
def test_a_policy_that_is_kept_gains_more_from_short_texts_than_new_ones(
    costs: Sequence[float], more: float
) -> None:
    kept, new = (texts(costs, [PUBLISHED] * 5, kept) for kept in (True, False))
    assert together(kept) >= together(new) + more
    assert tenth(kept) >= tenth(new) + more
    best = max(speed_up(costs, PUBLISHED, k) for k in range(4))
    assert last(kept) >= 0.93 * best


@pytest.mark.parametrize("costs", [BYTES, SLICE, DEAR])
@pytest.mark.parametrize("chances", [(0.3, 0.2, 0.1), USELESS])
def test_where_drafts_never_pay_a_kept_policy_loses_no_more_than_new_ones(
    costs: Sequence[float], chances: Sequence[float]
) -> None:
    kept, new = (texts(costs, [chances] * 5, kept) for kept in (True, False))
    assert together(kept) >= together(new) - 0.003
    assert min(min(speeds) for speeds in kept) >= 0.96


@pytest.mark.parametrize("costs", [BYTES, SLICE])
def test_a_text_whose_drafts_stop_standing_is_known_for_one_within_a_few_steps(
    costs: Sequence[float],
) -> None:
    """It may lose a part of what the texts before it gained."""
    found = texts(costs, [PUBLISHED] * 4 + [USELESS], kept=True)
    assert last(found) >= 0.97
    assert min(speeds[-1] for speeds in found) >= 0.95
    found = texts(costs, [PUBLISHED] * 4 + [USELESS] * 2, kept=True)
    assert min(speeds[-1] for speeds in found) >= 0.96


@pytest.mark.parametrize("costs", [BYTES, SLICE])
@pytest.mark.parametrize("before", [1, 6])
def test_a_text_whose_drafts_stand_after_all_gains_as_if_it_were_the_first(
    before: int, costs: Sequence[float]
) -> None:
    kinds = [USELESS] * before + [PUBLISHED] * 2
    kept, new = (texts(costs, kinds, kept) for kept in (True, False))
    assert last(kept) >= last(new) - 0.01
    first = sum(speeds[before] for speeds in kept) / len(kept)
    assert first >= last(new) - 0.02


def test_texts_of_different_kinds_in_turn_are_as_fast_as_with_new_policies() -> None:
    kinds = [PUBLISHED, USELESS] * 3
    for costs in (BYTES, SLICE):
        kept, new = (texts(costs, kinds, kept) for kept in (True, False))
        assert together(kept) >= together(new) - 0.01


def test_a_new_text_measures_what_steps_cost_anew() -> None:
    policy = auto(CHEAP)
    for _ in range(100):
        depths(policy, lambda k: CHEAP[k])
    policy.begin()
    used = [depths(policy, lambda k: 3 * BYTES[k]) for _ in range(20)]  # a longer context
    assert used[:4] == [0, 0, 0, 1] and used[-3:] == [3, 3, 3]
    assert policy.costs.unit == pytest.approx(3.0)
    assert policy.costs.of(3) == pytest.approx(BYTES[3])


def test_more_drafts_never_count_as_cheaper_than_fewer() -> None:
    """Plain steps were held up while they were timed."""
    costs = StepCosts([1.2, 1.4])
    for depth in (0, 0, 0, 1, 2):
        costs.add(depth, 1.0 if depth else 3.0)
    assert costs.of(1) == costs.of(2) == 1.0


def test_costs_that_an_accident_made_dear_are_measured_anew_in_the_next_text() -> None:
    """Something else held the steps with drafts up, all of them."""
    policy = AutoDepth(1, [1.4])
    for _ in range(60):
        depths(policy, lambda k: 40.0 if k else 1.0)
    for _ in range(StepCosts.SAMPLES):
        policy.update(1, 1, 40.0)
    assert policy.costs.settled(1) and policy.costs.of(1) > 2
    policy.begin()
    used = [depths(policy, lambda k: 1.6 if k else 1.0) for _ in range(40)]
    assert used[:4] == [0, 0, 0, 1] and used[-20:] == [1] * 20


def test_a_text_that_ended_amid_a_look_leaves_none_to_the_next() -> None:
    policy = AutoDepth(1, [1.7])
    while not policy.looking:
        depth = policy.next_depth(ENDLESS)
        if not policy.looking:
            policy.update(depth, 0, 1.0 + 0.7 * depth)
    policy.begin()
    assert not policy.looking
    assert policy.next_depth(ENDLESS) == 0


def test_policies_that_learn_nothing_can_be_kept_as_well() -> None:
    for policy, depth in ((FixedDepth(2), 2), (AutoDepth(0), 0)):
        policy.update(depth, 0, 1.0)
        policy.begin()
        assert policy.next_depth(9) == depth

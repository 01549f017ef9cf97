"""How many tokens to draft in the next step.

A policy never changes what is generated greedily (verification is exact), only how fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol


class DraftPolicy(Protocol):
    """Chooses the draft depth of each step and is told what came of it."""

    def next_depth(self, limit: int) -> int:
        """Drafts for the next step, at most `limit` (tokens or positions that remain)."""

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        """A step drafted `depth` tokens, `accepted` of them stood, all in `seconds`."""


class FixedDepth:
    """Always the same depth, except where the cache has fewer positions left."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def next_depth(self, limit: int) -> int:
        return min(self._depth, limit)

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        pass


class StepCosts:
    """Time of a step at each depth, in plain steps of the same moment.

    The memory's speed changes from second to second, for all depths alike. So times are compared
    only with times beside them: a step at a depth that is used now and then with the plain step
    that was usual just before, a plain step between drafts with the steps just before it. Medians
    of the newest comparisons count, so that one slow step decides nothing.

    Args:
        guesses: for depths 1, 2, ... what to expect before anything is measured.
    """

    SAMPLES = 9  # comparisons kept for each depth, and times for the usual step
    FIRST = 3  # plain steps before anything is compared with them

    def __init__(self, guesses: Sequence[float]) -> None:
        self.guesses = (1.0, *guesses)
        self._known = [1.0, *(0.0 for _ in guesses)]  # 0: not measured
        self._ratios: list[deque[float]] = [deque(maxlen=self.SAMPLES) for _ in self.guesses]
        self._units: deque[float] = deque(maxlen=self.SAMPLES)
        self._recent: deque[float] = deque(maxlen=self.SAMPLES)  # at the depth of the last step
        self._depth = 0
        self.unit = 0.0  # seconds of a plain step, as things are now

    @property
    def ready(self) -> bool:
        """Whether there is something to compare with."""
        return len(self._units) >= self.FIRST

    @property
    def reach(self) -> int:
        """The deepest depth that can be judged: the first that was not measured."""
        return next((k for k, c in enumerate(self._known) if not c), len(self._known) - 1)

    def measured(self, depth: int) -> bool:
        """Whether a depth was measured at all."""
        return self._known[depth] > 0

    def settled(self, depth: int) -> bool:
        """Whether a depth was measured often enough for its cost to be no accident."""
        return len(self._ratios[depth]) >= self.FIRST

    def of(self, depth: int) -> float:
        """Cost of a step; of a depth that was not measured, the guess, as far off as the guess
        for the depth before it was."""
        if known := self._known[depth]:
            return known
        before = self.of(depth - 1)
        more = self.guesses[depth] - self.guesses[depth - 1]
        return before + more * max(1.0, before / self.guesses[depth - 1])

    def add(self, depth: int, seconds: float, usual: bool = True) -> None:
        """A step at `depth` took `seconds`; not `usual`: it did more than its depth says."""
        if depth == 0:
            if self._depth and len(self._recent) >= self.FIRST:
                self._compare(self._depth, _median(self._recent), seconds)
            self._pace(seconds)
        elif self.unit and (usual or seconds < self.unit * self.of(depth)):
            if depth != self._depth or len(self._ratios[depth]) < self.SAMPLES:
                self._compare(depth, seconds, self.unit)
            else:
                self._pace(seconds / self._known[depth])
        if depth != self._depth:
            self._recent.clear()
            self._depth = depth
        if depth and usual:
            self._recent.append(seconds)

    def _compare(self, depth: int, seconds: float, plain: float) -> None:
        self._ratios[depth].append(seconds / max(plain, 1e-9))
        self._known[depth] = max(_median(self._ratios[depth]), 1e-9)

    def _pace(self, plain: float) -> None:
        self._units.append(plain)
        self.unit = max(_median(self._units), 1e-9)


def _median(values: Sequence[float] | deque[float]) -> float:
    return sorted(values)[len(values) // 2]


class AutoDepth:
    """The depth that promises the most tokens per second, from what the run itself measured.

    A step at depth k emits 1 + a_1 + a_1 a_2 + ... + a_1..a_k tokens on average, a_i being the
    chance that draft i stands once those before it did, and costs c_k plain steps (`StepCosts`).
    a_i is counted with discount, older steps weighing less; `PRIOR` in `PRIOR_WEIGHT` imaginary
    trials stands for the beginning. Before c_k is measured, the bytes that the step reads stand
    for it. So drafts that promise nothing are never tried, and the others at once, one draft more
    at a time; the best k is taken, drafts only if they promise more than no drafts by `MARGIN`.

    Where drafts do not pay, a few steps with drafts are tried again from time to time, ever more
    rarely, starting from little belief in what was counted before. Where they pay, every
    `PROBE_EVERY`-th step goes without, one deeper or one shallower, in turn.

    What steps with drafts lose against plain ones is summed up, gains making up for losses before
    them. No step with drafts is made that is expected to bring this sum above `ALLOWANCE` plain
    steps and the share `BUDGET` of the run: so much, and what one step more loses, a run can be
    slower than without drafts. A step that took far longer than any at its depth should, held up
    by something else, is counted as a long one only.

    Args:
        max_depth: the most drafts.
        guesses: costs of a step with 1, 2, ... drafts in plain steps, as bytes tell them.
    """

    PRIOR = 0.8  # published for the first MTP layer: 0.88
    PRIOR_WEIGHT = 4.0
    DISCOUNT = 0.98
    MARGIN = 1.02
    STEP_UP = 1.03
    PROBE_EVERY = 64
    BUDGET = 0.005  # share of the run's time that drafts may lose
    ALLOWANCE = 0.8  # plain steps that they may lose besides
    TRIAL = 3  # steps of a trial, unless they gain
    WAIT, WAIT_MOST = 32, 1024  # plain steps between trials
    REST = 8  # plain steps until the allowance is looked at again
    LEAST_LEFT = 24  # tokens that are still to come when drafting starts
    HORIZON = 128  # tokens in which a start must pay for itself
    START_MOST = 2.0  # plain steps that a start is taken to cost at most
    CATCH_UP = 4  # steps after which MTP layers that were not drafted from have rows to make up for

    def __init__(self, max_depth: int, guesses: Sequence[float] | None = None) -> None:
        self.costs = StepCosts([1.0] * max_depth if guesses is None else guesses)
        self._tried = [self.PRIOR_WEIGHT] * max_depth
        self._passed = [self.PRIOR * self.PRIOR_WEIGHT] * max_depth
        self._most = max_depth
        self._last_used = [0] * (max_depth + 1)
        self._plain = 0  # steps without drafts that have been decided on
        self._since = self.CATCH_UP  # steps since the last one with drafts
        self._used = [-self.CATCH_UP] * (max_depth + 1)  # last step of so many drafts or more
        self._trial = 0  # steps of a trial that are left
        self._drafted = False  # since the last trial was planned
        self._wait, self._due = self.WAIT, 0  # plain steps between trials; step of the next one
        self._probe = self.PROBE_EVERY
        self._start = 0.0  # what the first step after a pause costs besides, plain steps
        self._steps, self._elapsed, self._lost = 0, 0.0, 0.0  # the latter two in plain steps

    def next_depth(self, limit: int) -> int:
        if self._plain:
            self._plain -= 1
            return 0
        most = min(limit, self._most, self.costs.reach)
        if most < 1 or not self.costs.ready:
            return 0
        starting = self._since >= self.CATCH_UP
        if starting and limit < self.LEAST_LEFT:
            return 0
        best = max(range(1, most + 1), key=self._promise)
        gain = self.tokens_per_plain_step(best) - 1
        pays = gain > self.MARGIN - 1
        if starting and gain * min(limit, self.HORIZON) <= self._start:
            pays = False
        depth = self._pick(best, most) if pays else self._try(best)
        if depth and not self._affordable(depth, starting):
            self._trial, depth = 0, 0
            self._plain = self.REST - 1
        return depth

    def _promise(self, depth: int) -> float:
        """Speed-up at a depth; one that was not measured must promise so much more than the one
        before it, which must pay."""
        promise = self.tokens_per_plain_step(depth)
        if depth == 1 or self.costs.measured(depth):
            return promise
        before = self.tokens_per_plain_step(depth - 1)
        return promise if before > self.MARGIN and promise > self.STEP_UP * before else 0.0

    def _pick(self, best: int, most: int) -> int:
        """A depth where drafts pay: the best, or now and then one beside it."""
        self._trial, self._wait = 0, self.WAIT
        self._probe -= 1
        if self._probe > 0:
            return best
        self._probe = self.PROBE_EVERY
        beside = [0, *(k for k in (best - 1, best + 1) if 0 < k <= most and not self._hopeless(k))]
        return min(beside, key=lambda k: self._last_used[k])

    def _try(self, best: int) -> int:
        """A depth where drafts do not pay: none, or a trial of the best."""
        if self._since and self._trial:
            self._trial = 0  # ended by a pause
        if self._trial:
            self._trial -= 1
            return best
        if self._drafted:  # a trial or drafting has ended
            self._drafted = False
            self._due = self._steps + self._wait
            self._wait = min(2 * self._wait, self.WAIT_MOST)
        if self._steps < self._due or self._hopeless(best):
            self._plain = max(self._due - self._steps, self.REST) - 1
            return 0
        self._trial = self.TRIAL - 1
        for i, tried in enumerate(self._tried):
            if tried > self.PRIOR_WEIGHT:
                self._passed[i] *= self.PRIOR_WEIGHT / tried
                self._tried[i] = self.PRIOR_WEIGHT
        return best

    def _hopeless(self, depth: int) -> bool:
        """Whether a depth could not pay even if all its drafts stood."""
        sure = self.costs.settled(depth)
        cost = self.costs.of(depth) if sure else self.costs.guesses[depth]
        return depth + 1 <= self.MARGIN * cost

    def _longest(self, depth: int) -> float:
        """The most that a step is taken to cost, plain steps."""
        costs = self.costs
        return 1 + 2 * (costs.of(depth) if costs.settled(depth) else costs.guesses[depth])

    def _affordable(self, depth: int, starting: bool) -> bool:
        """Whether one more step with drafts keeps what all of them lost within bounds."""
        cost = min(self.costs.of(depth), self._longest(depth)) + starting * self._start
        loss = cost - self.tokens_per_step(depth)
        return self._lost + max(0.0, loss) <= self.ALLOWANCE + self.BUDGET * self._elapsed

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        costs = self.costs
        self._steps += 1
        self._last_used[depth] = self._steps
        starting = depth > 0 and self._steps - self._used[depth] > self.CATCH_UP
        costs.add(depth, seconds, usual=not starting)
        took = seconds / costs.unit if costs.unit else 1.0
        self._elapsed += took
        if not depth:
            self._since += 1
            return
        self._since, self._drafted = 0, True
        self._used[1 : depth + 1] = [self._steps] * depth
        if starting:  # of a depth that was not drafted lately, layers have rows to make up for
            self._start = min(max(0.0, took - costs.of(depth)), self.START_MOST)
        # A step that was held up by something else says nothing about those to come.
        loss = min(took, self._longest(depth)) - (1 + accepted)
        self._lost = max(0.0, self._lost + loss)
        if loss < 0 and self._trial:
            self._trial += 1  # a trial that gains goes on
        for i in range(min(accepted + 1, depth)):  # drafts after a rejected one were not judged
            self._tried[i] = self._tried[i] * self.DISCOUNT + 1
            self._passed[i] = self._passed[i] * self.DISCOUNT + (i < accepted)

    def tokens_per_step(self, depth: int) -> float:
        """Expected tokens of one step at `depth`: 1 for the trunk and what drafts should add."""
        expected, chance = 1.0, 1.0
        for tried, passed in zip(self._tried[:depth], self._passed[:depth], strict=True):
            chance *= passed / tried
            expected += chance
        return expected

    def tokens_per_plain_step(self, depth: int) -> float:
        """Expected tokens in the time of a plain step: the speed-up over no drafts."""
        return self.tokens_per_step(depth) / self.costs.of(depth)

"""How many tokens to draft in the next step.

A policy never changes what is generated greedily (verification is exact), only how fast.
"""

from __future__ import annotations

from collections import deque
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


class AutoDepth:
    """The depth that promises the most tokens per second, from what the run itself measured.

    A step at depth k emits 1 + a_1 + a_1 a_2 + ... + a_1..a_k tokens on average, a_i being the
    chance that draft i stands once those before it did, and takes t_k seconds. Estimates: a_i by
    counting with discount (older steps weigh less; two imaginary trials, one of them passed,
    stand for the beginning), t_k as the median of the last steps at that depth, so that one
    slow step decides nothing.

    Depth after depth is tried, from 0 on, as long as one more draft could still pay if it always
    stood; then the best k = 0..max_depth is taken, drafts only if they promise more than no drafts
    by `MARGIN`. Since text and context change, every `PROBE_EVERY`-th step goes one deeper or
    shallower, in turn; as long as that changes nothing, ever more rarely.

    Steps with drafts that turn out slower than plain ones for the tokens they gave are a loss; a
    trial is made only while all losses stay below `BUDGET` of the run's time. So the run is never
    slower than one without drafts by more than that, and where drafts pay nothing is lost and
    trials follow one another.
    """

    SAMPLES = 9  # step times kept for each depth
    TRIALS = 3  # steps at each depth before the first decision
    PROBE_EVERY = 64
    PROBE_MOST = 256
    MARGIN = 1.02
    DISCOUNT = 0.98
    BUDGET = 0.01  # share of the run's time that trials may lose
    TRIAL_LOSS = 0.25  # what a trial is expected to lose, in plain steps

    def __init__(self, max_depth: int) -> None:
        self._times: list[deque[float]] = [deque(maxlen=self.SAMPLES) for _ in range(max_depth + 1)]
        self._cost = [0.0] * (max_depth + 1)  # medians of the times, 0 where there are none
        self._last_used = [0] * (max_depth + 1)
        self._tried = [2.0] * max_depth
        self._passed = [1.0] * max_depth
        self._best = 0
        self._interval = self._wait = self.PROBE_EVERY
        self._elapsed = self._lost = 0.0  # seconds

    def next_depth(self, limit: int) -> int:
        allowed = range(min(limit, len(self._times) - 1) + 1)
        for k in allowed:
            if len(self._times[k]) < self.TRIALS:
                if self._promising(k) and self._affordable(k):
                    return k
                break
        best = max(allowed, key=self.tokens_per_s)
        if self.tokens_per_s(best) <= self.MARGIN * self.tokens_per_s(0):
            best = 0
        if best != self._best:
            self._best, self._interval = best, self.PROBE_EVERY
            self._wait = self._interval
        self._wait -= 1
        if self._wait <= 0:
            self._interval = min(2 * self._interval, self.PROBE_MOST)
            self._wait = self._interval
            beside = [k for k in (best - 1, best + 1) if k in allowed and self._affordable(k)]
            return min(beside, key=lambda k: self._last_used[k], default=best)
        return best

    def _promising(self, depth: int) -> bool:
        """Whether a depth could be the best so far if its last draft always stood and cost no
        more than the one before it."""
        if depth < 2 or self._times[depth]:
            return True
        before, last = self._cost[depth - 2], self._cost[depth - 1]
        tokens = self.tokens_per_step(depth - 1)
        tokens += tokens - self.tokens_per_step(depth - 2)  # as many as the draft before it
        rate = tokens / max(2 * last - before, last, 1e-9)
        return rate > max(self.tokens_per_s(k) for k in range(depth))

    def _affordable(self, depth: int) -> bool:
        """Whether one more trial keeps what all of them lost within the budget."""
        if depth == 0:
            return True
        expected = self.TRIAL_LOSS * self._cost[0]
        return self._lost + expected <= self.BUDGET * self._elapsed

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        self._elapsed += seconds
        if depth:  # gains make up for earlier losses, but are no credit for later ones
            self._lost = max(0.0, self._lost + seconds - (1 + accepted) * self._cost[0])
        self._last_used[depth] = max(self._last_used) + 1
        times = self._times[depth]
        times.append(seconds)
        self._cost[depth] = max(sorted(times)[len(times) // 2], 1e-9)
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

    def tokens_per_s(self, depth: int) -> float:
        """Expected speed at `depth`; 0 while that depth has not been measured."""
        cost = self._cost[depth]
        return self.tokens_per_step(depth) / cost if cost else 0.0

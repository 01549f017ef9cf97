"""How many tokens to draft in the next step.

A policy never changes what is generated greedily (verification is exact), only how fast. It may
be kept for the next text of the same open model, which then starts from what was learned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol


class DraftPolicy(Protocol):
    """Chooses the draft depth of each step and is told what came of it.

    Attributes:
        mtp: the number of drafts that was asked for, or "auto".
        most: the most drafts that it ever wants.
        looking: whether the drafts that were last asked for are only to be compared with the token
            that comes, not verified.
    """

    mtp: int | str
    most: int
    looking: bool

    def begin(self) -> None:
        """Another text begins, of the same model; the last one may have ended anywhere."""

    def next_depth(self, limit: int) -> int:
        """Drafts for the next step, at most `limit` (tokens or positions that remain)."""

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        """A step drafted `depth` tokens, `accepted` of them stood, all in `seconds`."""

    def looked(self, stood: float, seconds: float) -> None:
        """A step whose one draft was not verified: the chance that it would have stood, which is 0
        or 1 in greedy text, and the step's seconds, drafting included."""


class FixedDepth:
    """Always the same depth, except where the cache has fewer positions left."""

    looking = False

    def __init__(self, depth: int) -> None:
        self.mtp: int | str = depth
        self.most = depth

    def begin(self) -> None:
        pass

    def next_depth(self, limit: int) -> int:
        return min(self.most, limit)

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        pass

    def looked(self, stood: float, seconds: float) -> None:
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
        """Cost of a step, no less than that of the depth before it; of a depth that was not
        measured, the guess, as far off as the guess for the depth before it was."""
        if depth == 0:
            return 1.0
        before = self.of(depth - 1)
        if known := self._known[depth]:
            return max(known, before)
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

    The first drafts are verified at once. Later, drafting starts with a step that *looks*: one
    token is drafted, not verified, and compared with the one that comes. That costs the MTP layer
    alone, a fraction of what a rejected draft does. Where drafts do not pay, looks are made after
    a while, ever more rarely, starting from little belief in what was counted before; one that
    hits is followed by the next. Where drafts pay, every `PROBE_EVERY`-th step goes without, one
    deeper or one shallower, in turn.

    What looks and steps with drafts lose against plain ones is summed up, gains making up for
    losses, but for no more than `CREDIT` to come. No look is made that is expected to bring this
    sum above `ALLOWANCE` plain steps and the share `BUDGET` of the run, and unless `SURE` or
    more judged drafts say that they pay, no step with drafts that would bring it above `RISK` and
    that share if all fell, or, after one that stood, in the mean. So much, and what a step more
    loses, a run can be slower than without drafts. A step that took far longer than any at its
    depth should, held up by something else, is counted as a long one only.

    The next text keeps the counts if drafts paid, with the weight of `KEPT_WEIGHT` trials at most,
    so that another kind of text is soon known for one. Where they did not, it is believed in like a
    first text. Costs are measured anew: few steps tell them, they differ with the context, and one
    that an accident made wrong should not be kept. The sum of losses begins anew too; of what all
    texts gained, as far as it is remembered (`KEPT_GAIN`), each may lose the share `KEPT_CREDIT`.

    Args:
        max_depth: the most drafts.
        guesses: costs of a step with 1, 2, ... drafts in plain steps, as bytes tell them.
    """

    PRIOR = 0.8  # published for the first MTP layer: 0.88
    PRIOR_WEIGHT = 4.0
    DOUBT_WEIGHT = 2.0  # of what was counted before a look
    DISCOUNT = 0.98
    LATELY = 0.9  # discount of what is looked at when much was lost
    MARGIN = 1.02
    STEP_UP = 1.03
    PROBE_EVERY = 64
    BUDGET = 0.004  # share of the run's time that drafts may lose
    ALLOWANCE = 0.6  # plain steps that looks may lose besides
    RISK = 1.3  # plain steps that steps with drafts may lose besides
    SURE = 6  # judged drafts after which what was counted is believed
    CREDIT = 3.0  # plain steps gained that may be lost again
    WAIT, WAIT_MOST = 8, 1024  # plain steps between looks
    REST = 8  # plain steps until the allowance is looked at again
    LEAST_LEFT = 24  # tokens that are still to come when drafting starts
    HORIZON = 128  # tokens in which a start must pay for itself
    LOOK_MOST = 2.0  # plain steps that a look is taken to cost at most, besides its own
    CATCH_UP = 4  # steps after which MTP layers that were not drafted from have rows to make up for
    KEPT_WEIGHT = 12.0  # trials that earlier texts stand for at most
    KEPT_GAIN = 6.0  # plain steps that earlier texts have gained at most
    KEPT_CREDIT = 0.25  # share of them that a text may lose again

    def __init__(self, max_depth: int, guesses: Sequence[float] | None = None) -> None:
        self.mtp: int | str = "auto"
        self.most = max_depth
        self.costs = StepCosts([1.0] * max_depth if guesses is None else guesses)
        self._tried = [self.PRIOR_WEIGHT] * max_depth
        self._passed = [self.PRIOR * self.PRIOR_WEIGHT] * max_depth
        self._first = 0.0, 0.0  # first drafts judged lately, and how many of them stood
        self._last_used = [0] * (max_depth + 1)
        self._plain = 0  # steps without drafts that have been decided on
        self._since = self.CATCH_UP  # steps since the last one with drafts
        self._used = [-self.CATCH_UP] * (max_depth + 1)  # last step of so many drafts or more
        self._drafted = False  # or looked, since the next look was planned
        self._hit = False  # the last draft at first place stood, or would have
        self._wait, self._due = self.WAIT, 0  # plain steps between looks; step of the next one
        self._probe = self.PROBE_EVERY
        # What a look costs, plain steps: about half of what one draft does goes into drafting it.
        self._look = (self.costs.guesses[1] - 1) / 2 if max_depth else 0.0
        self._looks: deque[float] = deque(maxlen=3)
        self._steps, self._elapsed, self._lost = 0, 0.0, 0.0  # the latter two in plain steps
        self._gained = 0.0  # by all texts, plain steps
        self.looking = False

    def begin(self) -> None:
        self._plain, self._since = 0, self.CATCH_UP
        self._used = [-self.CATCH_UP] * len(self._used)
        self._drafted = self._hit = self.looking = False
        self._first = 0.0, 0.0
        self._wait, self._due = self.WAIT, self._steps
        self._gained = min(max(-self.CREDIT, self._gained), self.KEPT_GAIN)
        self._elapsed, self._lost = 0.0, -self.KEPT_CREDIT * max(0.0, self._gained)
        best = max(map(self._promise, range(1, self.most + 1)), default=0.0)
        self.costs = StepCosts(self.costs.guesses[1:])
        if best > self.MARGIN:
            for i, tried in enumerate(self._tried):
                self._weigh(i, min(tried, self.KEPT_WEIGHT))
            return
        self._tried = [self.PRIOR_WEIGHT] * self.most
        self._passed = [self.PRIOR * self.PRIOR_WEIGHT] * self.most

    def next_depth(self, limit: int) -> int:
        self.looking = False
        if self._plain:
            self._plain -= 1
            return 0
        most = min(limit, self.most, self.costs.reach)
        if most < 1 or not self.costs.ready:
            return 0
        starting = self._since >= self.CATCH_UP
        if starting and limit < self.LEAST_LEFT:
            return 0
        best = max(range(1, most + 1), key=self._promise)
        gain = self.tokens_per_plain_step(best) - 1
        pays = gain > self.MARGIN - 1
        if starting and gain * min(limit, self.HORIZON) <= self._look:
            pays = False
        if not pays or (starting and self._used[1] > 0):
            return self._try(best, pays)
        depth = self._pick(best, most) if self._first[0] else 1
        while depth and not self._affordable(depth):
            depth -= 1
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
        self._wait = self.WAIT
        self._probe -= 1
        if self._probe > 0:
            return best
        self._probe = self.PROBE_EVERY
        beside = [0, *(k for k in (best - 1, best + 1) if 0 < k <= most and not self._hopeless(k))]
        return min(beside, key=lambda k: self._last_used[k])

    def _try(self, best: int, pays: bool) -> int:
        """A depth where drafts do not pay, or are to be started: none, or a look."""
        again = self._hit and not self._since
        if not (pays or again):
            if self._drafted:  # looks or drafting have ended
                self._drafted = False
                self._due = self._steps + self._wait
                self._wait = min(2 * self._wait, self.WAIT_MOST)
            if self._steps < self._due or self._hopeless(best):
                self._plain = max(self._due - self._steps, self.REST) - 1
                return 0
        if self._lost + self._look > self.ALLOWANCE + self.BUDGET * self._elapsed:
            self._plain = self.REST - 1
            return 0
        if not (pays or again):
            self._first = 0.0, 0.0
            for i, tried in enumerate(self._tried):
                self._weigh(i, min(tried, self.DOUBT_WEIGHT))
        self.looking = True
        return 1

    def _hopeless(self, depth: int) -> bool:
        """Whether a depth could not pay even if all its drafts stood."""
        sure = self.costs.settled(depth)
        cost = self.costs.of(depth) if sure else self.costs.guesses[depth]
        return depth + 1 <= self.MARGIN * cost

    def _longest(self, depth: int) -> float:
        """The most that a step is taken to cost, plain steps."""
        costs = self.costs
        return 1 + 2 * (costs.of(depth) if costs.settled(depth) else costs.guesses[depth])

    def _affordable(self, depth: int) -> bool:
        """Whether a step with drafts that all fall keeps what was lost within bounds (after one
        that stood: in the mean), or enough first drafts were judged to say, without any belief,
        that one pays."""
        judged, stood = self._first
        if judged >= self.SURE and 1 + stood / judged > self.MARGIN * self.costs.of(1):
            return True
        worst = min(self.costs.of(depth), self._longest(depth)) - 1
        if self._hit:
            worst *= 1 - self._passed[0] / self._tried[0]
        return self._lost + worst <= self.RISK + self.BUDGET * self._elapsed

    def update(self, depth: int, accepted: int, seconds: float) -> None:
        starting = depth > 0 and self._steps + 1 - self._used[depth] > self.CATCH_UP
        self.costs.add(depth, seconds, usual=not starting)
        took = self._took(seconds)
        self._last_used[depth] = self._steps
        if not depth:
            self._since += 1
            return
        self._hit = accepted > 0
        self._drew(depth)
        # A step that was held up by something else says nothing about those to come.
        loss = min(took, self._longest(depth)) - (1 + accepted)
        most = self.RISK + self.BUDGET * self._elapsed  # more is not worth waiting longer for
        self._lost = min(max(-self.CREDIT, self._lost + loss), most)
        self._gained -= loss
        for i in range(min(accepted + 1, depth)):  # drafts after a rejected one were not judged
            self._judge(i, i < accepted)

    def looked(self, stood: float, seconds: float) -> None:
        loss = min(max(0.0, self._took(seconds) - 1), self.LOOK_MOST)
        self._looks.append(loss)
        self._look = _median(self._looks)
        self._lost += loss
        self._gained -= loss
        self._drew(1)
        self._judge(0, stood)
        self._hit = stood >= 0.5

    def _took(self, seconds: float) -> float:
        """One more step: its plain steps."""
        self._steps += 1
        took = seconds / self.costs.unit if self.costs.unit else 1.0
        self._elapsed += took
        return took

    def _drew(self, depth: int) -> None:
        """MTP layers have run, in the step that was just counted."""
        self._since, self._drafted = 0, True
        self._used[1 : depth + 1] = [self._steps] * depth

    def _weigh(self, place: int, weight: float) -> None:
        """Let what was counted stand for so many trials."""
        self._passed[place] *= weight / self._tried[place]
        self._tried[place] = weight

    def _judge(self, place: int, stood: float) -> None:
        if place == 0:
            judged, held = self._first
            self._first = judged * self.LATELY + 1, held * self.LATELY + stood
        self._tried[place] = self._tried[place] * self.DISCOUNT + 1
        self._passed[place] = self._passed[place] * self.DISCOUNT + stood

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

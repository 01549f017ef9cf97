"""Whole jobs: how long a chat, an agent's task or a repository takes on a machine, and its cost.

A profile is a list of turns. A turn brings new input (a question, a tool's result), then the model
thinks and answers; reasoning leaves the history when the next turn starts (unless the profile
keeps it), so that the answer before it has to be read again at its new position. What the cache
already holds of the history costs nothing. Every speed comes from the one estimator, at the depth
that the cache has reached by then.

Profiles are TOML files: the shipped ones in `hwmodel/workloads`, or a user's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmodel.candidate import Candidate
from hwmodel.cost import API_MODEL, Terms, api_usd
from hwmodel.devices import read_toml
from hwmodel.errors import RequestError, UnknownNameError
from hwmodel.files import STDIN
from hwmodel.predict import predict

MAX_TURNS = 10_000
MAX_TOKENS = 10_000_000
_STRETCH = 4096  # decode is estimated anew after so many tokens
_TURN_KEYS = ("input_tokens", "answer_tokens", "reasoning_tokens", "wait_s", "repeat", "restart")
_TOP_KEYS = (
    "turns", "name", "title", "about", "source", "keep_reasoning", "prefix_reuse", "schema",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One exchange: tokens brought, thought and answered; seconds spent waiting for tools.

    `restart` empties the history first (a new conversation over the same machine).
    """

    input_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    wait_s: float = 0.0
    restart: bool = False


@dataclass(frozen=True)
class Profile:
    """A job. `prefix_reuse` says that the engine keeps the history's cache between turns."""

    name: str
    title: str
    about: str
    turns: tuple[Turn, ...]
    keep_reasoning: bool = False
    prefix_reuse: bool = True


def profile_names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(p.stem for p in _folder().glob("*.toml")))


def _folder() -> Path:
    return Path(__file__).parent / "workloads"


def load_profile(name: str) -> Profile:
    """A profile by name, or by the path of a TOML file (`-`: standard input).

    Raises:
        UnknownNameError: no such profile.
        RequestError: the file is not valid; names the entry.
        DeviceFileError: the file cannot be read.
    """
    if name.endswith(".toml") or name == STDIN:
        return parse_profile(read_toml(Path(name)), "standard input" if name == STDIN else name)
    if name not in profile_names():
        import difflib

        near = difflib.get_close_matches(name, profile_names(), n=3, cutoff=0.3)
        raise UnknownNameError("workload", name, tuple(near or profile_names()))
    return parse_profile(read_toml(_folder() / f"{name}.toml"), name)


def parse_profile(raw: Mapping[str, Any], file: str) -> Profile:
    """A profile from its TOML form.

    Raises:
        RequestError: an unknown or missing entry, or a number out of range.
    """
    _check_keys(file, "", raw, _TOP_KEYS)
    listed = raw.get("turns")
    if not isinstance(listed, list) or not listed or not all(isinstance(t, dict) for t in listed):
        raise RequestError(f"{file}: expected [[turns]] with input_tokens and answer_tokens")
    turns: list[Turn] = []
    for i, entry in enumerate(listed):
        _check_keys(file, f"turns[{i}].", entry, _TURN_KEYS)
        repeat = _count(file, i, entry, "repeat", 1, 1, MAX_TURNS)
        one = Turn(
            input_tokens=_count(file, i, entry, "input_tokens", None, 0, MAX_TOKENS),
            reasoning_tokens=_count(file, i, entry, "reasoning_tokens", 0, 0, MAX_TOKENS),
            answer_tokens=_count(file, i, entry, "answer_tokens", None, 0, MAX_TOKENS),
            wait_s=_number(file, i, entry, "wait_s", 0, 0, 1e6),
            restart=_flag(file, f"turns[{i}].", entry, "restart", False),
        )
        turns += [one] * repeat
        if len(turns) > MAX_TURNS:
            raise RequestError(f"{file}: more than {MAX_TURNS:,} turns")
    return Profile(
        name=str(raw.get("name", Path(file).stem)),
        title=str(raw.get("title", raw.get("name", Path(file).stem))),
        about=str(raw.get("about", "")),
        turns=tuple(turns),
        keep_reasoning=_flag(file, "", raw, "keep_reasoning", False),
        prefix_reuse=_flag(file, "", raw, "prefix_reuse", True),
    )


def _check_keys(file: str, where: str, entry: Mapping[str, Any], known: tuple[str, ...]) -> None:
    extra = sorted(set(entry) - set(known))
    if extra:
        raise RequestError(f"{file}: unknown key '{where}{extra[0]}', expected {', '.join(known)}")


def _flag(file: str, where: str, entry: Mapping[str, Any], key: str, default: bool) -> bool:
    value = entry.get(key, default)
    if not isinstance(value, bool):
        raise RequestError(f"{file}: {where}{key} is {value!r:.40}, expected true or false")
    return value


def _count(
    file: str, turn: int, entry: Mapping[str, Any], key: str, default: int | None, low: int,
    high: int,
) -> int:  # fmt: skip
    value = _number(file, turn, entry, key, default, low, high)
    if value != int(value):
        raise RequestError(f"{file}: turns[{turn}].{key} is {value!r:.40}, expected a whole number")
    return int(value)


def _number(
    file: str, turn: int, entry: Mapping[str, Any], key: str, default: float | None, low: float,
    high: float,
) -> float:  # fmt: skip
    value = entry.get(key, default)
    if value is None:
        raise RequestError(f"{file}: turns[{turn}].{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(
            f"{file}: turns[{turn}].{key} is {value!r:.40}, expected {low:,.0f} to {high:,.0f}"
        )
    return value


@dataclass(frozen=True)
class Step:
    """What one turn computes: tokens read into the cache behind `cached` ones, tokens written.

    `depth` is the cache before anything is written.
    """

    cached: int
    read: int
    reasoning: int
    answer: int
    wait_s: float

    @property
    def depth(self) -> int:
        """Tokens in the cache when the first token is written."""
        return self.cached + self.read


def steps_of(profile: Profile) -> Iterator[Step]:
    """The turns of a profile with the state of the cache at each."""
    history = 0  # tokens of the conversation as the next prompt repeats it
    valid = 0  # how many of them the cache holds at the right position
    for turn in profile.turns:
        if turn.restart:
            history = valid = 0
        prompt = history + turn.input_tokens
        cached = valid if profile.prefix_reuse else 0
        yield Step(cached, prompt - cached, turn.reasoning_tokens, turn.answer_tokens, turn.wait_s)
        kept = turn.reasoning_tokens if profile.keep_reasoning else 0
        history = prompt + kept + turn.answer_tokens
        # dropped reasoning shifts the answer: only what came before it stays valid
        dropped = turn.reasoning_tokens and not profile.keep_reasoning
        valid = prompt if dropped else history


@dataclass(frozen=True)
class Phase:
    """One kind of work over the whole job."""

    name: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """The answer: a profile on a machine.

    Attributes:
        phases: prefill, reasoning, answer, waiting; their seconds add up to the wall time.
        cached_tokens: prompt tokens that the cache spared.
        peak_tokens: longest context reached.
        fits: whether that context fits the machine.
        drafts: drafts per step that decode was estimated with.
        low_s, high_s: wall time with every estimate at an end of its band.
        status: `extrapolated` where any estimate is.
    """

    profile: Profile
    candidate: Candidate
    phases: tuple[Phase, ...]
    cached_tokens: int
    peak_tokens: int
    fits: bool
    drafts: int
    low_s: float
    high_s: float
    status: str

    @property
    def seconds(self) -> float:
        """Wall time of the whole job."""
        return sum(p.seconds for p in self.phases)

    def tokens(self, name: str) -> int:
        """Tokens of one phase."""
        return next(p.tokens for p in self.phases if p.name == name)

    @property
    def output_tokens(self) -> int:
        """Tokens written, reasoning included."""
        return self.tokens("reasoning") + self.tokens("answer")

    @property
    def api_usd(self) -> float | None:
        """What the vendor's own service asks for the job; None for other models."""
        if self.candidate.run.model.name != API_MODEL:
            return None
        return api_usd(self.tokens("prefill"), self.cached_tokens, self.output_tokens)

    def usd(self, usd_per_h: float | None) -> float | None:
        """Cost of the machine for the job's wall time."""
        return None if usd_per_h is None else usd_per_h * self.seconds / 3600


def run_job(profile: Profile, candidate: Candidate, drafts: int = 0) -> Job:
    """Estimate a profile on a machine, one sequence at a time.

    Raises:
        RequestError: a speed cannot be predicted.
    """
    clock = _Clock(candidate, drafts)
    spent = {"prefill": 0.0, "reasoning": 0.0, "answer": 0.0, "waiting": 0.0}
    count = dict.fromkeys(spent, 0)
    cached = peak = 0
    for step in steps_of(profile):
        spent["prefill"] += clock.prefill(step.cached, step.read)
        spent["reasoning"] += clock.decode(step.depth, step.reasoning)
        spent["answer"] += clock.decode(step.depth + step.reasoning, step.answer)
        spent["waiting"] += step.wait_s
        count["prefill"] += step.read
        count["reasoning"] += step.reasoning
        count["answer"] += step.answer
        cached += step.cached
        peak = max(peak, step.depth + step.reasoning + step.answer)
    waiting = spent["waiting"]
    total = sum(spent.values()) - waiting
    holds = dataclasses.replace(candidate, context=max(1, peak)).holds
    return Job(
        profile=profile,
        candidate=candidate,
        phases=tuple(Phase(name, count[name], spent[name]) for name in spent),
        cached_tokens=cached,
        peak_tokens=peak,
        fits=holds and peak <= candidate.run.model.max_context,
        drafts=drafts,
        low_s=waiting + total * clock.fastest,
        high_s=waiting + total * clock.slowest,
        status="extrapolated" if clock.extrapolated else "calibrated",
    )


class _Clock:
    """Seconds of prefill and decode; remembers the widest band that it met."""

    def __init__(self, candidate: Candidate, drafts: int) -> None:
        self.candidate, self.drafts = candidate, drafts
        self.fastest, self.slowest = 1.0, 1.0
        self.extrapolated = False
        self._seen: dict[tuple[int, int], float] = {}

    def prefill(self, depth: int, tokens: int) -> float:
        if tokens <= 0:
            return 0.0
        run = self.candidate.at(depth=depth, prompt_tokens=tokens, concurrency=1, drafts=0)
        return tokens / self._speed(run, "prefill_tok_s")

    def decode(self, depth: int, tokens: int) -> float:
        """The integral over the growing depth, in stretches."""
        seconds, done = 0.0, 0
        while done < tokens:
            n = min(_STRETCH, tokens - done)
            middle = depth + done + n // 2
            near = middle - middle % max(1, middle // 32)  # depths alike need no new estimate
            run = self.candidate.at(depth=near, concurrency=1, drafts=self.drafts)
            seconds += n / self._speed(run, "decode_tok_s", (near, self.drafts))
            done += n
        return seconds

    def _speed(self, run: Any, quantity: Any, key: tuple[int, int] | None = None) -> float:
        if key is not None and key in self._seen:
            return self._seen[key]
        found = predict(run, quantity)
        if not found.value or found.low is None or found.high is None:
            raise RequestError(f"no speed can be predicted: {found.reason}")
        self.fastest = min(self.fastest, found.value / found.high)
        self.slowest = max(self.slowest, found.value / found.low)
        self.extrapolated |= found.status != "calibrated"
        if key is not None:
            self._seen[key] = found.value
        return found.value


def job_costs(job: Job, terms: Terms) -> dict[str, float | None]:
    """Dollars of the job by way of paying; `api` is the vendor's own service."""
    return {
        "bought": job.usd(terms.owned_usd_per_h),
        "rented": job.usd(terms.rent_usd_per_h),
        "electricity": job.usd(terms.electricity_usd_per_h),
        "api": job.api_usd,
    }

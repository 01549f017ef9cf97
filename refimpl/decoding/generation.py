"""What a generation is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from refimpl.decoding.sampling import GREEDY, SamplingParams
from refimpl.decoding.stopping import FinishReason
from refimpl.errors import InputError


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: stop after that many; 0 only runs the prompt.
        sampling: how each token is picked.
        mtp: drafts in each step, or "auto" for as many as pay off (`policy.AutoDepth`).
        stop_tokens: ids that end the text; None means the configuration's `eos_token_id`.
        stop_strings: texts that end the text, across token borders too.
        context: the most tokens that prompt and continuation may run through the trunk; None
            means the configuration's `max_position_embeddings`.
        prefill_chunk: tokens of the prompt that are run at a time.

    Raises:
        InputError: a value is outside its range.
    """

    max_new_tokens: int = 128
    sampling: SamplingParams = GREEDY
    mtp: int | Literal["auto"] = 0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    context: int | None = None
    prefill_chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_chunk", "context"):
            value, least = getattr(self, name), 0 if name == "max_new_tokens" else 1
            if value is not None and value < least:
                shown = name.replace("_", "-")
                raise InputError(f"{shown} is {value}, expected {least} or more")
        if self.mtp != "auto" and self.mtp < 0:
            raise InputError(f"mtp is {self.mtp}, expected 0 or more drafts, or 'auto'")


@dataclass(frozen=True)
class StepRecord:
    """One trunk pass after the prefill.

    Attributes:
        drafted: drafts that the pass verified.
        ids: tokens that it added, cut where the text ended.
        seconds: drafting, trunk pass and verification.
    """

    drafted: int
    ids: tuple[int, ...]
    seconds: float

    @property
    def accepted(self) -> int:
        """Tokens that the drafts gained: those beyond the one that a pass gives anyway.

        Where the text ends inside a step, the drafts after its end count as not accepted, so
        that the number of new tokens is always 1 + steps + accepted.
        """
        return len(self.ids) - 1


@dataclass(frozen=True)
class DraftStats:
    """Drafts over a whole generation.

    Attributes:
        steps: trunk passes after the prefill.
        drafted: drafts verified.
        accepted: drafts that stood (see `StepRecord.accepted`).
        drafted_by_position: drafts verified at 1st, 2nd, ... place.
        accepted_by_position: those of them that stood, together with all before them.
    """

    steps: int
    drafted: int
    accepted: int
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]

    @classmethod
    def of(cls, records: list[StepRecord]) -> DraftStats:
        """The sums over `records`."""
        depth = max((r.drafted for r in records), default=0)
        places = range(depth)
        return cls(
            steps=len(records),
            drafted=sum(r.drafted for r in records),
            accepted=sum(r.accepted for r in records),
            drafted_by_position=tuple(sum(r.drafted > i for r in records) for i in places),
            accepted_by_position=tuple(sum(r.accepted > i for r in records) for i in places),
        )


@dataclass(frozen=True)
class Timings:
    """Seconds, callbacks excluded except in `ttft_s`.

    Attributes:
        prompt_tokens: tokens of the prompt; `reused_tokens` of them were in a cache already.
        prefill_s: the rest of the prompt through the trunk (and the MTP layers, if they draft).
        ttft_s: from the call to the first token, None where none came.
        decode_s: all steps after that.
    """

    prompt_tokens: int
    prefill_s: float
    ttft_s: float | None
    decoded_tokens: int
    decode_s: float
    reused_tokens: int = 0

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Speed of the prefill; None where nothing was measured."""
        ran = self.prompt_tokens - self.reused_tokens
        return ran / self.prefill_s if ran and self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed of the tokens after the first; None where there were none."""
        return self.decoded_tokens / self.decode_s if self.decode_s > 0 else None


@dataclass(frozen=True)
class Generation:
    """The continuation of a prompt and how it came about.

    Attributes:
        ids: the new tokens, including the stop token or those that spell the stop string.
        text: their text without stop token or stop string; "" if no decoder was given.
        finish_reason: "stop" (stop token or string), "length" (max_new_tokens), "context" (no
            position left), "interrupted" (Ctrl-C).
        seed: the seed of the sampling; None if greedy.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seed: int | None
    timings: Timings
    mtp: DraftStats

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for `json.dumps`."""
        t, m = self.timings, self.mtp
        return {
            "text": self.text,
            "ids": list(self.ids),
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "timings": {
                "prompt_tokens": t.prompt_tokens,
                "reused_tokens": t.reused_tokens,
                "prefill_s": t.prefill_s,
                "prefill_tokens_per_s": t.prefill_tokens_per_s,
                "ttft_s": t.ttft_s,
                "decoded_tokens": t.decoded_tokens,
                "decode_s": t.decode_s,
                "decode_tokens_per_s": t.decode_tokens_per_s,
            },
            "mtp": {
                "steps": m.steps,
                "drafted": m.drafted,
                "accepted": m.accepted,
                "drafted_by_position": list(m.drafted_by_position),
                "accepted_by_position": list(m.accepted_by_position),
            },
        }

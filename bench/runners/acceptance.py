"""What servers tell of their drafts: each in its own words, brought to drafted and accepted.

* llama-server: `timings.draft_n`, `timings.draft_n_accepted` in the answer (its README).
* vLLM: `metrics.speculative_decoding` in the answer's last event where the server was started with
  `--per-request-spec-decode-metrics` (docs.vllm.ai, "Per-Request Acceptance Metrics"), and the
  counters `vllm:spec_decode_num_*_total` of `/metrics`, which count since the server began.
* SGLang: `sglext.spec_tokens_details` in a stream's event of its own where the request asks for it
  by `return_spec_tokens_details`, `meta_info` where the answer carries it (in both
  `spec_num_correct_drafts` and `spec_num_proposed_drafts`; in older versions' `meta_info`
  `spec_accept_token_num` and `spec_draft_token_num`); at `/metrics` the counters
  `sglang:spec_verify_calls_total` and `sglang:generation_tokens_total`; at `/server_info` (before:
  `/get_server_info`) `internal_states[].avg_spec_accept_length`, a mean since the server began,
  with `speculative_num_draft_tokens` beside it (SGLang's protocol, metrics collector, tokenizer
  manager and scheduler, as of 0.5.23).

An acceptance length counts the token that every step gives anyway; `accepted` does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.runners.base import RunnerError
from bench.runners.stream import Answer, Client

Page = Callable[[str], str]

_SAMPLE = re.compile(r"^((?:vllm|sglang):\w+?)(?:_total)?(?:\{([^}]*)\})?[ \t]+([\d.eE+-]+)", re.M)
_POSITION = re.compile(r'position="(\d{1,2})"')
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
_LARGEST = 1e15


@dataclass(frozen=True)
class Told:
    """What a server's pages say at one moment.

    Attributes:
        counters: sums over engines and labels, by name without `_total`.
        positions: drafts accepted at each position.
        accept_length: mean tokens a verification gives, since the server began.
        drafts: tokens drafted a step, as the server is set.
    """

    counters: Mapping[str, float] = field(default_factory=dict)
    positions: tuple[float, ...] = ()
    accept_length: float | None = None
    drafts: int | None = None

    def count(self, name: str) -> float:
        """A counter, 0 where it is not there."""
        return self.counters.get(name, 0.0)


def ask_server(client: Client, engine: str) -> Told:
    """Read the pages of a vLLM or SGLang server; nothing where it has none or cannot be reached."""
    if engine not in ("vLLM", "SGLang"):
        return Told()
    counters, positions = _metrics(_page(client, "/metrics"))
    if engine == "vLLM":
        return Told(counters, positions)
    info = _json(_page(client, "/server_info")) or _json(_page(client, "/get_server_info"))
    return Told(counters, (), *_server_info(info))


def llama_server_drafts(client: Client) -> bool:
    """Whether a llama-server says at `/slots` that it drafts; not where it has no such page."""
    try:
        slots = json.loads(_page(client, "/slots") or "[]")
    except (ValueError, RecursionError):
        return False
    told = slots if isinstance(slots, list) else []
    return any(isinstance(s, dict) and s.get("speculative") is True for s in told)


def _page(client: Client, path: str) -> str:
    try:
        return client.get(path)
    except RunnerError:
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(text: str) -> tuple[dict[str, float], tuple[float, ...]]:
    """The samples of a Prometheus page: summed by name, and those by position in order."""
    counters: dict[str, float] = {}
    by_position: dict[int, float] = {}
    for name, labels, number in _SAMPLE.findall(text):
        value = _number(number)
        if value is None:
            continue
        at = _POSITION.search(labels)
        if name == _PER_POSITION and at:
            by_position[int(at[1])] = by_position.get(int(at[1]), 0.0) + value
        else:
            counters[name] = counters.get(name, 0.0) + value
    return counters, tuple(by_position[i] for i in sorted(by_position))


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if 0 <= found < _LARGEST else None


def _server_info(info: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Acceptance length (mean over the engines) and drafts a step."""
    states = info.get("internal_states")
    states = [s for s in states if isinstance(s, dict)] if isinstance(states, list) else []
    told = [_number(s.get("avg_spec_accept_length")) for s in (*states, info)]
    lengths = [v for v in told if v is not None and v >= 1]
    for place in (*states, info):
        # the tokens verified at once hold the one that needs no draft, in chains as in trees
        rows, steps = place.get("speculative_num_draft_tokens"), place.get("speculative_num_steps")
        for value, less in ((rows, 1), (steps, 0)):
            if type(value) is int and 0 < value - less < 64:
                return (sum(lengths) / len(lengths) if lengths else None), value - less
    return (sum(lengths) / len(lengths) if lengths else None), None


def acceptance(answers: Sequence[Answer], before: Told, after: Told) -> dict[str, Any]:
    """Columns of a record: drafted, accepted, their ratio, tokens a verification gives, drafts a
    step, and how the server told them; all None where it told nothing.

    Counters are those of these answers alone only where nobody else asks the server meanwhile.
    """
    drafted = sum(a.drafted or 0 for a in answers)
    accepted = sum(a.accepted or 0 for a in answers)
    if drafted > 0:
        steps = sum(a.draft_steps or 0 for a in answers)
        length, each = (1 + accepted / steps, drafted / steps) if steps else (None, None)
        return _columns(drafted, accepted, length, "each answer", each=each)
    for found in (_from_vllm(before, after), _from_sglang(before, after)):
        if found is not None:
            return found
    if after.accept_length is not None and after.drafts:
        share = min(1.0, (after.accept_length - 1) / after.drafts)
        source = "the server's mean since it began"
        return _columns(None, None, after.accept_length, source, share, after.drafts)
    return _columns(None, None, None, "")


def _from_vllm(before: Told, after: Told) -> dict[str, Any] | None:
    head = "vllm:spec_decode_num_"

    def grown(name: str) -> float:
        return after.count(head + name) - before.count(head + name)

    drafted, accepted, steps = (grown(k) for k in ("draft_tokens", "accepted_tokens", "drafts"))
    if drafted <= 0 or not 0 <= accepted <= drafted:
        return None
    length, each = (1 + accepted / steps, drafted / steps) if steps > 0 else (None, None)
    found = _columns(round(drafted), round(accepted), length, "the server's counters", each=each)
    if steps > 0 and after.positions:
        old = (*before.positions, *(0.0,) * len(after.positions))
        grew = [a - b for a, b in zip(after.positions, old, strict=False)]
        found["accepted_by_position"] = [round(g / steps, 4) for g in grew]
    return found


def _from_sglang(before: Told, after: Told) -> dict[str, Any] | None:
    calls, tokens, requests = (
        after.count(f"sglang:{k}") - before.count(f"sglang:{k}")
        for k in ("spec_verify_calls", "generation_tokens", "num_requests")
    )
    tokens -= max(0.0, requests)  # the first of each comes from the prompt, without drafts
    if calls <= 0 or tokens < calls:
        return None
    length = tokens / calls
    accepted = round(tokens - calls)
    drafted = round(calls * after.drafts) if after.drafts else None
    if drafted is not None and accepted > drafted:
        drafted = None
    return _columns(drafted, accepted, length, "the server's counters", each=after.drafts)


def _columns(
    drafted: int | None, accepted: int | None, length: float | None, told_by: str,
    share: float | None = None, each: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    if drafted and accepted is not None:
        share = accepted / drafted
    return {
        "drafted": drafted, "accepted": accepted, "acceptance": share,
        "acceptance_length": length, "acceptance_told_by": told_by,
        "drafts_a_step": None if each is None else round(each, 2),
    }  # fmt: skip

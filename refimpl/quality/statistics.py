"""The statistics file: what a model does on a text, for `hwmodel plan --stats` and for people.

`acceptance_by_position` and `distinct_experts` are the fields that the cost model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from refimpl.backend import Array, Backend
from refimpl.errors import InputError
from refimpl.quality.clustered import Measured
from refimpl.quality.drafts import Conditional, figures, looped, teacher_forced
from refimpl.quality.routing import Routing
from refimpl.quality.windows import Window
from refimpl.reference.trace import Trace

KIND = "step-flash-statistics"
VERSION = 1
TEMPERATURE = 1.0
_PIECE = 256
Progress = Callable[[int, int], None]


class Traced(Backend, Protocol):
    """A backend that can say which experts it chose, and run its MTP layers over a text."""

    def prefill(
        self, tokens: Any, cache: Any, all_logits: bool = False, trace: Trace | None = None
    ) -> Any:
        """As `Backend.prefill`, with a trace."""

    def mtp_teacher_forced(self, tokens: Any, hidden: Array) -> list[tuple[Array, Array]]:
        """Logits and block outputs of every MTP layer over a known text."""


def statistics(
    model: Traced,
    windows: Sequence[Window],
    *,
    loops: int = 8,
    new_tokens: int = 64,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that is counted over `windows`.

    Args:
        loops: windows whose first half is continued by the draft-and-verify loop (0: none).
        new_tokens: tokens of each continuation.

    Raises:
        InputError: a number below its least.
    """
    if loops < 0 or new_tokens < 1:
        raise InputError(f"loops is {loops} and new-tokens {new_tokens}, expected 0 and 1 or more")
    config = model.config
    depth = config.num_nextn_predict_layers
    routing = Routing(config.moe_layers, config.moe_num_experts, config.moe_top_k)
    forced, greedy, sampled = Conditional(depth), Conditional(depth), Conditional(depth)
    picked = _spread(len(windows), loops) if depth else []
    total = len(windows) + len(picked)
    for i, window in enumerate(windows):
        _forced(model, window, routing, forced)
        if progress is not None:
            progress(i + 1, total)
    for i, at in enumerate(picked):
        prompt = windows[at].tokens[: max(1, len(windows[at].tokens) // 2)]
        room = min(new_tokens, config.max_position_embeddings - len(prompt))
        greedy.add(*looped(model, prompt, depth, 0.0, seed + i, room))
        sampled.add(*looped(model, prompt, depth, TEMPERATURE, seed + i, room))
        if progress is not None:
            progress(len(windows) + i + 1, total)
    return _record(windows, routing if config.moe_layers else None, forced, greedy, sampled, picked)


def _forced(model: Traced, window: Window, routing: Routing, forced: Conditional) -> None:
    """One window through trunk and MTP layers."""
    tokens, config = window.tokens, model.config
    cache = model.new_cache(len(tokens))
    trace = Trace(record=frozenset({"route_idx", "route_margin"}))
    hidden, choices = [], []
    for at in range(0, len(tokens), _PIECE):
        step = model.prefill(tokens[at : at + _PIECE], cache, all_logits=True, trace=trace)
        hidden.append(step.hidden)
        choices.append(step.logits.argmax(axis=-1))
    if config.moe_layers:
        routing.add(
            [trace.rows("route_idx", i) for i in config.moe_layers],
            [trace.rows("route_margin", i) for i in config.moe_layers],
        )
    if config.num_nextn_predict_layers and len(tokens) > config.num_nextn_predict_layers:
        heads = model.mtp_teacher_forced(tokens, np.concatenate(hidden))
        forced.add(*teacher_forced(np.concatenate(choices), [x.argmax(axis=-1) for x, _ in heads]))


def _record(
    windows: Sequence[Window],
    routing: Routing | None,
    forced: Conditional,
    greedy: Conditional,
    sampled: Conditional,
    picked: Sequence[int],
) -> dict[str, Any]:
    shares = forced.shares()
    record: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "windows": len(windows),
        "tokens": sum(len(w.tokens) for w in windows),
    }
    if shares:
        record["acceptance_by_position"] = [x.value for x in shares]
        record["drafts"] = {"teacher_forced": figures(forced)}
        if picked:
            record["drafts"]["loop_greedy"] = figures(greedy)
            record["drafts"]["loop_sampled"] = figures(sampled) | {"temperature": TEMPERATURE}
    if routing is not None:
        found = routing.distinct_experts()
        record["distinct_experts"] = {str(n + 1): x.value for n, x in enumerate(found)}
        record["overlap"] = {
            "standard_errors": [_error(x) for x in found],
            "independent": routing.independent(),
        }
        record["expert_load"] = routing.counts.tolist()
        record["load_by_layer"] = routing.layer_figures()
        record["routing_margin"] = routing.margins()
    return record


def _error(x: Measured) -> float | None:
    return x.standard_error


def _spread(windows: int, wanted: int) -> list[int]:
    """At most `wanted` window numbers, evenly spaced."""
    return sorted({int(i) for i in np.linspace(0, windows - 1, min(wanted, windows))})

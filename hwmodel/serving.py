"""Many sequences at once: how large a batch may be, and what a token then costs in device time.

A `RunConfig` stands for one machine or rack; its `concurrency` is varied. Speeds come from the one
estimator, room from the memory ledger with the whole depth in every sequence's cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hwmodel.memory import ledger
from hwmodel.predict import predict
from hwmodel.run import Estimate, RunConfig

MAX_BATCH = 1 << 14


@dataclass(frozen=True)
class ServingPoint:
    """A batch that runs: `decode` is per sequence, the machine makes `batch` times as much.

    `limited_by` says what keeps the batch from growing: `speed` (a sequence would be slower than
    asked) or `memory`.
    """

    run: RunConfig
    batch: int
    decode: Estimate
    limited_by: str

    @property
    def tok_s(self) -> float:
        """Tokens/s of each sequence."""
        return self.decode.value or 0.0

    @property
    def total_tok_s(self) -> float:
        """Tokens/s of all sequences together."""
        return self.batch * self.tok_s

    @property
    def device_s_per_token(self) -> float:
        """Device-seconds that one generated token takes."""
        return self.run.device_count / self.total_tok_s if self.total_tok_s else float("inf")


def at_batch(run: RunConfig, batch: int) -> RunConfig:
    """The run with so many sequences."""
    return dataclasses.replace(run, workload=dataclasses.replace(run.workload, concurrency=batch))


def has_room(run: RunConfig) -> bool:
    """Whether weights, buffers and all caches at the workload's depth fit the devices."""
    tokens = (run.workload.depth or 0) + run.workload.generated_tokens
    return ledger(run, max(1, tokens)).margin_bytes >= 0


def serve(run: RunConfig, batch: int) -> ServingPoint:
    """A batch as stated, whether it has room or not."""
    asked = at_batch(run, batch)
    return ServingPoint(asked, batch, predict(asked, "decode_tok_s"), "")


def largest_batch(run: RunConfig, tok_s: float = 0.0) -> ServingPoint | None:
    """The largest batch that fits and gives each sequence at least `tok_s`; None where 1 does not.

    Both conditions are monotone in the batch, so the limit is found by halving.
    """

    def fits(batch: int) -> bool:
        return has_room(at_batch(run, batch))

    def fast(batch: int) -> bool:
        return (serve(run, batch).decode.value or 0.0) >= tok_s

    if not (fits(1) and fast(1)):
        return None
    low, high = 1, MAX_BATCH
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle) and fast(middle):
            low = middle
        else:
            high = middle
    found = serve(run, low)
    return dataclasses.replace(found, limited_by="speed" if fits(low + 1) else "memory")

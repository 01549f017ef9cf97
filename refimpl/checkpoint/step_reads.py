"""Bytes of weights that decoding steps read: what makes a step with drafts dearer than a plain one.

Rows of one step share all tensors but the routed experts. Of these, a row chooses its own; with
routers that choose independently, n rows choose E (1 - (1 - k/E)^n) of E distinct ones, k being
those of one row. Neighbouring rows of real text agree more often, so this is an upper limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.checkpoint.source import WeightSource
from refimpl.inventory import inventory


@dataclass(frozen=True)
class StepReads:
    """Bytes by what a step needs them for.

    Attributes:
        shared: of the trunk without routed experts, with its head; read once in each step.
        expert: of one expert in every MoE layer.
        experts, chosen: how many there are in a layer, and how many a row chooses.
        drafts: of each MTP layer with its head.
    """

    shared: int
    expert: int
    experts: int
    chosen: int
    drafts: tuple[int, ...]

    def step(self, rows: int) -> float:
        """Expected bytes of a step of `rows` rows through the trunk."""
        if not self.expert:
            return self.shared
        distinct = self.experts * (1 - (1 - self.chosen / self.experts) ** rows)
        return self.shared + self.expert * distinct

    def draft_cost(self, depth: int) -> float:
        """Expected bytes of a step that drafts and verifies `depth` tokens, over a plain one's."""
        return (self.step(depth + 1) + sum(self.drafts[:depth])) / self.step(1)


def step_reads(source: WeightSource) -> StepReads:
    """What steps of a checkpoint read."""
    c = source.config
    shared = expert = 0
    drafts = [0] * c.num_nextn_predict_layers
    for spec in inventory(c):
        if spec.key == "embed_tokens":
            continue  # one row
        size = source.stored_bytes(spec.key, spec.layer)
        if spec.layer is not None and spec.layer >= c.num_hidden_layers:
            drafts[spec.layer - c.num_hidden_layers] += size
        elif spec.is_stacked:
            expert += size // spec.shape[0]
        else:
            shared += size
    return StepReads(shared, expert, c.moe_num_experts, c.moe_top_k, tuple(drafts))

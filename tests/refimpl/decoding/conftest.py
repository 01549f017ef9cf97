"""A small backend with a known distribution: a seeded Markov model of order two.

It implements `refimpl.backend.Backend` and checks that the loop keeps the protocol: every
verified row reaches the MTP layers once, in order, with the token that follows it.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import numpy as np
import pytest

from refimpl.backend import Step
from refimpl.config import ModelConfig

VOCAB = 13


def tiny_config(mtp: int = 3, eos: tuple[int, ...] = (), context: int = 512) -> ModelConfig:
    n = 1 + mtp
    return ModelConfig(
        hidden_size=3,
        intermediate_size=4,
        num_hidden_layers=1,
        num_nextn_predict_layers=mtp,
        vocab_size=VOCAB,
        num_attention_heads=2,
        num_attention_groups=1,
        head_dim=4,
        sliding_attention_heads=2,
        sliding_window=4,
        layer_types=("full_attention",) + ("sliding_attention",) * mtp,
        rope_theta=(1e4,) * n,
        partial_rotary_factors=(1.0,) * n,
        moe_layers=(),
        moe_num_experts=1,
        moe_top_k=1,
        moe_intermediate_size=1,
        share_expert_dim=1,
        moe_router_scaling_factor=1.0,
        swiglu_limits=(0.0,) * n,
        swiglu_limits_shared=(0.0,) * n,
        max_position_embeddings=context,
        eos_token_id=eos,
    )


@dataclass
class FakeCache:
    capacity: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0  # rows that the MTP layers have seen

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, n: int) -> None:
        assert 0 <= n <= 3
        del self.tokens[len(self.tokens) - n :]

    def shorten_history(self, keep: int) -> None:
        assert keep >= 0

    def snapshot(self) -> tuple[int, int]:
        return len(self.tokens), self.fed

    def restore(self, snapshot: tuple[int, int]) -> None:
        length, self.fed = snapshot
        assert length <= len(self.tokens)
        del self.tokens[length:]


class MarkovBackend:
    """Logits of the next token depend on the last two; drafts use the same mixed with noise.

    `wrong` = 0 drafts from the very same distribution, 1 from an unrelated one.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, wrong: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        self.config = config
        self._last = rng.normal(0, 1.5, (VOCAB, VOCAB))
        self._before = rng.normal(0, 1.0, (VOCAB, VOCAB))
        noise = rng.normal(0, 2.0, (3, VOCAB, VOCAB))
        self._draft = [(1 - wrong) * self._last + wrong * n for n in noise]
        self._keep = 1 - wrong
        self.passes = 0
        self.depths: list[int] = []

    def new_cache(self, capacity: int) -> FakeCache:
        return FakeCache(capacity)

    def logits(self, before: int, last: int) -> np.ndarray:
        return self._last[last] + self._before[before]

    def _run(self, tokens, cache: FakeCache) -> Step:
        start = cache.length
        cache.tokens += [int(t) for t in tokens]
        assert cache.length <= cache.capacity, "more positions used than the cache has"
        seen = cache.tokens
        logits = [self.logits(seen[max(i - 1, 0)], seen[i]) for i in range(start, len(seen))]
        hidden = [[i, seen[i], seen[max(i - 1, 0)]] for i in range(start, len(seen))]
        return Step(np.array(logits), np.array(hidden, dtype=float))

    def prefill(self, tokens, cache: FakeCache, all_logits: bool = False) -> Step:
        step = self._run(tokens, cache)
        return step if all_logits else Step(step.logits[-1:], step.hidden)

    def decode(self, tokens, cache: FakeCache) -> Step:
        assert 1 <= len(tokens) <= 4
        self.passes += 1
        return self._run(tokens, cache)

    def draft_cost(self, depth: int) -> float:
        return 1 + 0.2 * depth

    def draft(self, cache: FakeCache, hidden, next_tokens, depth, choose) -> list[int]:
        assert len(hidden) == len(next_tokens) > 0
        assert 0 <= depth <= self.config.num_nextn_predict_layers
        for row, token in zip(hidden, next_tokens, strict=True):
            position = int(row[0])
            assert position == cache.fed, "a row was left out or came twice"
            assert row[1] == cache.tokens[position]
            if position + 1 < cache.length:
                assert token == cache.tokens[position + 1], "not the token that follows the row"
            cache.fed += 1
        assert cache.fed == cache.length, "a verified row was not passed on"
        self.depths.append(depth)
        before, last = int(hidden[-1][1]), int(next_tokens[-1])
        drafts: list[int] = []
        for k in range(depth):
            logits = self._draft[k][last] + self._keep * self._before[before]
            before, last = last, choose(logits)
            drafts.append(last)
        return drafts


class ByteDecoder:
    """Text of the fake vocabulary, in which one character takes three tokens to spell."""

    PIECES = (b"a", b"b", b"ab", b"ba", b"\n", b"e", b"end", b"\xe2", b"\x82", b"\xac", b"c", b"d")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self.PIECES[token % len(self.PIECES)])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


@pytest.fixture(scope="session")
def config():
    return tiny_config


@pytest.fixture(scope="session")
def markov():
    return MarkovBackend


@pytest.fixture(scope="session")
def new_decoder():
    return ByteDecoder

"""A moment of a cache takes no memory for rings until rows that it needs are to be overwritten."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from refimpl.engine.caches import EngineCache
from refimpl.engine.fields import Kv


@pytest.fixture
def model(engine: Any) -> Any:
    return engine("tiny_a", "f32", micro_batch=16)


def rows(count: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(5, 300, count).tolist()
    return drawn


def run(model: Any, cache: EngineCache, tokens: list[int]) -> np.ndarray:
    logits: np.ndarray = model.prefill(tokens, cache, all_logits=True).logits
    return logits


def room(cache: EngineCache) -> int:
    """Tokens that the trunk can run from here before a ring's oldest needed row goes."""
    return min(
        layer.overwritten_at(cache.length) - cache.length
        for layer in cache.layers
        if layer.record[Kv.SLOTS] < cache.capacity
    )


def test_rings_are_copied_when_the_first_row_that_is_needed_would_go(model: Any) -> None:
    cache = model.new_cache(512)
    run(model, cache, rows(300))
    moment, free = cache.snapshot(), room(cache)
    assert 16 <= free < 64
    for token in rows(free, 1):
        model.decode([token], cache)
        assert moment.rows is None
    model.decode([7], cache)
    assert moment.rows is not None
    ring = next(layer for layer in cache.layers if layer.record[Kv.SLOTS] < cache.capacity)
    assert sum(part.nbytes for part in moment.rows[0]) < ring.nbytes


@pytest.mark.parametrize("more", [3, 40, 150])
def test_back_at_a_moment_everything_has_the_same_bits(model: Any, more: int) -> None:
    cache = model.new_cache(512)
    run(model, cache, rows(300))
    moment = cache.snapshot()
    expected = run(model, cache, rows(20, 1))
    for seed in (2, 3):
        cache.restore(moment)
        run(model, cache, rows(more, seed))
        cache.restore(moment)
        np.testing.assert_array_equal(run(model, cache, rows(20, 1)), expected)


def test_moments_outlive_each_other(model: Any) -> None:
    """Coming back to the older one writes into the rings; the younger one must not lose by it."""
    cache = model.new_cache(512)
    run(model, cache, rows(200))
    older = cache.snapshot()
    run(model, cache, rows(100, 1))
    younger = cache.snapshot()
    assert older.rows is not None
    assert younger.rows is None
    expected = run(model, cache, rows(10, 2))
    cache.restore(older)
    assert younger.rows is not None
    cache.tokens += rows(100, 1)  # full layers still have these rows
    cache.restore(younger)
    np.testing.assert_array_equal(run(model, cache, rows(10, 2)), expected)


def test_a_moment_that_nobody_holds_is_not_copied_for(model: Any) -> None:
    cache = model.new_cache(512)
    run(model, cache, rows(300))
    moment = cache.snapshot()
    assert list(cache._moments) == [moment]
    del moment
    assert not len(cache._moments)


def drafted(model: Any, cache: EngineCache, tokens: list[int]) -> list[np.ndarray]:
    """Logits of the trunk and of two drafts in each step, `tokens` being the verified ones."""
    seen: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> int:
        seen.append(logits.copy())
        return int(np.argmax(logits))

    for token, following in pairwise(tokens):
        step = model.decode([token], cache)
        seen.append(step.logits[0].copy())
        model.draft(cache, step.hidden, [following], 2, choose)
    return seen


@pytest.mark.parametrize("more", [3, 60])
def test_back_at_a_moment_drafts_have_the_same_bits(model: Any, more: int) -> None:
    """Rings of MTP layers included, into which drafts go that did not stand."""
    cache, prompt = model.new_cache(512), rows(200)
    step = model.prefill(prompt, cache)
    model.draft(cache, step.hidden, [*prompt[1:], 7], 2, lambda row: int(np.argmax(row)))
    moment = cache.snapshot()
    first = moment.places[1][1]
    assert moment.places[1] == (cache.mtp.start[0], first) and first < 300
    expected = drafted(model, cache, [7, *rows(12, 1)])
    for seed in (2, 3):
        cache.restore(moment)
        drafted(model, cache, [7, *rows(more, seed)])
        assert (moment.rows is None) == (more == 3)
        cache.restore(moment)
        found = drafted(model, cache, [7, *rows(12, 1)])
        cache.restore(moment)
        assert len(found) == len(expected) == 36
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)

"""What drafting keeps: rows of drafts that stood, the newest rows only, tables of rotations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from refimpl.engine.model import EngineModel
from refimpl.engine.rotations import Rotations
from refimpl.reference.rope import angles

Engine = Callable[..., EngineModel]
Prompt = Callable[[int], list[int]]


def drafts_after(model: EngineModel, cache, ids: list[int], at: int, chosen: list[int]):  # type: ignore[no-untyped-def]
    """Logits of three drafts behind ids[:at], which the cache holds but for the newest."""
    seen: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> int:
        seen.append(logits)
        return chosen[len(seen) - 1]

    first = cache.mtp.rows
    hidden = cache_rows[id(cache)][first : at - 1]
    model.draft(cache, hidden, ids[first + 1 : at], 3, choose)
    return np.stack(seen)


cache_rows: dict[int, np.ndarray] = {}


def filled(model: EngineModel, ids: list[int]):  # type: ignore[no-untyped-def]
    """A cache that the trunk has run `ids` into, and no MTP layer has seen."""
    cache = model.new_cache(64)
    cache_rows[id(cache)] = model.prefill(ids, cache).hidden
    return cache


@pytest.mark.parametrize("stood", range(4))
def test_rows_of_drafts_that_stood_are_not_run_again(
    engine: Engine, prompt: Prompt, stood: int
) -> None:
    """The next drafts have the bits that they have when every row is run anew."""
    model, ids = engine("tiny_a", "q8_0"), prompt(30)
    text, next_at = ids[:20], 21 + stood
    guesses = [t if i < stood else (t + 1) % 320 for i, t in enumerate(ids[20:23])]
    logits, rows = [], []
    for forget in (False, True):
        cache = model.new_cache(64)
        cache_rows[id(cache)] = model.prefill(text[:-1], cache).hidden
        drafts_after(model, cache, ids, 20, guesses)
        step = model.decode(ids[19 : next_at - 1], cache)
        cache_rows[id(cache)] = np.concatenate([cache_rows[id(cache)], step.hidden])
        if forget:
            cache.mtp.restore(cache.mtp.snapshot())
        before = model.program.runs.total()
        counted: list[int] = []
        run = model.program.run
        model.program.run = lambda h, *a, run=run, to=counted: (to.append(len(h)), run(h, *a))[1]  # type: ignore[method-assign,misc]
        logits.append(drafts_after(model, cache, ids, next_at, [1, 2, 3]))
        model.program.run = run  # type: ignore[method-assign]
        assert model.program.runs.total() - before == 3
        rows.append(counted)
    np.testing.assert_array_equal(logits[0], logits[1])
    new = 1 + stood
    assert rows[1] == [new, new + 1, new + 2]
    assert rows[0] == [new, max(new, 2), max(new, 3)]


def test_a_shortened_history_is_all_that_drafts_rest_on(engine: Engine, prompt: Prompt) -> None:
    """Whatever lies in the MTP layers' caches before it: zeros, or random rows."""
    model, ids = engine("tiny_a", "q8_0"), prompt(40)
    logits = []
    for noise in (False, True):
        cache = filled(model, ids[:30])
        if noise:
            for layer in cache.layers[model.config.num_hidden_layers :]:
                layer.fill_synthetic(np.random.default_rng(1))
        cache.mtp.rows = 29
        cache.mtp.add(0, cache_rows[id(cache)][:29])
        cache.shorten_history(4)
        logits.append(drafts_after(model, cache, ids, 31, [1, 2, 3]))
        assert [cache.mtp.first(k) for k in range(3)] == [25, 25, 25]
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_state_keeps_where_a_shortened_history_begins(engine: Engine, prompt: Prompt) -> None:
    model, ids = engine("tiny_a", "q8_0"), prompt(40)
    cache = filled(model, ids[:30])
    cache.mtp.rows = 29
    cache.mtp.add(0, cache_rows[id(cache)][:29])
    cache.shorten_history(4)
    drafts_after(model, cache, ids, 31, [1, 2, 3])
    again = model.new_cache(64)
    again.refill(cache.export())
    assert [again.mtp.first(k) for k in range(3)] == [25, 25, 25]


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (63, 4), (64, 2), (60, 8), (5, 1), (130, 100), (127, 3)]
)
def test_rotations_are_those_of_the_positions(start: int, count: int) -> None:
    freqs = [np.linspace(0.1, 1, 16), np.linspace(0.01, 0.5, 32)]
    rotations = Rotations(freqs, 100)
    for at in (62, start):
        rotations.use(at, count)
    for i, f in enumerate(freqs):
        for places, wanted in zip(
            rotations.places, angles(np.arange(start, start + count), f), strict=True
        ):
            kind = ctypes.c_float * (count * len(f))
            got = np.ctypeslib.as_array(kind.from_address(int(places[i])))
            np.testing.assert_array_equal(got.reshape(count, -1), wanted.astype(np.float32))

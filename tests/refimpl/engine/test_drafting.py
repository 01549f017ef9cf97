"""What drafting keeps: rows of drafts that stood, the newest rows only, tables of rotations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.backend import Array
from refimpl.engine.caches import EngineCache
from refimpl.engine.drafting import MtpState
from refimpl.engine.fields import Kv
from refimpl.engine.model import EngineModel
from refimpl.engine.rotations import Rotations
from refimpl.errors import InputError
from refimpl.reference.rope import angles

Engine = Callable[..., EngineModel]
Prompt = Callable[[int], list[int]]


def drafts_after(
    model: EngineModel,
    cache: EngineCache,
    hidden: Array,
    ids: list[int],
    at: int,
    chosen: list[int],
) -> Array:
    """Logits (3, V) of three drafts behind ids[:at], of which the trunk has run all but the newest
    and given the rows `hidden` (at - 1, H); `chosen` are taken for them."""
    seen: list[Array] = []

    def choose(logits: Array) -> int:
        seen.append(logits)
        return chosen[len(seen) - 1]

    first = cache.mtp.rows
    model.draft(cache, hidden[first:], ids[first + 1 : at], 3, choose)
    return np.stack(seen)


@pytest.mark.parametrize("stood", range(4))
def test_rows_of_drafts_that_stood_are_not_run_again(
    engine: Engine, prompt: Prompt, stood: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next drafts have the bits that they have when every row is run anew."""
    model, ids = engine("tiny_a", "q8_0"), prompt(30)
    guesses = [t if i < stood else (t + 1) % 320 for i, t in enumerate(ids[20:23])]
    logits, rows = [], []
    for forget in (False, True):
        cache = model.new_cache(64)
        hidden = model.prefill(ids[:19], cache).hidden
        drafts_after(model, cache, hidden, ids, 20, guesses)
        more = model.decode(ids[19 : 20 + stood], cache).hidden
        if forget:
            cache.mtp.restore(cache.mtp.snapshot())
        with monkeypatch.context() as patch:
            counted: list[int] = []
            run = model.program.run

            def counting(u: Array, *rest: Any, run: Any = run, to: list[int] = counted) -> Any:
                to.append(len(u))
                return run(u, *rest)

            patch.setattr(model.program, "run", counting)
            both = np.concatenate([hidden, more])
            logits.append(drafts_after(model, cache, both, ids, 21 + stood, [1, 2, 3]))
        rows.append(counted)
    np.testing.assert_array_equal(logits[0], logits[1])
    new = 1 + stood
    assert rows[1] == [new, new + 1, new + 2]
    assert rows[0] == [new, max(new, 2), max(new, 3)]


def shortened(model: EngineModel, ids: list[int], noise: bool = False) -> tuple[EngineCache, Array]:
    """A cache after ids[:30], and drafts that rest on the newest five rows of it."""
    cache = model.new_cache(64)
    older = model.prefill(ids[:29], cache).hidden
    if noise:
        for layer in cache.layers[model.config.num_hidden_layers :]:
            layer.fill_synthetic(np.random.default_rng(1))
    model.draft(cache, older, ids[1:30], 0, int)
    cache.shorten_history(4)
    hidden = np.concatenate([older, model.decode(ids[29:30], cache).hidden])
    return cache, drafts_after(model, cache, hidden, ids, 31, [1, 2, 3])


def test_a_shortened_history_is_all_that_drafts_rest_on(engine: Engine, prompt: Prompt) -> None:
    """Whatever lies in the MTP layers' caches before it: zeros, or random rows."""
    model, ids = engine("tiny_a", "q8_0"), prompt(40)
    cache, drafts = shortened(model, ids)
    assert [cache.mtp.first(k) for k in range(3)] == [25, 25, 25]
    np.testing.assert_array_equal(drafts, shortened(model, ids, noise=True)[1])


def test_a_state_keeps_where_a_shortened_history_begins(engine: Engine, prompt: Prompt) -> None:
    """Drafts from it are those of the cache that it was made from."""
    model, ids = engine("tiny_a", "q8_0"), prompt(40)
    cache, _ = shortened(model, ids)
    again = model.new_cache(64)
    again.refill(cache.export())
    assert [again.mtp.first(k) for k in range(3)] == [25, 25, 25]
    drafts = []
    for one in (cache, again):
        more = model.decode(ids[30:32], one).hidden
        hidden = np.concatenate([np.empty((30, more.shape[1]), np.float32), more])
        drafts.append(drafts_after(model, one, hidden, ids, 33, [1, 2, 3]))
    np.testing.assert_array_equal(drafts[0], drafts[1])


@pytest.mark.parametrize("first", [-1, 31, 2**40])
def test_a_history_that_begins_where_no_row_is_was_never_saved(
    engine: Engine, prompt: Prompt, first: int
) -> None:
    model, ids = engine("tiny_a", "q8_0"), prompt(40)
    arrays = shortened(model, ids)[0].export()
    arrays["mtp.first"] = np.array([25, 25, first])
    with pytest.raises(InputError, match="rows done in MTP layer 2, the first of them at"):
        model.new_cache(64).refill(arrays)


def test_what_was_left_out_is_not_taken_for_run_when_its_draft_stands() -> None:
    """Rows of levels 1 and 2 took drafts for their tokens and then had to go."""
    state = MtpState([np.zeros(int(Kv.SIZE), np.int64) for _ in range(3)], 16)
    row = np.ones((1, 4), np.float32)
    state.start = [20, 19, 18]
    state.add(1, row)
    state.add(2, row)
    state.note(20, [7, 8, 9], [row[:0], row, np.concatenate([row, row])])
    state.shorten(0)
    state.confirm([*range(20), 6, 7, 8, 9])
    assert state.start == [20, 20, 19]
    assert [state.waiting(k) for k in range(3)] == [0, 0, 0]


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

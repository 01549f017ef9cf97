"""A kept cache: the next generation of a conversation runs only what is new, and says the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.kept import KeptCache
from refimpl.reference.model import ReferenceModel


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_turn_says_what_a_fresh_run_says(data, markov, config) -> None:
    mtp = data.draw(st.sampled_from([0, 2, 3, "auto"]), label="mtp")
    chunk = data.draw(st.integers(1, 7), label="chunk")
    options = GenerateOptions(max_new_tokens=9, mtp=mtp, prefill_chunk=chunk, context=512)
    backend = markov(config(), 1, 0.3)
    kept, prompt = KeptCache(backend, 512), data.draw(tokens(1), label="first prompt")
    for _ in range(4):
        mark = data.draw(st.integers(0, len(prompt)), label="mark")
        made = generate(backend, prompt, options, kept=kept, mark=mark)
        fresh = generate(markov(config(), 1, 0.3), prompt, options)
        assert made.ids == fresh.ids
        held = [*prompt, *made.ids]
        keep = data.draw(st.integers(0, len(held)), label="kept tokens")
        prompt = held[:keep] + data.draw(tokens(1), label="new tokens")


def tokens(least: int):
    return st.lists(st.integers(0, 12), min_size=least, max_size=8)


def test_what_follows_the_last_answer_is_all_that_runs(markov, config) -> None:
    backend = markov(config())
    kept, options = KeptCache(backend, 64), GenerateOptions(max_new_tokens=5, context=64)
    first = generate(backend, [1, 2, 3], options, kept=kept)
    second = generate(backend, [1, 2, 3, *first.ids, 4, 5], options, kept=kept)
    assert (first.timings.reused_tokens, second.timings.reused_tokens) == (0, 3 + 4)


def test_a_dropped_end_goes_back_to_the_mark(markov, config) -> None:
    """As when the reasoning of the last answer is left out of the next prompt."""
    backend = markov(config())
    kept, options = KeptCache(backend, 64), GenerateOptions(max_new_tokens=9, context=64)
    generate(backend, [1, 2, 3, 4, 5], options, kept=kept, mark=3)
    again = generate(backend, [1, 2, 3, 4, 9, 9], options, kept=kept)
    assert again.timings.reused_tokens == 3
    other = generate(backend, [1, 2, 7], options, kept=kept)
    assert other.timings.reused_tokens == 0


def test_after_memory_was_refused_a_new_cache_is_made(markov, config) -> None:
    backend = markov(config())
    kept, options = KeptCache(backend, 64), GenerateOptions(max_new_tokens=5, context=64)
    first = generate(backend, [1, 2, 3], options, kept=kept)
    new_cache, backend.new_cache = backend.new_cache, _refused
    with pytest.raises(MemoryError):
        generate(backend, [7, 8], options, kept=kept)
    backend.new_cache = new_cache
    again = generate(backend, [1, 2, 3, *first.ids, 4], options, kept=kept)
    assert again.timings.reused_tokens == 0 and again.ids


def _refused(*_) -> None:
    raise MemoryError


def test_an_interrupted_pass_is_not_continued_from(markov, config) -> None:
    backend = markov(config())
    kept, options = KeptCache(backend, 64), GenerateOptions(max_new_tokens=9, context=64)
    decode, backend.decode = backend.decode, _interrupted
    cut = generate(backend, [1, 2, 3, 4], options, kept=kept, mark=2)
    backend.decode = decode
    assert cut.finish_reason == "interrupted"
    after = generate(backend, [1, 2, 3, 4, *cut.ids, 5], options, kept=kept)
    assert after.timings.reused_tokens == 2
    assert after.ids == generate(markov(config()), [1, 2, 3, 4, *cut.ids, 5], options).ids


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("mtp", [0, 3])
def test_the_reference_rings_and_mtp_layers_come_back_exactly(tiny, mtp: int) -> None:
    """Back to the mark over far more rows than a ring can be rolled back by."""
    model = ReferenceModel(tiny("tiny_a"), "float64")
    options = GenerateOptions(max_new_tokens=24, mtp=mtp, context=200, stop_tokens=())
    prompt = np.random.default_rng(0).integers(5, 300, 30).tolist()
    kept = KeptCache(model, 200)
    first = generate(model, prompt, options, kept=kept, mark=20)
    branch = [*prompt[:21], 7, 8, 9]
    for after in (branch, [*prompt[:21], 8, 8], [*prompt, *first.ids, 3]):
        made = generate(model, after, options, kept=kept, mark=20)
        fresh = generate(model, after, options)
        assert made.timings.reused_tokens == 20
        assert made.ids == fresh.ids
        assert made.mtp == fresh.mtp

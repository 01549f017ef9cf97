"""The generation loop: any draft depth gives plain greedy text, and the books always balance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refimpl.decoding.generate import generate, policy_for
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import SamplingParams
from refimpl.errors import InputError

SAMPLED = SamplingParams(temperature=1.0, seed=7)


def plain_greedy(backend, prompt: list[int], n: int, stops: frozenset[int]) -> list[int]:
    """The simplest loop there is: no cache to roll back, no drafts."""
    seen = list(prompt)
    while len(seen) < len(prompt) + n and not (len(seen) > len(prompt) and seen[-1] in stops):
        seen.append(
            int(np.argmax(backend.logits(seen[-2] if len(seen) > 1 else seen[-1], seen[-1])))
        )
    return seen[len(prompt) :]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_greedy_ids_are_plain_greedy_for_any_depth_stop_and_length(data, markov, config) -> None:
    prompt = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=9), label="prompt")
    eos = tuple(data.draw(st.sets(st.integers(0, 12), max_size=2), label="eos"))
    n = data.draw(st.integers(1, 40), label="max_new_tokens")
    mtp = data.draw(st.sampled_from([0, 1, 2, 3, "auto"]), label="mtp")
    chunk = data.draw(st.integers(1, 10), label="chunk")
    wrong = data.draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]), label="wrong")
    seed = data.draw(st.integers(0, 3), label="seed")
    backend = markov(config(eos=eos), seed, wrong)
    options = GenerateOptions(max_new_tokens=n, mtp=mtp, prefill_chunk=chunk)
    made = generate(backend, prompt, options)
    expected = plain_greedy(backend, prompt, n, frozenset(eos))
    assert list(made.ids) == expected
    assert made.finish_reason == ("stop" if expected[-1] in eos else "length")
    check_books(made, backend, mtp)


def check_books(made, backend, mtp) -> None:
    """What must hold of the statistics of every generation."""
    stats = made.mtp
    assert len(made.ids) == 1 + stats.steps + stats.accepted
    assert stats.steps == backend.passes
    assert stats.accepted <= stats.drafted
    assert sum(stats.drafted_by_position) == stats.drafted
    assert sum(stats.accepted_by_position) == stats.accepted
    drafts, stood = stats.drafted_by_position, stats.accepted_by_position
    assert sorted(drafts, reverse=True) == list(drafts)
    assert all(a <= d for a, d in zip(stood, drafts, strict=True))
    if mtp != "auto":
        assert stats.drafted == mtp * stats.steps
    assert made.timings.decoded_tokens == max(0, len(made.ids) - 1)
    json.loads(json.dumps(made.as_json(), allow_nan=False))


@pytest.mark.parametrize("mtp", [0, 1, 2, 3, "auto"])
def test_sampled_books_balance_and_the_seed_repeats_the_run(markov, config, mtp) -> None:
    runs = []
    for _ in range(2):
        backend = markov(config(), wrong=0.3)
        options = GenerateOptions(max_new_tokens=60, mtp=mtp, sampling=SAMPLED)
        runs.append(generate(backend, [1, 2, 3], options))
        check_books(runs[-1], backend, mtp)
    assert runs[0].seed == 7
    if mtp != "auto":  # auto depends on measured times, and sampled text on the depth
        assert runs[0].ids == runs[1].ids


def test_a_run_without_a_seed_names_the_one_it_drew(markov, config) -> None:
    options = GenerateOptions(max_new_tokens=30, sampling=SamplingParams(temperature=1.0))
    first = generate(markov(config()), [1], options)
    again = SamplingParams(temperature=1.0, seed=first.seed)
    second = generate(markov(config()), [1], GenerateOptions(max_new_tokens=30, sampling=again))
    assert first.ids == second.ids
    assert generate(markov(config()), [1], GenerateOptions(max_new_tokens=1)).seed is None


def test_without_drafts_the_mtp_layers_are_left_alone(markov, config) -> None:
    backend = markov(config())
    generate(backend, [1, 2, 3], GenerateOptions(max_new_tokens=5, prefill_chunk=1))
    assert backend.depths == []


def test_a_fixed_depth_always_drafts_that_many(markov, config) -> None:
    backend = markov(config(), wrong=1.0)
    generate(backend, [1, 2, 3], GenerateOptions(max_new_tokens=9, mtp=2, prefill_chunk=2))
    assert backend.depths[0] == 0  # the first chunk of the prompt
    assert set(backend.depths[1:]) == {2}


@pytest.mark.parametrize("mtp", [0, 1, 2, 3, "auto"])
@pytest.mark.parametrize("prompt_length", [1, 17, 20])
def test_generation_stops_at_the_context(markov, config, mtp, prompt_length: int) -> None:
    backend = markov(config(context=20), wrong=0.1)
    prompt = [int(i) % 13 for i in range(prompt_length)]
    made = generate(backend, prompt, GenerateOptions(max_new_tokens=99, mtp=mtp))
    # The trunk has 20 positions and runs every token but the newest.
    assert len(made.ids) == 21 - prompt_length
    assert made.finish_reason == "context"
    assert list(made.ids) == plain_greedy(backend, prompt, len(made.ids), frozenset())
    assert len(made.ids) == 1 + made.mtp.steps + made.mtp.accepted


def test_a_smaller_context_can_be_asked_for(markov, config) -> None:
    made = generate(markov(config()), [1, 2], GenerateOptions(context=6))
    assert (len(made.ids), made.finish_reason) == (5, "context")


def text_of(ids, new_decoder) -> str:
    decoder = new_decoder()
    return "".join(map(decoder.push, ids)) + decoder.finish()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_text_the_same_way_at_any_depth(
    data, markov, config, new_decoder
) -> None:
    seed = data.draw(st.integers(0, 50), label="seed")
    backend = markov(config(), seed)
    plain = generate(
        backend, [seed % 13], GenerateOptions(max_new_tokens=40), new_decoder=new_decoder
    )
    assert plain.text == text_of(plain.ids, new_decoder)
    start = data.draw(st.integers(0, max(0, len(plain.text) - 1)), label="start")
    stop = plain.text[start : start + data.draw(st.integers(1, 4), label="length")] or "none"
    assume("\ufffd" not in stop)  # an incomplete character may stand at the very end
    for mtp in (0, 1, 2, 3):
        shown: list[str] = []
        options = GenerateOptions(max_new_tokens=40, mtp=mtp, stop_strings=(stop,))
        made = generate(
            backend,
            [seed % 13],
            options,
            new_decoder=new_decoder,
            on_tokens=lambda _, text, shown=shown: shown.append(text),
        )
        assert made.text == plain.text.split(stop)[0]
        assert "".join(shown) == made.text
        assert made.ids == plain.ids[: len(made.ids)]
        if stop in plain.text:
            assert made.finish_reason == "stop"
            # No token more than the stop string needs.
            assert stop not in text_of(made.ids[:-1], new_decoder)


def test_the_stop_token_has_no_text(markov, config, new_decoder) -> None:
    free = generate(markov(config()), [1], GenerateOptions(max_new_tokens=9))
    stop = free.ids[4]
    options = GenerateOptions(stop_tokens=(stop,))
    made = generate(markov(config()), [1], options, new_decoder=new_decoder)
    assert made.ids == free.ids[: free.ids.index(stop) + 1]
    assert made.text == text_of(made.ids[:-1], new_decoder)


def test_streaming_shows_every_token_once_and_no_half_character(
    markov, config, new_decoder
) -> None:
    pieces: list[str] = []
    ids: list[int] = []

    def show(new, text: str) -> None:
        ids.extend(new)
        pieces.append(text)

    options = GenerateOptions(max_new_tokens=60, mtp=3, sampling=SAMPLED)
    made = generate(markov(config()), [1], options, new_decoder=new_decoder, on_tokens=show)
    assert tuple(ids) == made.ids
    assert "".join(pieces) == made.text == text_of(made.ids, new_decoder)


def test_progress_of_the_prefill_is_reported_by_chunk(markov, config) -> None:
    seen: list[tuple[int, int]] = []
    options = GenerateOptions(max_new_tokens=1, prefill_chunk=4)
    generate(markov(config()), [1] * 10, options, on_prefill=lambda *a: seen.append(a))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("mtp", [0, 3])
@pytest.mark.parametrize("after", range(6))
def test_ctrl_c_keeps_what_there_is(markov, config, new_decoder, mtp: int, after: int) -> None:
    whole = generate(
        markov(config(), wrong=0.2),
        [1],
        GenerateOptions(max_new_tokens=50),
        new_decoder=new_decoder,
    )
    calls = 0

    def interrupt(new, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    backend = markov(config(), wrong=0.2)
    options = GenerateOptions(max_new_tokens=50, mtp=mtp)
    made = generate(backend, [1], options, new_decoder=new_decoder, on_tokens=interrupt)
    assert made.finish_reason == "interrupted"
    assert made.ids == whole.ids[: len(made.ids)] and len(made.ids) > after
    assert made.text == text_of(made.ids, new_decoder)
    check_books(made, backend, mtp)


def test_ctrl_c_inside_a_trunk_pass_drops_that_pass_only(markov, config) -> None:
    class Slow(markov):  # type: ignore[misc, valid-type]
        def decode(self, tokens, cache):
            if self.passes == 3:
                raise KeyboardInterrupt
            return super().decode(tokens, cache)

    made = generate(Slow(config()), [1], GenerateOptions(mtp=2))
    assert (made.finish_reason, made.mtp.steps, made.mtp.drafted) == ("interrupted", 3, 6)
    assert len(made.ids) == 1 + 3 + made.mtp.accepted


def test_ctrl_c_during_the_prefill_gives_an_empty_continuation(markov, config) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    made = generate(
        markov(config()), [1] * 9, GenerateOptions(prefill_chunk=2, mtp=1), on_prefill=interrupt
    )
    assert (made.ids, made.text, made.finish_reason) == ((), "", "interrupted")
    assert (made.mtp.steps, made.timings.ttft_s) == (0, None)
    json.dumps(made.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 13], {}, r"token 1 of the prompt is 13, .*\(0..12\)"),
        ([-1], {}, "token 0 of the prompt is -1"),
        ([1] * 600, {}, "600 tokens, the context holds 512"),
        ([1] * 7, {"context": 6}, "7 tokens, the context holds 6"),
        ([1], {"mtp": 3}, "mtp is 3, but the model has 2 MTP layers: ask for at most 2"),
        ([1], {"mtp": 4}, "at most 3 drafts"),
        ([1], {"stop_strings": ("x",)}, "give generate.. a decoder"),
    ],
)
def test_what_cannot_be_run_is_refused(markov, config, prompt, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(markov(config(mtp=2)), prompt, GenerateOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max-new-tokens is -1, expected 0 or more"),
        ({"prefill_chunk": 0}, "prefill-chunk is 0"),
        ({"context": -5}, "context is -5"),
        ({"mtp": -1}, "mtp is -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(**options)


def test_empty_stop_strings_are_refused(markov, config, new_decoder) -> None:
    options = GenerateOptions(stop_strings=("a", ""))
    with pytest.raises(InputError, match="stop string is empty"):
        generate(markov(config()), [1], options, new_decoder=new_decoder)


def test_logits_that_are_not_numbers_are_reported(markov, config) -> None:
    class Broken(markov):  # type: ignore[misc, valid-type]
        def logits(self, before: int, last: int) -> np.ndarray:
            return np.full(13, np.nan)

    with pytest.raises(InputError, match="not finite"):
        generate(Broken(config()), [1], GenerateOptions())


@pytest.mark.parametrize("mtp", [0, 2, "auto"])
def test_texts_with_a_kept_policy_are_those_with_new_ones(markov, config, mtp) -> None:
    backend = markov(config(), 1, 0.2)
    policy, options = policy_for(backend, mtp), GenerateOptions(max_new_tokens=60, mtp=mtp)
    for prompt in ([1, 2], [3], [4, 5, 6]):
        made = generate(backend, prompt, options, policy=policy)
        assert list(made.ids) == plain_greedy(backend, prompt, 60, frozenset())


def test_a_kept_policy_is_told_of_every_text(markov, config) -> None:
    backend, begun = markov(config()), []
    policy = policy_for(backend, "auto")
    policy.begin = lambda: begun.append(len(begun))
    for _ in range(3):
        generate(backend, [1], GenerateOptions(max_new_tokens=5, mtp="auto"), policy=policy)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "made_for", "wanted", "message"),
    [
        (3, "auto", 1, r"for mtp auto \(at most 3 drafts\), this text wants mtp 1 \(at most 1\)"),
        (3, 3, "auto", r"for mtp 3 \(at most 3 drafts\), this text wants mtp auto"),
        (1, "auto", "auto", r"auto \(at most 1 drafts\), this text wants mtp auto \(at most 3\)"),
    ],
)
def test_a_policy_for_something_else_is_refused(
    layers: int, made_for, wanted, message: str, markov, config
) -> None:
    policy = policy_for(markov(config(mtp=layers)), made_for)
    with pytest.raises(InputError, match=message):
        generate(markov(config()), [1], GenerateOptions(mtp=wanted), policy=policy)

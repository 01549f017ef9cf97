"""No span of SPAN tokens is shared between training and held-out text, and the 3-gram is one."""

import numpy as np
import pytest

from refimpl.mini import data, ngram, streams, tokenizer


def _tokens(seed: int, n: int) -> streams.Tokens:
    return np.random.default_rng(seed).integers(11, tokenizer.VOCAB, n).astype(np.uint16)


def test_equal_spans_have_equal_hashes_wherever_they_are() -> None:
    shared = _tokens(0, streams.SPAN)
    a = np.concatenate([_tokens(1, 70), shared, _tokens(2, 30)])
    b = np.concatenate([_tokens(3, 5), shared])
    both = np.intersect1d(streams.span_hashes(a), streams.span_hashes(b))
    assert list(both) == [streams.span_hashes(shared)[0]]


def test_shared_spans_are_cut_out_of_training_text() -> None:
    held = _tokens(0, 120)
    forbidden = np.unique(streams.span_hashes(held))
    document = np.concatenate([_tokens(1, 100), held, _tokens(2, 200)])
    pieces = streams.without_shared(document, forbidden)
    assert [len(p) for p in pieces] == [100, 200]
    assert len(streams.shared_spans(document, forbidden)) == 120 - streams.SPAN + 1
    assert len(streams.shared_spans(streams.wrapped(pieces), forbidden)) == 0


def test_a_document_without_shared_spans_stays_whole() -> None:
    document = _tokens(4, 90)
    forbidden = np.unique(streams.span_hashes(_tokens(5, 90)))
    (piece,) = streams.without_shared(document, forbidden)
    assert piece is document


def test_trigram_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(6)
    text = (rng.zipf(1.3, 60_000) % 300 + 11).astype(np.uint16)
    model = ngram.Trigram(text)
    every = np.arange(tokenizer.VOCAB)
    for a, b in ((text[100], text[101]), (4000, text[7]), (4000, 4001)):
        p = model.probabilities(np.full_like(every, a), np.full_like(every, b), every)
        assert p.sum() == pytest.approx(1.0, abs=1e-9)
        assert p.min() > 0


def test_trigram_learns_a_cycle() -> None:
    cycle = np.tile(np.arange(20, 120), 400).astype(np.uint16)
    noise = (np.random.default_rng(7).zipf(1.5, 40_000) % 500 + 11).astype(np.uint16)
    model = ngram.Trigram(np.concatenate([cycle, noise]))
    x = cycle[:50].astype(np.int64)
    assert model.probabilities(x[:-2], x[1:-1], x[2:]).min() > 0.8


def test_committed_held_out_file_is_whole() -> None:
    held = data.held_out()
    tokens, lengths = held["tokens"], held["lengths"].astype(int)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    assert lengths.sum() == len(tokens)
    assert (tokens[starts] == tokenizer.BOS).all()
    assert (tokens[np.cumsum(lengths) - 1] == tokenizer.EOS).all()
    assert (tokens == tokenizer.BOS).sum() == len(lengths) == len(held["paths"])
    assert len(ngram.judged(tokens.astype(np.uint16))) == len(tokens) - len(lengths)

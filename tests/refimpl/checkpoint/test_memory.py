"""Memory stays bounded: only what is asked for is decoded, and the cache has an end."""

import numpy as np

from refimpl.checkpoint.open import open_checkpoint


def test_opening_decodes_nothing(made):
    for form in ("hf-bf16", "q8_0"):
        assert open_checkpoint(made("tiny_a", form)).decoded_bytes == 0


def test_an_expert_costs_its_own_bytes_only(made):
    source = open_checkpoint(made("tiny_a", "q8_0"))
    source.expert("experts.down", 4, 3, np.float64)
    assert source.decoded_bytes == 64 * 34  # 64 rows of one 34-byte block
    assert source.stored_bytes("experts.down", 4) == 16 * 64 * 34


def test_rows_cost_their_own_bytes_only(made):
    source = open_checkpoint(made("tiny_a", "q4_0"))
    source.rows("embed_tokens", None, [5, 9], np.float32)
    assert source.decoded_bytes == 2 * 2 * 18  # two blocks a row


def test_repeated_use_is_decoded_once(made):
    source = open_checkpoint(made("tiny_a", "q8_0"))
    first = source.matrix("q_proj", 0, np.float32)
    cost = source.decoded_bytes
    assert source.matrix("q_proj", 0, np.float32) is first
    assert source.decoded_bytes == cost == 128 * 2 * 34


def test_float32_of_an_f32_file_is_the_map_itself(made):
    for form in ("f32", "hf-f32"):
        source = open_checkpoint(made("tiny_a", form))
        a = source.matrix("q_proj", 0, np.float32)
        assert np.shares_memory(a, source.stored("q_proj", 0).rows)
        assert source.decoded_bytes == 0


def test_the_cache_drops_the_least_recently_used(made):
    size = 32 * 64 * 4  # one expert's gate projection in float32
    source = open_checkpoint(made("tiny_a", "q8_0"), cache_bytes=2 * size)

    def expert(i):
        before = source.decoded_bytes
        source.expert("experts.gate", 3, i, np.float32)
        return source.decoded_bytes > before

    assert [expert(i) for i in (0, 1, 0, 2)] == [True, True, False, True]
    assert [expert(i) for i in (0, 2, 1)] == [False, False, True]


def test_what_does_not_fit_the_cache_is_still_served(made):
    source = open_checkpoint(made("tiny_a", "q8_0"), cache_bytes=0)
    a, b = (source.matrix("q_proj", 0, np.float32) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert source.decoded_bytes == 2 * 128 * 2 * 34

"""Attention kernels against float64, and one result for any division of the work."""

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.slice import write_random
from refimpl.checkpoint.stored import StoredSource
from refimpl.checkpoint.synth import tiny_a
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import SamplingParams
from refimpl.engine.attention import STATE, attending, score_bytes
from refimpl.engine.caches import LayerKv
from refimpl.engine.heads import STRETCH
from refimpl.engine.kv import KV_TYPES, storing
from refimpl.engine.memory import address, zeroed
from refimpl.engine.model import EngineModel
from refimpl.engine.simd import available, choose_simd

Engine = Callable[..., EngineModel]
LANES, SLOTS = 64, 48
TYPES = tuple(KV_TYPES)


def filled(kv: str, positions: range, simd: str) -> tuple[LayerKv, np.ndarray, np.ndarray]:
    """A ring of 48 slots for two KV heads, with the keys and values (T, 2, D) that went in."""
    spec: Any = SimpleNamespace(num_attention_groups=2, head_dim=LANES, window=SLOTS)
    layer, keep = LayerKv(spec, KV_TYPES[kv], SLOTS), storing(choose_simd(simd), KV_TYPES[kv])
    keys, values = np.random.default_rng(1).standard_normal((2, len(positions), 2, LANES))
    keys[0] = values[0] = 0  # a row whose scale is 0
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    for t, position in enumerate(positions):
        for g in range(2):
            slot = g * SLOTS + position % SLOTS
            rows = (np.ascontiguousarray(a[t, g]) for a in (keys, values))
            keep.ctypes(address(layer.record), slot, *map(address, rows), LANES)
    return layer, keys, values


def kept(layer: LayerKv, name: str, length: int, count: int) -> np.ndarray:
    """What the cache holds of the last `count` of `length` positions, (count, 2, D) float64."""
    rows = layer.export("x", length)
    found = rows[f"x.{name}"].astype(np.float64)
    if f"x.{name[:-1]}_scales" in rows:
        found *= np.repeat(rows[f"x.{name[:-1]}_scales"].astype(np.float64), 32, axis=-1)
    return found[-count:]


@pytest.mark.parametrize("simd", available())
@pytest.mark.parametrize("kv", TYPES)
def test_kept_rows_are_rounded_once(kv: str, simd: str) -> None:
    layer, keys, values = filled(kv, range(SLOTS), simd)
    for name, given_rows in (("keys", keys), ("values", values)):
        error = np.abs(kept(layer, name, SLOTS, SLOTS) - given_rows)
        peak = np.abs(given_rows).reshape(SLOTS, 2, -1, 32).max(axis=-1).repeat(32, axis=-1)
        half = 2.0**-11 * np.abs(given_rows) + 1e-7
        bound = {"f32": 0.0, "f16": half, "q8_0": peak * (0.5 / 127 + 5e-4)}[kv]
        assert (error <= bound).all()


@pytest.mark.parametrize("simd", available())
@pytest.mark.parametrize("kv", TYPES)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 13])
def test_a_split_equals_the_definition(kv: str, simd: str, heads: int) -> None:
    """Every head of a group, for parts of a split that begin and end anywhere in the ring."""
    positions = range(20, 20 + SLOTS)
    layer, _, _ = filled(kv, positions, simd)
    q = np.random.default_rng(2).standard_normal((heads, LANES)).astype(np.float32)
    state = zeroed(heads * (4 * LANES + STATE)).view(np.float32).reshape(heads, -1)
    scratch, attend = zeroed(score_bytes(heads)), attending(choose_simd(simd), KV_TYPES[kv])
    k, v = (kept(layer, name, positions.stop, SLOTS) for name in ("keys", "values"))
    for low, high in ((20, 67), (33, 50), (47, 47), (48, 64)):
        for g in range(2):
            state[:] = np.nan
            attend.ctypes(address(q), heads, LANES, address(layer.record), g * SLOTS, low, high,
                          address(state), address(scratch))  # fmt: skip
            seen = slice(low - 20, high - 19)
            scores = q.astype(np.float64) @ k[seen, g].T / np.sqrt(LANES)
            e = np.exp(scores - scores.max(axis=1, keepdims=True))
            np.testing.assert_allclose(state[:, LANES], scores.max(axis=1), atol=2e-6)
            np.testing.assert_allclose(state[:, LANES + 1], e.sum(axis=1), rtol=5e-6)
            np.testing.assert_allclose(state[:, :LANES], e @ v[seen, g], atol=5e-5)


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredSource]:
    """`tiny_a` with a context of several stretches."""
    path = tmp_path_factory.mktemp("long") / "model.gguf"
    config = dataclasses.replace(tiny_a(), max_position_embeddings=4 * STRETCH)
    write_random(config, path, "q8_0", 1)
    opened = open_checkpoint(path)
    yield opened
    opened.close()


def pieces_at(model: EngineModel, depth: int, sizes: list[int]) -> np.ndarray:
    """Logits of 28 tokens in pieces behind `depth` synthetic ones."""
    rng = np.random.default_rng(4)
    past, ids, at = rng.integers(0, 320, depth), rng.integers(0, 320, 28).tolist(), 0
    cache, parts = model.new_cache(depth + 28), []
    cache.fill_synthetic(past)
    for size in sizes:
        parts.append(model.prefill(ids[at : at + size], cache, all_logits=True).logits)
        at += size
    return np.concatenate(parts)


@pytest.mark.parametrize(("kv", "depth"), [("f16", 500), *((kv, 3 * STRETCH - 14) for kv in TYPES)])
def test_a_long_context_gives_the_same_bits_for_any_pieces_and_threads(
    long_source: StoredSource, kv: str, depth: int
) -> None:
    """Keys cut into units, or rows; windows and contexts that cross the ends of splits."""
    made = []
    for threads in (1, 3):
        model = EngineModel(long_source, threads=threads, kv_type=kv)
        for sizes in ([1] * 28, [4] * 7, [2, 3, 1, 4, 5, 6, 7]):
            made.append(pieces_at(model, depth, sizes))
        model.close()
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def test_many_rows_go_through_the_keys_together(long_source: StoredSource) -> None:
    """Over several splits and stretches, in blocks of rows of either size, as one by one."""
    model = EngineModel(long_source, threads=2, exact=True)
    ids = np.random.default_rng(5).integers(0, 320, STRETCH + 100).tolist()
    made = []
    for sizes in ([len(ids)], [len(ids) - 106, 100, 4, 2]):
        cache, at, parts = model.new_cache(len(ids)), 0, []
        for size in sizes:
            parts.append(model.prefill(ids[at : at + size], cache, all_logits=True).logits)
            at += size
        made.append(np.concatenate(parts))
    model.close()
    assert np.abs(made[1] - made[0]).max() < 5e-5


SEQUENCES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=6, max_size=12)


@pytest.mark.parametrize("kv", TYPES)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(sequence=SEQUENCES)
def test_a_ring_goes_on_like_a_full_cache_whatever_is_rolled_back(
    engine: Engine, kv: str, sequence: list[tuple[int, int]]
) -> None:
    """Pieces of 1 to 9 rows, after each of which up to three are taken back; the ring of 32 slots
    (window 16, micro-batch 9) goes round several times."""
    ring = engine("tiny_a", "q8_0", kv_type=kv, micro_batch=9)
    full = engine("tiny_a", "q8_0", kv_type=kv, micro_batch=9, ring=False)
    ids = np.random.default_rng(6).integers(0, 320, 512).tolist()
    caches = [(model, model.new_cache(400)) for model in (ring, full)]
    for number, (size, back) in enumerate(sequence * 3):
        found = []
        for model, cache in caches:
            if cache.length + size > 400:
                return
            piece = ids[number : number + size]
            found.append(model.prefill(piece, cache, all_logits=True).logits)
            cache.rollback(min(back, size - 1))
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("kv", TYPES)
def test_drafts_over_rings_equal_those_over_full_caches(engine: Engine, kv: str) -> None:
    """The loop of `refimpl generate`: the MTP layers' rings, rejected drafts, rolled back rows."""
    greedy = SamplingParams(temperature=0)
    options = GenerateOptions(max_new_tokens=60, sampling=greedy, mtp=3, stop_tokens=())
    runs = [
        generate(engine("tiny_a", "q8_0", kv_type=kv, **how), [5, 9, 77], options)
        for how in ({"micro_batch": 9}, {"ring": False})
    ]
    plain = generate(engine("tiny_a", "q8_0", kv_type=kv), [5, 9, 77],
                     dataclasses.replace(options, mtp=0))  # fmt: skip
    assert runs[0].ids == runs[1].ids == plain.ids
    assert runs[0].mtp.drafted == runs[1].mtp.drafted > runs[0].mtp.accepted
    assert runs[0].mtp.accepted == runs[1].mtp.accepted

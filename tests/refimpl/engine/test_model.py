"""The engine as a backend: equal to the reference, and to itself whatever the way."""

from collections.abc import Callable

import numpy as np
import pytest

from refimpl.checkpoint.stored import StoredSource
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import SamplingParams
from refimpl.engine.model import EngineModel
from refimpl.engine.simd import available
from refimpl.errors import CheckpointError, InputError
from refimpl.reference.model import ReferenceModel

Engine = Callable[..., EngineModel]
Reference = Callable[..., ReferenceModel]
Prompt = Callable[..., list[int]]
PRESETS = ("tiny_a", "tiny_b")
BEST = available()[0]
EXACT = 5e-5
"""How far float32 sums in another order may lead."""


def logits_of(model: EngineModel | ReferenceModel, ids: list[int]) -> np.ndarray:
    return model.prefill(ids, model.new_cache(len(ids)), all_logits=True).logits


def in_chunks(model: EngineModel, ids: list[int], sizes: list[int]) -> np.ndarray:
    """Logits (T, V), the prompt cut into pieces; those of up to 4 are decoded."""
    cache, at, parts = model.new_cache(len(ids)), 0, []
    for size in sizes:
        piece = ids[at : at + size]
        at += size
        if len(piece) > 4 or size == 3:
            parts.append(model.prefill(piece, cache, all_logits=True).logits)
        elif piece:
            parts.append(model.decode(piece, cache).logits)
    assert cache.length == len(ids)
    return np.concatenate(parts)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("file_type", ["f32", "q8_0"])
def test_exact_arithmetic_equals_the_reference(
    engine: Engine, reference: Reference, prompt: Prompt, preset: str, file_type: str
) -> None:
    ids = prompt(60)
    expected = logits_of(reference(preset, file_type), ids)
    got = logits_of(engine(preset, file_type, exact=True), ids)
    assert np.abs(got - expected).max() < 5e-5


@pytest.mark.parametrize("simd", available())
@pytest.mark.parametrize("file_type", ["q8_0", "q4_0"])
def test_default_arithmetic_is_near_the_reference(
    engine: Engine, reference: Reference, prompt: Prompt, simd: str, file_type: str
) -> None:
    """On the preset that selects every expert, so that no choice can flip; logits have a
    standard deviation of about 3."""
    ids = prompt(60)
    expected = logits_of(reference("tiny_b", file_type), ids)
    got = logits_of(engine("tiny_b", file_type, simd=simd), ids)
    assert rms(got - expected) < 0.04 * rms(expected)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_kv_types_round_keys_and_values_only(
    engine: Engine, reference: Reference, prompt: Prompt, kv: str
) -> None:
    ids = prompt(60)
    expected = logits_of(reference("tiny_b", "f32"), ids)
    got = logits_of(engine("tiny_b", "f32", exact=True, kv_type=kv), ids)
    error = rms(got - expected) / rms(expected)
    assert 1e-6 < error < {"f16": 1e-3, "q8_0": 2e-2}[kv]


@pytest.mark.parametrize("preset", PRESETS)
def test_same_bits_for_any_small_chunks_threads_and_ring(
    engine: Engine, prompt: Prompt, preset: str
) -> None:
    """Rows of a verification have the bits of plain decoding; so have prompts in small chunks."""
    ids = prompt(60)
    model = engine(preset, "q4_0")
    expected = in_chunks(model, ids, [1] * 60)
    np.testing.assert_array_equal(in_chunks(model, ids, [4, 2, 3, 1, 7, 4, 4] * 3), expected)
    whole = logits_of(model, ids)
    for options in ({"threads": 1}, {"threads": 3}, {"ring": False}):
        other = engine(preset, "q4_0", **options)
        np.testing.assert_array_equal(in_chunks(other, ids, [1] * 60), expected)
        np.testing.assert_array_equal(logits_of(other, ids), whole)


@pytest.mark.parametrize("file_type", ["q4_0", "q4_k_s", "q8_0"])
def test_chunks_of_many_rows_differ_by_the_order_of_sums_only(
    engine: Engine, prompt: Prompt, file_type: str
) -> None:
    """Where no choice of experts can flip: the last bits of sums turn some roundings to int8 the
    other way, which costs less than the int8 activations themselves (0.03)."""
    ids, model = prompt(60), engine("tiny_b", file_type)
    ones = in_chunks(model, ids, [1] * 60)
    for sizes in ([60], [7, 9, 8, 20, 16], [32, 28]):
        assert rms(in_chunks(model, ids, sizes) - ones) < 0.02 * rms(ones)
    exact = engine("tiny_b", file_type, exact=True)
    difference = logits_of(exact, ids) - in_chunks(exact, ids, [7, 1, 4, 20, 28])
    assert np.abs(difference).max() < EXACT


def test_a_full_ring_goes_on_like_a_full_cache(engine: Engine, prompt: Prompt) -> None:
    """Micro-batches of nine rows make rings of 32 slots (window 16); 120 tokens go round."""
    ids = prompt(120)
    ring, full = engine("tiny_a", "q8_0", micro_batch=9), engine("tiny_a", "q8_0", ring=False)
    assert ring.cache_bytes(512) < full.cache_bytes(512)
    pieces = [7] * 17 + [1]
    np.testing.assert_array_equal(in_chunks(ring, ids, pieces), in_chunks(full, ids, pieces))


def test_positions_beyond_one_split_of_the_softmax(engine: Engine, reference: Reference) -> None:
    """512 positions of `tiny_a` fill its context; the window of `tiny_a` is small, so the full
    layers alone are tested by it."""
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 320, 512)]
    model, exact = engine("tiny_a", "f32", exact=True), reference("tiny_a", "f32")
    got = model.prefill(ids, model.new_cache(512)).logits
    expected = exact.prefill(ids, exact.new_cache(512)).logits
    assert np.abs(got - expected).max() < 1e-4


def test_rollback_undoes_rejected_drafts(engine: Engine, prompt: Prompt) -> None:
    ids = prompt(40)
    model = engine("tiny_a", "q8_0")
    plain = in_chunks(model, ids, [30] + [1] * 10)
    cache = model.new_cache(64)
    model.prefill(ids[:30], cache)
    wrong = [(i + 1) % 320 for i in ids[31:34]]
    first = model.decode([ids[30], *wrong], cache).logits[:1]
    cache.rollback(3)
    assert cache.length == 31
    rest = model.decode(ids[31:35], cache).logits
    np.testing.assert_array_equal(np.concatenate([first, rest]), plain[30:35])
    with pytest.raises(ValueError, match="roll back"):
        cache.rollback(4)


@pytest.mark.parametrize("preset", PRESETS)
def test_drafts_equal_the_references(
    engine: Engine, reference: Reference, prompt: Prompt, preset: str
) -> None:
    """Over several steps with varying depth, accepted and rejected drafts."""
    model, exact = engine(preset, "f32", exact=True), reference(preset, "f32")
    layers = model.config.num_nextn_predict_layers
    ids = prompt(50)
    rows: dict[object, list[np.ndarray]] = {model: [], exact: []}
    for backend, seen in rows.items():
        cache, at = backend.new_cache(64), 0
        for size, depth in ((20, 0), (9, layers), (1, 1), (3, layers), (2, 0), (4, layers)):
            hidden = backend.prefill(ids[at : at + size], cache).hidden
            at += size
            truth = iter(ids[at + 1 :])

            def choose(logits: np.ndarray, seen=seen, truth=truth) -> int:  # type: ignore[no-untyped-def]
                seen.append(logits)
                return (next(truth) + len(seen) % 2) % 320  # every other draft is wrong

            backend.draft(cache, hidden, ids[at - size + 1 : at + 1], min(depth, layers), choose)
    assert len(rows[model]) == len(rows[exact]) > 2 * layers
    for got, expected in zip(rows[model], rows[exact], strict=True):
        assert np.abs(got - expected).max() < 5e-5


def test_old_rows_are_dropped_before_drafting_without_changing_the_drafts(
    engine: Engine, prompt: Prompt
) -> None:
    """Three layers with windows of 16: what lies 3 windows back is not computed."""
    model, ids = engine("tiny_a", "q8_0", exact=True), prompt(120)
    logits: list[list[np.ndarray]] = []
    for steps in ((120,), (10,) * 12):
        cache, at, seen = model.new_cache(128), 0, []
        for size in steps:
            hidden = model.prefill(ids[at : at + size], cache).hidden
            at += size
            following = [*ids[at - size + 1 : at], ids[at] if at < len(ids) else 7]
            depth = 3 if at == len(ids) else 0

            def choose(row: np.ndarray, seen: list[np.ndarray] = seen) -> int:
                seen.append(row)
                return 5

            model.draft(cache, hidden, following, depth, choose)
        logits.append(seen)
        kept = sum(map(len, cache.mtp.pending[0]))
    assert kept == 0
    assert np.abs(np.stack(logits[0]) - np.stack(logits[1])).max() < EXACT


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_text_is_the_same_with_any_number_of_drafts(
    engine: Engine, reference: Reference, prompt: Prompt, preset: str
) -> None:
    model, ids = engine(preset, "f32", exact=True), prompt(20)
    options = {"max_new_tokens": 24, "sampling": SamplingParams(temperature=0), "stop_tokens": ()}
    texts = [
        generate(model, ids, GenerateOptions(mtp=k, **options)).ids
        for k in range(model.config.num_nextn_predict_layers + 1)
    ]
    expected = generate(reference(preset, "f32"), ids, GenerateOptions(mtp=0, **options)).ids
    assert all(text == expected for text in texts)


def test_tensors_of_in_place_types_are_never_expanded(
    engine: Engine, tiny_gguf: Callable[[str, str], StoredSource], prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Matrices and experts are asked of the source by nobody; embedding rows are decoded."""
    source = tiny_gguf("tiny_a", "q4_0")

    def refused(*_: object) -> None:
        raise AssertionError("a tensor was expanded")

    monkeypatch.setattr(source, "matrix", refused)
    monkeypatch.setattr(source, "expert", refused)
    before = source.decoded_bytes
    model = EngineModel(source)
    model.prefill(prompt(20), model.new_cache(32))
    spec = source.stored("embed_tokens", None)
    assert source.decoded_bytes - before <= 20 * spec.rows.shape[1]
    model.close()


def test_bad_input(engine: Engine, tiny_gguf: Callable[[str, str], StoredSource]) -> None:
    model, other = engine("tiny_a", "q8_0"), engine("tiny_b", "q8_0")
    source = tiny_gguf("tiny_a", "q8_0")
    for ids, cause in (([320], "outside the vocabulary"), ([-1], "outside"), ([], "no tokens")):
        with pytest.raises(InputError, match=cause):
            model.prefill(ids, model.new_cache(8))
    with pytest.raises(InputError, match="do not fit"):
        model.prefill([1] * 9, model.new_cache(8))
    with pytest.raises(InputError, match="1 to 4"):
        model.decode([1] * 5, model.new_cache(8))
    with pytest.raises(InputError, match="the model has 512"):
        model.new_cache(513)
    with pytest.raises(InputError, match="another model"):
        model.decode([1], other.new_cache(8))
    with pytest.raises(InputError, match="kv type"):
        EngineModel(source, kv_type="f8")
    with pytest.raises(InputError, match="threads"):
        EngineModel(source, threads=0)
    with pytest.raises(InputError, match="REFIMPL_SIMD"):
        EngineModel(source, simd="sse9")


def test_contexts_beyond_memory_are_refused_with_the_arithmetic(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Memory:
        available = 300 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    model = engine("tiny_a", "q8_0")
    monkeypatch.setattr(model, "cache_bytes", lambda capacity: 100 << 20)
    with pytest.raises(InputError, match=r"104\.9 MB, but only 314\.6 MB"):
        model.new_cache(64)


def test_a_type_without_kernels_is_refused_by_name(
    tiny_gguf: Callable[[str, str], StoredSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refimpl.engine import records

    monkeypatch.delitem(records.FORMATS, "Q8_0")
    with pytest.raises(InputError, match="type Q8_0, which the engine has no kernels for"):
        EngineModel(tiny_gguf("tiny_a", "q8_0"))


def test_a_file_that_shrank_is_noticed(
    tiny_gguf: Callable[[str, str], StoredSource], tmp_path, prompt: Prompt
) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from refimpl.checkpoint.open import open_checkpoint

    path = tiny_gguf("tiny_b", "q8_0").stored("lm_head", None).where.partition(": tensor")[0]
    copy = tmp_path / "model.gguf"
    shutil.copy(path, copy)
    model = EngineModel(open_checkpoint(copy))
    cache = model.new_cache(16)
    model.prefill(prompt(3), cache)
    with open(copy, "r+b") as file:
        file.truncate(copy.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="shrank"):
        model.decode([1], cache)

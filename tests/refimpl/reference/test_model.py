"""The model as a whole: chunking, rings, drafting, counting, roundings."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.checkpoint.source import WeightSource
from refimpl.errors import InputError
from refimpl.reference.model import ReferenceModel
from refimpl.reference.numerics import ROUNDING_POINTS, numerics, round_bf16
from refimpl.reference.trace import Trace

Tiny = Callable[[str], WeightSource]
PRESETS = ("tiny_a", "tiny_b")
relaxed = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def prompt(vocab: int, length: int = 40, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, length)]


@pytest.mark.parametrize("preset", PRESETS)
@relaxed
@given(cuts=st.sets(st.integers(1, 39), max_size=12), ring=st.booleans())
def test_any_chunking_and_ring_cache_agree(
    tiny: Tiny, preset: str, cuts: set[int], ring: bool
) -> None:
    source = tiny(preset)
    ids = prompt(source.config.vocab_size)
    whole = ReferenceModel(source, "float64", ring=False)
    expected = whole.prefill(ids, whole.new_cache(40), all_logits=True).logits
    model = ReferenceModel(source, "float64", ring=ring)
    cache = model.new_cache(40)
    edges = [0, *sorted(cuts), 40]
    parts = [
        model.prefill(ids[a:b], cache, all_logits=True).logits for a, b in itertools.pairwise(edges)
    ]
    assert np.abs(np.concatenate(parts) - expected).max() < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
def test_decode_has_the_same_bits_for_any_number_of_rows_and_after_rollback(
    tiny: Tiny, preset: str
) -> None:
    model = ReferenceModel(tiny(preset), "float32")
    ids = prompt(model.config.vocab_size, 30)
    one = model.new_cache(64)
    model.prefill(ids[:20], one)
    single = np.concatenate([model.decode([i], one).logits for i in ids[20:28]])
    many = model.new_cache(64)
    model.prefill(ids[:20], many)
    wrong = [(i + 1) % model.config.vocab_size for i in ids[21:24]]
    first = model.decode([ids[20], *wrong], many).logits[:1]
    many.rollback(3)
    rest = [model.decode(ids[i : i + n], many).logits for i, n in ((21, 4), (25, 2), (27, 1))]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), single)


@pytest.mark.parametrize("preset", PRESETS)
@relaxed
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    depths=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_drafting_equals_teacher_forcing(
    tiny: Tiny, preset: str, chunks: list[int], depths: list[int]
) -> None:
    """Whatever the chunks and earlier depths, the drafts' logits are the forced ones."""
    model = ReferenceModel(tiny(preset), "float64")
    layers = model.config.num_nextn_predict_layers
    ids = prompt(model.config.vocab_size)
    hidden = model.prefill(ids, model.new_cache(40)).hidden
    forced = model.mtp_teacher_forced(ids, hidden)
    cache, at = model.new_cache(40), 0
    for chunk, depth in zip(chunks, depths, strict=False):
        step = model.prefill(ids[at : at + chunk], cache)
        at += chunk
        rows: list[np.ndarray] = []
        truth = iter(ids[at + 1 :])

        def choose(logits: np.ndarray, rows: list[np.ndarray] = rows, truth: object = truth) -> int:
            rows.append(logits)
            return next(truth)  # type: ignore[call-overload, no-any-return]

        model.draft(cache, step.hidden, ids[at - chunk + 1 : at + 1], min(depth, layers), choose)
        for k, row in enumerate(rows):
            assert np.abs(row - forced[k][0][at - 1]).max() < 1e-11


def test_float32_is_close_to_float64(tiny: Tiny) -> None:
    source = tiny("tiny_a")
    ids = prompt(source.config.vocab_size)
    wide, narrow = ReferenceModel(source, "float64"), ReferenceModel(source, "float32")
    a = wide.prefill(ids, wide.new_cache(40), all_logits=True).logits
    b = narrow.prefill(ids, narrow.new_cache(40), all_logits=True).logits
    assert b.dtype == np.float32
    assert np.abs(a - b).max() < 5e-5


class _Spy:
    """Numerics that note every rounding point met and whether it changed anything."""

    def __init__(self, points: set[str]) -> None:
        self._inner = numerics("bf16", points)
        self.dtype, self.name = self._inner.dtype, self._inner.name
        self.met: dict[str, bool] = {}

    def at(self, point: str, x: np.ndarray) -> np.ndarray:
        rounded = not np.array_equal(round_bf16(x), x)
        self.met[point] = self.met.get(point, False) or rounded
        return self._inner.at(point, x)


def run(model: ReferenceModel) -> np.ndarray:
    ids = prompt(model.config.vocab_size)
    step = model.prefill(ids, model.new_cache(40), all_logits=True)
    return np.concatenate([step.logits, model.mtp_teacher_forced(ids, step.hidden)[0][0]])


@pytest.mark.parametrize("point", sorted(set(ROUNDING_POINTS) - {"embedding"}))
def test_each_rounding_point_rounds_and_matters(tiny: Tiny, point: str) -> None:
    """With the point alone switched off, the run meets unrounded values there, and only there
    its result changes; switched on, every value that leaves the point is a bf16 number."""
    model = ReferenceModel(tiny("tiny_b"), "bf16")
    everywhere = run(model)
    spy = _Spy(set(ROUNDING_POINTS) - {point})
    model.weights.numerics = spy  # type: ignore[assignment]
    without = run(model)
    assert set(spy.met) == set(ROUNDING_POINTS)
    assert spy.met[point]
    assert not np.array_equal(everywhere, without)


def test_bf16_embeddings_are_rounded_when_the_file_holds_more(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.checkpoint.synth import PRESETS as CONFIGS
    from refimpl.checkpoint.synth import synthesize

    folder = tmp_path_factory.mktemp("f32") / "model"
    model = ReferenceModel(
        open_checkpoint(synthesize(CONFIGS["tiny_b"](), 1, folder, "f32")), "bf16"
    )
    rows = model.weights.embedding(np.arange(20))
    np.testing.assert_array_equal(rows, round_bf16(rows))
    exact = ReferenceModel(model.weights.source, "float32").weights.embedding(np.arange(20))
    assert not np.array_equal(rows, exact)


def test_router_and_experts_stay_in_float32_in_bf16_mode(tiny: Tiny) -> None:
    model = ReferenceModel(tiny("tiny_b"), "bf16")
    trace = Trace(record=frozenset({"route_w"}))
    ids = prompt(model.config.vocab_size)
    model.prefill(ids, model.new_cache(40), trace=trace)
    weights = trace.rows("route_w", model.config.moe_layers[0])
    assert not np.array_equal(weights, round_bf16(weights))


def test_trace_counts_what_the_inventory_says(tiny: Tiny) -> None:
    """One decoded token: every active matrix once, selected experts once, visible keys only."""
    model = ReferenceModel(tiny("tiny_a"), "float32")
    c = model.config
    cache = model.new_cache(64)
    model.prefill(prompt(c.vocab_size, 30), cache)
    trace = Trace()
    model.decode([5], cache, trace=trace)
    keys = {s.index: 31 if s.window is None else min(31, s.window) for s in c.trunk}
    heads = {s.index: s.num_attention_heads * s.head_dim for s in c.trunk}
    assert trace.multiply_adds["scores"] == sum(2 * heads[i] * keys[i] for i in keys)
    routed = len(c.moe_layers) * c.moe_top_k * 3 * c.hidden_size * c.moe_intermediate_size
    assert trace.multiply_adds["routed"] == routed
    assert trace.weight_bytes["routed"] == 2 * routed
    assert trace.multiply_adds["head"] == c.vocab_size * c.hidden_size
    row = 2 * c.num_attention_groups * c.head_dim
    assert trace.kv_values_read == row * sum(keys.values())
    assert trace.kv_values_written == row * c.num_hidden_layers


def test_a_verification_reads_shared_weights_once(tiny: Tiny) -> None:
    model = ReferenceModel(tiny("tiny_a"), "float32")
    cache = model.new_cache(64)
    model.prefill(prompt(model.config.vocab_size, 20), cache)
    one, four = Trace(), Trace()
    model.decode([5], cache, trace=one)
    model.decode([5, 6, 7, 8], cache, trace=four)
    for role in ("attention", "dense", "shared", "router", "norm", "head"):
        assert four.weight_bytes[role] == one.weight_bytes[role]
    assert one.weight_bytes["routed"] < four.weight_bytes["routed"]
    assert four.weight_bytes["routed"] <= 4 * one.weight_bytes["routed"]
    assert four.multiply_adds["attention"] == 4 * one.multiply_adds["attention"]


def test_bad_input(tiny: Tiny) -> None:
    model = ReferenceModel(tiny("tiny_a"))
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    for ids in ([vocab], [-1]):
        with pytest.raises(InputError, match="outside the vocabulary"):
            model.prefill(ids, model.new_cache(8))
    with pytest.raises(InputError, match="at least one"):
        model.prefill([], model.new_cache(8))
    with pytest.raises(InputError, match="do not fit"):
        model.prefill([1] * 9, model.new_cache(8))
    with pytest.raises(InputError, match="1 to 4"):
        model.decode([1] * 5, model.new_cache(8))
    with pytest.raises(InputError, match="context"):
        model.new_cache(context + 1)
    with pytest.raises(InputError, match="MTP layers"):
        model.draft(model.new_cache(8), np.zeros((1, 64)), [1], 4, lambda _: 0)

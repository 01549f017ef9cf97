"""Counts of the cost model are facts: equal to what a traced run of the reference counts."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from hwmodel.model import ModelShape, shape_of_config, step_shape
from hwmodel.operations import draft_bytes, step_counts, visible_pairs, visible_rows
from hwmodel.quant import Quant, load_quant
from refimpl.checkpoint.source import WeightSource
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace

TEXT = np.random.default_rng(3).integers(0, 60, 40)


class _Traced:
    """A tiny model, and the counts of a prompt of `split` tokens and of what follows it."""

    def __init__(self, source: WeightSource, split: int, rest: int) -> None:
        self.source, self.shape = source, shape_of_config(source.config, "tiny")
        model = ReferenceModel(source)
        cache = model.new_cache(64)
        record = frozenset({"route_idx"})
        self.prompt, self.step = Trace(record), Trace(record)
        model.prefill(TEXT[:split].tolist(), cache, trace=self.prompt)
        if rest == 1:
            model.decode(TEXT[split : split + 1].tolist(), cache, trace=self.step)
        else:
            model.prefill(TEXT[split : split + rest].tolist(), cache, trace=self.step)
        self.split, self.rest = split, rest

    def distinct(self, trace: Trace) -> float:
        """Experts per MoE layer that the step touched, averaged over layers."""
        layers = [s.index for s in self.source.config.trunk if s.is_moe]
        return float(np.mean([len(np.unique(trace.rows("route_idx", i))) for i in layers]))


@pytest.fixture(scope="module")
def traced(tiny: Callable[[str], WeightSource]) -> Callable[[int, int], _Traced]:
    return cache(lambda split, rest: _Traced(tiny("tiny_a"), split, rest))


@pytest.mark.parametrize(("split", "rest"), [(5, 1), (30, 1), (7, 9), (20, 17)])
def test_multiply_adds_equal_the_traced_ones(
    traced: Callable[[int, int], _Traced], split: int, rest: int
) -> None:
    run = traced(split, rest)
    found = step_counts(run.shape, load_quant("BF16"), split, rest, logit_rows=1)
    counted = {k: v for k, v in run.step.multiply_adds.items() if v}
    assert {k: v for k, v in found.multiply_adds.items() if v} == counted


@pytest.mark.parametrize(("split", "rest"), [(5, 1), (30, 1), (7, 9), (20, 17)])
def test_kv_values_equal_the_traced_ones(
    traced: Callable[[int, int], _Traced], split: int, rest: int
) -> None:
    run = traced(split, rest)
    found = step_counts(run.shape, load_quant("BF16"), split, rest)
    assert found.kv_values_read == run.step.kv_values_read
    assert found.kv_values_written == run.step.kv_values_written


@pytest.mark.parametrize(("split", "rest"), [(5, 1), (20, 17)])
def test_weight_bytes_equal_the_traced_ones(
    traced: Callable[[int, int], _Traced], split: int, rest: int
) -> None:
    """Every tensor once per step, of the experts the selected ones, of the table single rows."""
    run = traced(split, rest)
    found = step_counts(
        run.shape, _stored_as(run.source), split, rest,
        distinct=run.distinct(run.step),
        distinct_tokens=len(set(TEXT[split : split + rest].tolist())),
    )  # fmt: skip
    assert dict(found.weight_bytes) == pytest.approx(dict(run.step.weight_bytes), rel=1e-12)


def _stored_as(source: WeightSource) -> Quant:
    """The tiny checkpoints hold every tensor in 16 bits."""
    spec = source.stored_bytes("lm_head", None) // (
        source.config.vocab_size * source.config.hidden_size
    )
    assert spec == 2
    return load_quant("BF16")


def test_published_totals_of_step_3_5_flash() -> None:
    shape = step_shape()
    assert shape.parameters == 196_956_130_368
    assert shape.active_parameters == 11_459_353_856
    counts = step_counts(shape, load_quant("BF16"), 0, 1)
    scores = counts.multiply_adds["scores"]
    norms = 372_736 + 45 * 2 * 128  # weights that no matrix product uses
    assert sum(counts.multiply_adds.values()) - scores == 11_459_353_856 - norms
    assert sum(counts.weight_bytes.values()) == pytest.approx(22.919e9, rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 8.0), (2, 15.78), (3, 23.34), (4, 30.69), (100000, 288.0)]
)
def test_distinct_experts_follow_even_routing(tokens: int, experts: float) -> None:
    assert step_shape().distinct_experts(tokens) == pytest.approx(experts, abs=0.01)


@pytest.mark.parametrize(
    ("depth", "rows", "window"), [(0, 5, 3), (2, 4, 3), (9, 1, 3), (4, 6, None)]
)
def test_visible_keys_are_those_of_the_mask(depth: int, rows: int, window: int | None) -> None:
    positions = np.arange(depth, depth + rows)[:, None]
    keys = np.arange(depth + rows)[None, :]
    mask = (keys <= positions) & (keys > positions - (window or depth + rows + 1))
    assert visible_pairs(depth, rows, window) == mask.sum()
    assert visible_rows(depth, rows, window) == mask.any(axis=0).sum()


def test_drafts_read_their_own_layers_and_heads() -> None:
    shape = step_shape()
    assert draft_bytes(shape, load_quant("BF16"), 3) == pytest.approx(4856.3e6, rel=1e-3)
    assert draft_bytes(shape, load_quant("Q8_0"), 3) == pytest.approx(2580e6, rel=2e-3)
    assert draft_bytes(shape, load_quant("BF16"), 0) == 0


def test_a_batch_shares_the_weights_and_not_the_cache() -> None:
    shape: ModelShape = step_shape()
    one = step_counts(shape, load_quant("BF16"), 4096, 1)
    many = step_counts(shape, load_quant("BF16"), 4096, 1, sequences=8)
    assert many.weight_bytes["attention"] == one.weight_bytes["attention"]
    assert one.weight_bytes["routed"] < many.weight_bytes["routed"] < 8 * one.weight_bytes["routed"]
    assert many.kv_values_read == 8 * one.kv_values_read

"""A traced run of the engine records what a traced run of the reference does, and as much work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.model import EngineModel
from refimpl.golden.compare import compare
from refimpl.golden.dump import golden_arrays
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace

Engine = Callable[..., EngineModel]
Prompt = Callable[..., list[int]]
Tiny = Callable[[str, str], StoredSource]
SEEN = ("hidden", "attn_out", "ffn_out", "route_idx", "route_w", "route_margin", "final")


@pytest.mark.parametrize("preset", ["tiny_a", "tiny_b"])
def test_golden_files_of_engine_and_reference_agree(
    engine: Engine, tiny_gguf: Tiny, prompt: Prompt, preset: str
) -> None:
    """Every array under the same name, activations and routing of every layer included."""
    ids = prompt(40)
    expected = golden_arrays(ReferenceModel(tiny_gguf(preset, "q8_0"), "float64"), ids, 8, chunk=15)
    got = golden_arrays(engine(preset, "q8_0", exact=True), ids, 8, chunk=15)
    assert set(got) == set(expected)
    result = compare(expected, got, ("float64", "float32"))
    assert result.first_departure is None, result.first_departure
    assert not result.missing


@pytest.mark.parametrize("preset", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("all_logits", [True, False])
def test_counts_by_role_are_those_of_the_reference(
    engine: Engine, tiny_gguf: Tiny, prompt: Prompt, preset: str, all_logits: bool
) -> None:
    """Weight bytes, multiply-adds and cached values of chunks and verifications, exactly."""
    ids = prompt(60)
    exact = ReferenceModel(tiny_gguf(preset, "q8_0"), "float64")
    traces: list[Trace] = []
    for model in (exact, engine(preset, "q8_0", exact=True)):
        trace, cache = Trace(), model.new_cache(64)
        model.prefill(ids[:33], cache, all_logits, trace=trace)
        model.prefill(ids[33:50], cache, all_logits, trace=trace)
        model.decode(ids[50:51], cache, trace)
        model.decode(ids[51:55], cache, trace)
        traces.append(trace)
    expected, got = traces
    assert got.multiply_adds == expected.multiply_adds
    assert got.weight_bytes == expected.weight_bytes
    counts = ("kv_values_read", "kv_values_written", "steps")
    assert [getattr(got, n) for n in counts] == [getattr(expected, n) for n in counts]
    assert {"attention", "routed", "shared", "router", "head", "embedding"} <= set(got.weight_bytes)


def test_a_traced_run_has_the_bits_of_an_untraced_one(engine: Engine, prompt: Prompt) -> None:
    model, ids = engine("tiny_a", "q4_0"), prompt(50)
    plain = model.prefill(ids, model.new_cache(64), all_logits=True)
    trace: Any = Trace(record=frozenset(SEEN))
    traced = model.prefill(ids, model.new_cache(64), all_logits=True, trace=trace)
    np.testing.assert_array_equal(traced.logits, plain.logits)
    np.testing.assert_array_equal(traced.hidden, plain.hidden)
    np.testing.assert_array_equal(trace.rows("hidden", 9), plain.hidden)

"""Batches: the largest that fits and is fast enough, and the cost of a token against rivals."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from hwmodel.cli import main
from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.errors import RequestError
from hwmodel.memory import ledger
from hwmodel.model import step_shape
from hwmodel.quant import load_quant
from hwmodel.rivals import compare_rivals
from hwmodel.run import DeviceCount, EngineChoice, Placement, RunConfig, Workload
from hwmodel.serving import at_batch, has_room, largest_batch, serve

RUN = RunConfig(
    model=step_shape(),
    quant=load_quant("FP8-experts"),
    devices=(DeviceCount(load_device("h100"), 8),),
    engine=EngineChoice(load_engine("sglang"), "cuda"),
    placement=Placement(split="expert"),
    workload=Workload(depth=32768, kv_type="fp8"),
)


def test_one_more_sequence_would_be_too_many() -> None:
    point = largest_batch(RUN, 60.0)
    assert point is not None and point.limited_by in ("speed", "memory")
    more = serve(RUN, point.batch + 1)
    assert point.tok_s >= 60.0
    assert more.tok_s < 60.0 or not has_room(at_batch(RUN, point.batch + 1))
    assert point.device_s_per_token == pytest.approx(8 / (point.batch * point.tok_s))


def test_a_batch_is_kept_back_by_memory_where_no_speed_is_asked() -> None:
    point = largest_batch(RUN)
    assert point is not None and point.limited_by == "memory"
    assert not has_room(at_batch(RUN, point.batch + 1))


def test_what_does_not_fit_or_is_too_slow_gives_no_batch() -> None:
    assert largest_batch(RUN, 1e6) is None
    small = dataclasses.replace(RUN, devices=(DeviceCount(load_device("h100"), 1),))
    assert largest_batch(small) is None


def test_step_costs_least_of_all_but_mimo_and_full_attention_costs_most() -> None:
    """Order and rough size of the vendor's table follow from the caches alone."""
    found = {r.title: r.relative for r in compare_rivals().rivals}
    assert found["Step 3.5 Flash"] == 1.0
    costs = {name: value for name, value in found.items() if value is not None}
    assert len(costs) == 6
    assert costs["mimo-v2-flash"] < 2 < costs["minimax-m2"] < costs["GLM-4.7"]
    assert 2 < costs["deepseek-v3.2"] < costs["GLM-4.7"] < costs["kimi-k2"]


def test_attention_on_one_card_holds_more_weights_and_moves_less() -> None:
    """What is not a routed expert is held by every group; a latent cache does not divide."""
    by = {a: compare_rivals(attention=a).rivals[4].found for a in ("split", "machine", "card")}
    batches = {a: p.batch for a, p in by.items() if p is not None}
    assert batches["split"] < batches["machine"] < batches["card"]
    held = [ledger(p.run, 1024).weights_bytes for p in by.values() if p is not None]
    assert held[0] < held[1] < held[2]


def test_whole_caches_of_sliding_layers_take_the_advantage_from_step() -> None:
    window, full = (compare_rivals(s, "domain").rivals[5].relative for s in ("window", "full"))
    assert window is not None and full is not None and full < window


def test_the_command_states_its_assumptions_and_the_json_has_every_row() -> None:
    text = CliRunner().invoke(main, ["rivals"])
    assert text.exit_code == 0 and "caches of sliding layers hold their window" in text.output
    rows = json.loads(CliRunner().invoke(main, ["rivals", "--json"]).output)["rivals"]
    assert [r["stated_relative_cost"] for r in rows] == [1.0, 1.2, 3.9, 6.0, 18.9, 18.9]


def test_a_card_without_links_is_refused() -> None:
    with pytest.raises(RequestError, match="has no link to others"):
        compare_rivals(device="epyc-9654-2s")


def test_a_device_that_the_tables_engine_does_not_run_on_is_refused() -> None:
    with pytest.raises(RequestError, match="SGLang, which the table is computed for"):
        compare_rivals(device="m4max")

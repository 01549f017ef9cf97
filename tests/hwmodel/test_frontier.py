"""Frontiers: nothing on them is beaten, nothing unbeaten is left out, commands are exact."""

import itertools
import json

import pytest
from click.testing import CliRunner

from hwmodel.catalogue import load_model
from hwmodel.cli import main
from hwmodel.cli_frontier import BUY
from hwmodel.errors import RequestError
from hwmodel.frontier import buying, pareto, rack
from hwmodel.frontier_pictures import _offers_figure, _rack_figure
from hwmodel.model import step_shape
from hwmodel.search import why_illegal

STEP = step_shape()


def test_pareto_keeps_what_nothing_beats() -> None:
    points = [(1, 9), (5, 5), (9, 1), (4, 4), (5, 3), (5, 5.01)]
    kept = pareto(points, (lambda p: p[0], lambda p: p[1]))
    assert kept == [(1, 9), (5, 5), (9, 1), (5, 5.01)]  # within one percent both stay


def test_machines_for_more_money_are_faster_or_better() -> None:
    offers = buying(("m4max", "dgx-spark", "rtx4090", "m3-ultra"), STEP, 32768)
    for i, cheap in enumerate(offers):
        for dear in offers[i + 1 :]:
            if dear.price_usd > 1.01 * cheap.price_usd:
                assert dear.tok_s > cheap.tok_s or dear.loss < cheap.loss


def test_a_budget_holds_and_one_that_buys_nothing_is_refused() -> None:
    offers = buying(("m4max", "rtx4090", "h100"), STEP, 32768, budget_usd=9000)
    assert offers and all(o.price_usd <= 9000 for o in offers)
    with pytest.raises(RequestError, match=r"expected 3,499 dollars or more"):
        buying(("m4max",), STEP, 32768, budget_usd=100)


def test_every_machine_of_the_frontier_holds_the_model() -> None:
    for offer in buying(("m4max", "rtx3090"), STEP, 32768, ram_gb=128):
        assert offer.candidate.holds and offer.command


def test_a_rack_trades_speed_for_tokens_per_dollar() -> None:
    points = rack("h100", STEP, 8192).points
    speeds = [p.user_tok_s for p in points]
    value = [p.tokens_per_usd for p in points]
    assert speeds == sorted(speeds, reverse=True) and value == sorted(value)
    assert points[-1].serving.batch > points[0].serving.batch
    assert {p.candidate.count for p in points} <= {1, 2, 4, 8, 16, 32, 64}


def test_every_group_of_a_rack_is_legal_and_its_command_names_it() -> None:
    found = rack("h100", STEP, 8192, engine="vllm", quant="fp8")
    for p in (*found.points, *found.cheapest):
        run, groups = p.candidate.run, p.attention_groups
        assert why_illegal(STEP, run.quant, run.placement.split, p.candidate.count, groups) is None
        assert f"--tensor-parallel-size {p.candidate.count // groups} " in p.command
        assert f"--max-num-seqs {-(-p.serving.batch // groups)} " in p.command
        assert (f"--data-parallel-size {groups} " in p.command) == (groups > 1)


def test_a_rack_says_why_a_group_cannot_be() -> None:
    found = rack("h100", STEP, 8192, engine="sglang", quant="fp8")
    why = dict(found.refused)
    assert set(why) == {1, 2, 64}
    assert "does not fit" in why[1]
    assert "288 experts do not divide by 64" in why[64]


def test_attention_by_machine_exchanges_less_than_over_the_network() -> None:
    found = rack("h100", STEP, 8192, engine="sglang", quant="fp8")
    kinds = {(p.candidate.count, p.attention_groups): p for p in found.cheapest}
    split, grouped = kinds[32, 1], kinds[32, 4]
    assert grouped.exchange < split.exchange
    assert grouped.tokens_per_usd > split.tokens_per_usd
    assert grouped.candidate.memory.weights_bytes > split.candidate.memory.weights_bytes
    assert "--tp-size 32 --ep-size 32 --dp-size 4 --enable-dp-attention" in grouped.command


def test_the_cheapest_batch_of_each_group_is_no_worse_than_the_frontier() -> None:
    found = rack("h100", STEP, 8192)
    best = {(p.candidate.count, p.attention_groups): p.tokens_per_usd for p in found.cheapest}
    for p in found.points:
        assert p.tokens_per_usd <= best[p.candidate.count, p.attention_groups]


def test_tokens_per_dollar_are_the_arithmetic_of_an_hour() -> None:
    point = rack("h100", STEP, 8192, rent=2.0).points[0]
    hour = 3600 * point.serving.batch * point.user_tok_s
    assert point.tokens_per_usd == pytest.approx(hour / (2.0 * point.candidate.count))


def test_a_rent_below_nothing_is_refused_as_it_was_given() -> None:
    with pytest.raises(RequestError, match="--rent is -1, expected 0 to 1000"):
        rack("h100", STEP, 8192, quant="fp8", most=8, rent=-1)


def test_a_rack_without_a_price_asks_for_one() -> None:
    with pytest.raises(RequestError, match="--rent USD adds it"):
        rack("h20", STEP, 8192)
    assert rack("h20", STEP, 8192, rent=2.0).points


@pytest.mark.parametrize("most", [0, 65])
def test_a_rack_has_at_most_64_devices(most: int) -> None:
    with pytest.raises(RequestError, match="expected 1 to 64"):
        rack("h100", STEP, 8192, most=most)


def test_the_commands_print_tables_and_json() -> None:
    text = CliRunner().invoke(main, ["frontier", "--device", "m4max"])
    assert text.exit_code == 0 and "llama-server" in text.output
    args = ["frontier", "--rack", "h100", "--context", "8K", "--json"]
    found = json.loads(CliRunner().invoke(main, args).output)
    assert all(r["tokens_per_usd"] > 0 and r["command"] for r in found["frontier"])
    assert {r["count"] for r in found["cheapest_by_group"]} > {8}


def test_a_rack_leaves_out_types_that_lose_much_unless_asked() -> None:
    assert all(p.candidate.tier <= 1 for p in rack("h100", STEP, 8192).points)
    asked = rack("h100", STEP, 8192, quant="IQ3_XXS").points
    assert {p.candidate.run.quant.name for p in asked} == {"IQ3_XXS"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rack", "h100", "--device", "m4max"], "--device does not go with --rack"),
        (["--rack", "h100", "--budget", "100"], "--budget does not go with --rack"),
        (["--engine", "vllm"], "--engine belongs to --rack NAME"),
        (["--rent", "2"], "--rent belongs to --rack NAME"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(args: list[str], says: str) -> None:
    run = CliRunner().invoke(main, ["frontier", *args])
    assert run.exit_code == 2 and says in run.output


def test_no_label_of_the_pictures_lies_on_another() -> None:
    offers = buying(BUY, STEP, 32768)
    figures = [_offers_figure(offers), _rack_figure(rack("h100", STEP, 8192, quant="fp8").points)]
    for figure in figures:
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.get_axes()[0].texts]
        assert len(boxes) > 10
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_an_impossible_picture_is_refused_before_any_work() -> None:
    found = CliRunner().invoke(main, ["frontier", "--device", "m4max", "--plot", "x.jpg"])
    assert found.exit_code == 2 and "llama-server" not in found.output


def test_a_rack_keeps_latents_whole_on_every_card_that_shares_them() -> None:
    """DeepSeek: attention of each sequence on one card holds more users than over eight."""
    found = rack("h200", load_model("deepseek-v3.2"), 32768, engine="sglang", quant="fp8", most=8)
    most = {p.attention_groups: p.serving.batch for p in found.cheapest}
    assert set(most) == {1, 8}
    assert most[8] > 3 * most[1]
    own = next(p for p in found.cheapest if p.attention_groups == 8)
    assert "--dp-size 8 --enable-dp-attention" in own.command
    assert "--nnodes" not in own.command

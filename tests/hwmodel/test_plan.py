"""Plans: what is recommended, what it costs in memory, and what is said when nothing fits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hwmodel.candidate import tier_of
from hwmodel.errors import RequestError
from hwmodel.model import step_shape
from hwmodel.plan import Plan, make_plan, max_context
from hwmodel.plan_json import plan_json
from hwmodel.plan_view import WIDTH, figure, plan_text, shell_lines
from hwmodel.request import make_request
from hwmodel.search import candidates, choose, splits_of, why_illegal

MODEL = step_shape()
FOUR = ("h100", "rtx4090", "m4max", "dgx-spark")


def plan(device: str, **options: Any) -> Plan:
    return make_plan(make_request(device, MODEL, **options))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {device: plan(device) for device in FOUR}


def test_the_vendors_type_is_recommended_where_it_fits(plans: dict[str, Plan]) -> None:
    found = {d: (p.chosen.count, p.chosen.run.quant.name) for d, p in plans.items()}
    assert found["m4max"] == (1, "Q4_K_S")
    assert found["dgx-spark"] == (1, "Q4_K_S")
    assert found["h100"] == (2, "Q4_K_S")
    assert found["rtx4090"] == (5, "Q4_K_S")
    assert all(p.chosen.engine.name == "llama.cpp" for p in plans.values())


def test_a_mac_needs_its_documented_setting_and_then_fits(plans: dict[str, Plan]) -> None:
    p = plans["m4max"]
    assert p.holds
    assert not p.fits
    assert p.fits_with == "sudo sysctl iogpu.wired_limit_mb=122880"
    assert p.memory.margin_bytes < 0 < p.memory.raised_margin_bytes
    assert p.fits_with in plan_text(p)


@pytest.mark.parametrize("device", FOUR)
def test_the_ledger_adds_up(device: str, plans: dict[str, Plan]) -> None:
    m, p = plan_json(plans[device])["memory"], plans[device]
    used = m["weights_bytes"] + m["kv_bytes"] + m["compute_bytes"] + m["mtp_bytes"]
    assert m["usable_bytes"] - used == pytest.approx(m["margin_bytes"], abs=4)
    assert m["weights_bytes"] == pytest.approx(111.494e9, rel=1e-4)
    memory = p.chosen.device.memory_bytes * p.chosen.count
    assert m["reserve_bytes"] + m["usable_bytes"] == pytest.approx(memory, abs=4)
    rows = 12 * 32768 + 33 * (512 + 512)
    stored = {"f16": 2.0, "q8_0": 34 / 32}[p.chosen.run.workload.kv_type]
    assert m["kv_bytes"] == rows * 2 * 8 * 128 * stored


@pytest.mark.parametrize("device", FOUR)
def test_json_has_every_promised_field(device: str, plans: dict[str, Plan]) -> None:
    found = json.loads(json.dumps(plan_json(plans[device])))
    promised = (
        "fits fits_with memory decode prefill ttft_s mtp placement command provenance nearest"
    )
    assert set(promised.split()) <= set(found)
    assert [d["depth"] for d in found["decode"]] == [512, 2048, 8192, 32768]
    for entry in found["decode"]:
        assert 0 < entry["low"] < entry["tok_per_s"] < entry["high"]
        assert entry["limiting"]
    assert len(found["prefill"]) == len(found["ttft_s"]) == 3
    assert isinstance(found["command"], str)
    assert found["nearest"] is None


@pytest.mark.parametrize("device", FOUR)
def test_the_text_is_one_screen_with_speeds_as_pairs(device: str, plans: dict[str, Plan]) -> None:
    text = plan_text(plans[device])
    lines = text.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= WIDTH
    e = plans[device].decode[0][1]
    assert e.value is not None
    assert e.roofline is not None
    share = 100 * e.value / e.roofline
    assert f"{figure(e.value)} tok/s ({share:.0f} % of {figure(e.roofline)})" in text


def test_decode_never_gains_from_depth(plans: dict[str, Plan]) -> None:
    for p in plans.values():
        speeds = [e.value or 0 for _, e in p.decode]
        assert speeds == sorted(speeds, reverse=True)


def test_one_h100_holds_a_three_bit_type_and_refuses_the_rest() -> None:
    single = plan("h100", count=1)
    assert single.fits
    assert single.chosen.run.quant.name == "IQ3_XXS"
    refused = plan("h100", count=1, quant="Q4_K_S")
    assert not refused.holds
    assert not refused.fits
    assert refused.has_nearest
    assert (refused.chosen.count, refused.chosen.run.quant.name) == (2, "Q4_K_S")
    found = plan_json(refused)
    assert found["fits"] is False
    assert found["fits_with"] is None
    assert found["nearest"]["count"] == 2
    assert len(found["decode"]) == 4
    assert "--model" in found["command"]
    assert "DOES NOT FIT" in plan_text(refused)


def test_a_wish_for_speed_is_met_by_a_smaller_type_where_the_best_is_too_slow() -> None:
    usual, asked = plan("m4max"), plan("m4max", min_decode=42)
    assert (usual.chosen.decode.value or 0) < 42 <= (asked.chosen.decode.value or 0)
    assert asked.holds
    assert asked.chosen.tier > usual.chosen.tier
    never = plan("m4max", min_decode=1000)
    fastest = plan("m4max", quant="IQ3_XXS").chosen.decode.value
    assert f"the fastest makes {fastest:.3g}" in never.problem


def test_too_slow_or_too_dear_is_not_called_too_large() -> None:
    wishes: list[dict[str, Any]] = [{"min_decode": 1000}, {"max_price": 100}]
    for wish in wishes:
        refused = plan("m4max", **wish)
        assert not refused.holds
        assert plan_text(refused).startswith("FITS, BUT NOT AS ASKED: ")
    assert plan_text(plan("h100", count=1, quant="Q4_K_S")).startswith("DOES NOT FIT: ")


@pytest.mark.parametrize(
    ("device", "options", "assumed"),
    [
        ("rtx3060", {"count": 1}, ""),  # more of them do: nothing else is needed
        ("rtx2080ti", {}, "--ram 128 --host desktop-ddr5"),
        ("rtx2080ti", {"ram_gb": 24, "host": "epyc-9654-2s"}, ""),  # the rest stays on disk
        ("laptop-32gb", {}, "--ram 32"),
    ],
)
def test_the_closest_names_the_host_memory_that_it_assumed(
    device: str, options: dict[str, Any], assumed: str
) -> None:
    p = plan(device, **options)
    shown = f", with {assumed}:" if assumed else ""
    assert p.assumed == assumed
    if p.has_nearest:
        assert f"\nThe closest that does{shown or ':'}\n" in plan_text(p)
        assert plan_json(p)["nearest"]["assumed"] == (assumed or None)
    if assumed:
        words = assumed.split()
        more = {"ram_gb": float(words[1]), **({"host": words[3]} if len(words) > 2 else {})}
        again = plan(device, **more)
        assert again.holds and again.chosen.host_layers == p.chosen.host_layers
        assert again.decode == p.decode


def test_llama_cpp_spreads_its_threads_over_the_memory_of_two_sockets() -> None:
    numa = "--numa distribute"
    assert numa in plan("epyc-9654-2s").command
    assert numa not in plan("epyc-9965-1s").command
    for host, spread in (("epyc-9654-2s", True), ("desktop-ddr5", False)):
        p = plan("rtx4090", count=1, ram_gb=256, host=host)
        assert p.chosen.host_layers and (numa in p.command) == spread
    assert numa not in plan("rtx4090", ram_gb=256, host="epyc-9654-2s", count=8).command


def test_drafts_say_at_which_depth_and_why_no_more() -> None:
    fastest, fewer = plan("m4max"), plan("h100")
    gains = {o.drafts: o.gain for o in fewer.drafts}
    assert gains[3] > gains[2] and fewer.best_drafts == 2
    for p, tail in (
        (fastest, "; 8,192 deep"),
        (fewer, "; 8,192 deep, the fewest within 0.03 of the best"),
    ):
        text = " ".join(plan_text(p).partition("Drafts")[2].partition("Split")[0].split())
        assert text.endswith(f"GB{tail}")


def test_a_split_that_no_engine_has_is_the_reason_that_is_named() -> None:
    refused = plan("m4max", split="tensor")
    assert refused.problem.endswith(
        "llama.cpp and MLX (mlx-lm) cannot split by tensor here; they can by layer"
    )


def test_servers_take_over_where_the_model_outgrows_small_machines() -> None:
    four, eight = plan("h100", count=4), plan("h100", count=8, quant="bf16")
    assert four.chosen.run.quant.name == "FP8-experts"
    assert four.chosen.engine.name in ("vllm", "sglang")
    assert four.chosen.run.placement.split == "expert"
    assert eight.chosen.run.placement.split in ("tensor", "expert")
    assert "stepfun-ai/Step-3.5-Flash" in eight.command


@pytest.mark.parametrize("count", [2, 4])
def test_rtx_4090s_hold_what_fits_their_cards(count: int) -> None:
    p = plan("rtx4090", count=count)
    if count == 2:
        assert not p.holds
        assert p.has_nearest
    else:
        assert p.fits
        assert p.chosen.run.quant.name in ("IQ3_XXS", "Q3_K_M")


def test_one_rtx_4090_with_ram_keeps_experts_in_host_memory() -> None:
    p = plan("rtx4090", count=1, ram_gb=128)
    assert p.fits
    assert p.chosen.run.quant.name == "Q4_K_S"
    assert 30 <= p.chosen.host_layers <= 42
    assert p.chosen.run.placement.ssd_share == 0
    assert f"--n-cpu-moe {p.chosen.host_layers}" in p.command or "--cpu-moe" in p.command
    routed = 42 * 288 * 3 * 1280 * 4096 * 4.5 / 8
    assert p.memory.host_bytes == pytest.approx(routed * p.chosen.host_layers / 42, rel=0.03)
    assert 8 < (p.decode[0][1].value or 0) < 30


def test_a_laptop_streams_from_its_disk_only_when_ram_is_stated() -> None:
    without = plan("laptop-32gb")
    assert not without.holds
    assert "--ram" in without.problem
    streamed = plan("laptop-32gb", ram_gb=32)
    assert streamed.fits
    assert streamed.chosen.run.placement.ssd_share > 0.5
    assert (streamed.decode[0][1].value or 0) < 10
    assert "stay on disk" in plan_text(streamed)


def test_cards_with_host_memory_share_layers_by_weight_not_by_number() -> None:
    p = plan("rtx5090", count=2, ram_gb=192, quant="Q4_K_S")
    shares = p.chosen.layer_shares
    assert sum(shares) == 45
    assert shares[0] > shares[1]
    assert f"--tensor-split {shares[0]},{shares[1]}" in p.command
    assert len(plan("rtx5090", count=8, quant="Q4_K_S").chosen.layer_shares) == 8
    assert "--tensor-split" not in plan("rtx5090", count=8, quant="Q4_K_S").command


def test_a_hopeless_device_is_shown_what_its_disk_could_do() -> None:
    p = plan("desktop-ddr4")
    assert not p.holds
    assert p.has_nearest
    assert p.chosen.run.placement.ssd_share > 0
    assert "no published type fits desktop-ddr4" in plan_text(p)


def test_more_ram_never_needs_more_disk() -> None:
    shares = []
    for ram in (32, 48, 64, 96, 128):
        p = plan("laptop-32gb", ram_gb=ram, quant="Q4_K_S")
        shares.append(p.chosen.run.placement.ssd_share)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0


def test_wishes_are_honoured() -> None:
    cheap = plan("dgx-spark", max_price=5000)
    assert cheap.holds
    assert cheap.chosen.count == 1
    dear = plan("h100", max_price=50_000)
    assert dear.chosen.count == 1
    none = plan("h100", max_price=1000)
    assert not none.holds
    assert "costs" in none.problem
    fast = plan("dgx-spark", min_decode=1e4)
    assert not fast.holds
    assert "nothing reaches 10,000 tokens/s at 32,768 tokens" in fast.problem


def test_a_faster_wish_is_met_by_more_devices_or_refused() -> None:
    slow, fast = plan("h100"), plan("h100", min_decode=100, quant="FP8")
    assert fast.holds
    assert fast.chosen.count > slow.chosen.count
    assert (fast.decode[-1][1].value or 0) >= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tensor", "count": 4, "quant": "FP8"}, "320, not a multiple of the 128"),
        ({"split": "tensor", "count": 3}, "legal counts: 1, 2, 4, 8"),
        ({"split": "expert", "count": 5}, "do not divide by 5"),
        ({"split": "tensor", "count": 2, "engine": "llama.cpp"}, "legal: layer"),
    ],
)
def test_impossible_parallelism_is_refused_with_what_is_legal(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        plan("h100", **options)


def test_fp8_experts_are_never_split_by_four() -> None:
    for count in (4, 8):
        assert why_illegal(MODEL, "FP8-experts", "tensor", count)
        assert why_illegal(MODEL, "FP8-experts", "expert", count) is None
        request = make_request("h100", MODEL, quant="fp8", count=count)
        assert {c.run.placement.split for c in candidates(request, count)} == {"expert"}


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("h100", {"engine": "vllm", "count": 4, "split": "tensor"}, "for BF16 in vLLM"),
        ("h100", {"engine": "vllm", "count": 4, "split": "tensor"}, "320, not a multiple of"),
        ("h100", {"count": 1, "quant": "Q4_K_S"}, "Q4_K_S does not fit h100: 28.8 GB too little"),
        ("rtx4090", {"count": 2}, "for IQ3_XXS in llama.cpp 29."),
        ("rtx4090", {"count": 2}, "--ram GB adds host memory and disk"),
        ("m4max-32core", {"count": 1}, "no published type fits m4max-32core"),
    ],
)
def test_what_is_missing_is_said(device: str, options: dict[str, Any], message: str) -> None:
    assert message in plan(device, **options).problem


def test_the_longest_context_is_the_longest_that_fits() -> None:
    p = plan("rtx4090", count=5)
    assert p.request.context < p.max_context < MODEL.max_context
    used = dataclasses.replace(p.chosen, run=p.chosen.at(drafts=p.best_drafts))
    assert dataclasses.replace(used, context=p.max_context).holds
    assert not dataclasses.replace(used, context=p.max_context + 1).holds
    assert max_context(plan("h100").chosen) == MODEL.max_context


def test_statistics_replace_the_published_acceptance(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text('{"acceptance": [0.01, 0.01, 0.01]}')
    p = plan("m4max", stats=str(path))
    assert p.best_drafts == 0
    assert plan_json(p)["mtp"]["acceptance"] == [0.01, 0.01, 0.01]
    path.write_text('{"acceptance": [1.0, 1.0, 1.0]}')
    assert plan("m4max", stats=str(path)).best_drafts == 3


def test_concurrency_multiplies_the_cache() -> None:
    one, eight = plan("h100", count=2), plan("h100", count=2, concurrency=8)
    assert eight.memory.kv_bytes == 8 * one.memory.kv_bytes
    assert "--parallel 8" in eight.command
    assert "--ctx-size 262144" in eight.command


def test_a_candidate_is_offered_once_per_engine_and_split() -> None:
    request = make_request("h100", MODEL)
    for count in (1, 4):
        found = [(c.engine.name, c.run.placement.split, c.run.quant.name) for c in
                 candidates(request, count)]  # fmt: skip
        assert len(found) == len(set(found))


def test_the_choice_does_not_depend_on_the_order_of_wishes() -> None:
    request = make_request("h100", MODEL, count=2)
    chosen = choose(request)
    assert chosen is not None
    again = choose(dataclasses.replace(request, quant=chosen.run.quant.name))
    assert again is not None
    assert again.run == chosen.run


def test_what_devices_and_engines_can_do_together() -> None:
    h100, cpu = make_request("h100", MODEL), make_request("desktop-ddr5", MODEL)
    engines = {e.name: e for e in h100.engines}
    assert splits_of(engines["llama.cpp"], h100.device, 4) == ("layer",)
    assert splits_of(engines["vllm"], h100.device, 4) == ("tensor", "expert")
    assert splits_of(engines["llama.cpp"], cpu.device, 2) == ()
    assert [e.name for e in cpu.engines] == ["llama.cpp"]
    assert tier_of(choose(h100).quality) == 1  # type: ignore[union-attr]


def test_a_command_over_several_lines_is_the_same_command() -> None:
    command = "prog serve --a 1 --b '{\"x\": 2}' --c 3 --long " + "y" * 60
    lines = shell_lines(command, 40)
    assert len(lines) > 1
    assert all(line.endswith(" \\") for line in lines[:-1])
    joined = " ".join(line.removesuffix(" \\").strip() for line in lines)
    assert joined == command


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    device=st.sampled_from(["h100", "m4max", "rtx4090", "dgx-spark", "a100"]),
    context=st.integers(1, 262144),
    concurrency=st.integers(1, 64),
)
def test_any_context_gets_an_answer_that_adds_up(
    device: str, context: int, concurrency: int
) -> None:
    p = plan(device, context=context, concurrency=concurrency)
    found = plan_json(p)
    depths = [d["depth"] for d in found["decode"]]
    assert depths == sorted(set(depths))
    assert depths[-1] == context
    assert found["command"]
    if p.holds:
        assert p.memory.raised_margin_bytes >= 0
        assert p.max_context >= context
    assert plan_text(p)


def test_streaming_from_disk_is_not_called_calibrated() -> None:
    """No published run reads experts from disk, so its speed is an extrapolation."""
    found = plan("laptop-32gb", ram_gb=32)
    assert found.chosen.run.placement.ssd_share > 0
    assert found.decode[0][1].status == "extrapolated"
    assert "disk" in found.decode[0][1].reason


def test_a_count_that_nothing_can_be_split_over_says_why() -> None:
    found = plan("m4max", count=99)
    assert not found.holds
    assert found.has_nearest
    assert "99 devices for 45 layers" in found.problem


def test_doubts_are_named_where_they_bear_on_the_plan(plans: dict[str, Plan]) -> None:
    network = "links.network_bytes_per_s"
    assert network in plans["m4max"].chosen.device.unverified()
    assert network not in plan_text(plans["m4max"])  # one machine sends nothing to another
    assert network in plan_text(plan("m4max", count=2))

"""The published claims: all appear, each is computed, and nobody's verdict is copied."""

import csv
import dataclasses
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hwmodel.claims import finding
from hwmodel.claims.check import check_claims, claims_markdown
from hwmodel.claims.finding import CONTRADICTED, HOLDS, NOT_TESTABLE, load_claims
from hwmodel.claims.price import CARD, CLOSE, OTHER_CARDS
from hwmodel.cli import main
from hwmodel.model import step_shape
from hwmodel.quant import load_quant, weight_bytes

IDS = [f"C{i:02}" for i in range(1, 40)]


@cache
def _json() -> dict[str, dict[str, Any]]:
    run = CliRunner().invoke(main, ["claims", "--json"])
    assert run.exit_code == 0, run.output
    return {c["id"]: c for c in json.loads(run.output)["claims"]}


def test_every_claim_appears_once_and_in_order() -> None:
    assert list(_json()) == IDS


@pytest.mark.parametrize("name", IDS)
def test_a_finding_has_a_value_a_verdict_and_a_reason(name: str) -> None:
    c = _json()[name]
    kinds = (HOLDS, CONTRADICTED, NOT_TESTABLE)
    assert c["verdict"] in kinds or c["verdict"].startswith("holds when ")
    assert c["why"].endswith(".")
    if c["verdict"] != NOT_TESTABLE:
        assert c["computed"] not in ("", "-") and c["values"]
        assert c["command"].startswith("hwmodel ")


def test_other_peoples_verdicts_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Findings stay the same with every column of judgement replaced by nonsense."""
    before = [f for _, f in check_claims(["C01", "C14", "C31"])]
    source = Path(finding.__file__).parents[1] / "data" / "claims.csv"
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    judged = ("how_a_cost_model_tests_it", "independent_evidence", "verdict")
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "claims.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**r, **dict.fromkeys(judged, "nonsense")} for r in rows)
    monkeypatch.setattr(finding, "__file__", str(tmp_path / "claims" / "finding.py"))
    load_claims.cache_clear()
    try:
        checked = check_claims(["C01", "C14", "C31"])
        assert [f for _, f in checked] == before
        assert all("nonsense" not in json.dumps(dataclasses.asdict(c)) for c, _ in checked)
    finally:
        load_claims.cache_clear()


def test_values_are_those_of_the_cost_model() -> None:
    found = _json()
    size = weight_bytes(step_shape(), load_quant("Q4_K_S"))
    assert found["C11"]["values"]["bytes"] == pytest.approx(size)
    assert found["C28"]["values"]["total"] == step_shape().parameters
    assert found["C26"]["values"]["full_layers"] == 12
    assert found["C04"]["values"]["most"] == 4


def test_one_h100_does_not_hold_the_int4_file_and_two_do() -> None:
    values = _json()["C14"]["values"]
    assert values["short_bytes"] > 25e9 and values["needed"] == 2
    assert _json()["C14"]["verdict"] == CONTRADICTED


def test_a_day_is_paid_for_every_card_that_is_needed() -> None:
    values = _json()["C16"]["values"]
    assert values["low"] == 8 * 2 * 1.5 and values["high"] == 8 * 2 * 2.5


def test_what_changed_since_the_launch_is_computed_at_both_dates() -> None:
    """C23: vLLM drafted one token then and drafts three now."""
    claim = _json()["C23"]
    values = claim["values"]
    assert (values["launch_drafts"], values["max_drafts"]) == (1, 3)
    assert values["plain_tok_s"] < values["launch_tok_s"] < values["drafted_tok_s"]
    assert claim["verdict"].startswith("holds when the build is of the launch (2026-02)")


def test_what_depends_on_a_date_says_so() -> None:
    """Speeds rest on engines of a version, prices on the day they were listed."""
    for name in ("C01", "C05", "C08", "C23", "C25", "C30", "C34", "C35"):
        assert any("(20" in text or " 20" in text for text in _json()[name]["rests_on"]), name
    assert all("as of 202" in text for text in _json()["C15"]["rests_on"])
    assert "2022" in _json()["C20"]["rests_on"][0]
    assert _json()["C28"]["rests_on"] == []  # a count rests on no date


RIVALS = {
    "C30": ("deepseek-v3.2",),
    "C31": ("kimi-k2",),
    "C32": ("GLM-4.7",),
    "C33": ("minimax-m2", "mimo-v2-flash"),
}


@pytest.mark.parametrize("name", RIVALS)
def test_the_verdict_on_a_rival_follows_from_one_card_fixed_for_all(name: str) -> None:
    """Other cards are a note: no choice among them makes a claim hold."""
    claim = _json()[name]
    factors = []
    for title in RIVALS[name]:
        stated, found = (claim["values"][f"{title}_{k}"] for k in ("stated", CARD))
        factors.append(max(found / stated, stated / found))
        assert f"{found:.1f} on {CARD}" in claim["computed"]
        assert all(f"on {card}" in claim["why"] for card in OTHER_CARDS)
    assert (claim["verdict"] == "contradicted") == (max(factors) > CLOSE)
    assert not any(card in claim["verdict"] for card in (CARD, *OTHER_CARDS))
    assert not any(f"on {card}" in claim["computed"] for card in OTHER_CARDS)


def test_prefill_is_neither_linear_nor_wholly_quadratic() -> None:
    values = _json()["C27"]["values"]
    assert 1.2 < values["exponent_work"] < 2 and 1.2 < values["exponent_time"] < 2


def test_drafts_gain_less_where_reading_weights_is_the_limit() -> None:
    gains = _json()["C05"]["values"]
    assert gains["m4max"] < gains["h100"] < gains["8x h200"]


@pytest.mark.parametrize("name", [i for i in IDS if i not in ("C09", "C22")])
def test_the_command_of_a_claim_runs(name: str) -> None:
    for command in _json()[name]["command"].split("; "):
        run = CliRunner().invoke(main, shlex.split(command)[1:])
        assert run.exit_code in (0, 1), (command, run.output)


def test_the_sweeps_print_the_figures_of_the_claim() -> None:
    claim = _json()["C01"]
    run = CliRunner().invoke(main, shlex.split(claim["command"].split("; ")[0])[1:])
    row = next(csv.DictReader(run.output.splitlines()))
    assert float(row["value"]) == pytest.approx(claim["values"]["hopper_tok_s"], rel=1e-4)


def test_the_report_has_every_claim(tmp_path: Path) -> None:
    out = tmp_path / "claims.md"
    run = CliRunner().invoke(main, ["claims", "--markdown", str(out)])
    assert run.exit_code == 0
    text = out.read_text()
    assert all(f"### {i}\n" in text for i in IDS)
    assert text == claims_markdown(check_claims())


def test_a_dash_prints_the_report_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, ["claims", "C14", "--markdown", "-"])
    assert run.exit_code == 0 and "### C14\n" in run.output and not list(tmp_path.iterdir())
    both = CliRunner().invoke(main, ["claims", "C14", "--markdown", "-", "--json"])
    assert both.exit_code == 2 and "leave one of them out" in both.output


def test_one_claim_can_be_asked_for_and_an_unknown_one_is_refused() -> None:
    run = CliRunner().invoke(main, ["claims", "c14"])
    assert run.exit_code == 0 and run.output.startswith("C14  H100 rental")
    bad = CliRunner().invoke(main, ["claims", "C99"])
    assert bad.exit_code == 2 and "expected C01 to C39" in bad.output

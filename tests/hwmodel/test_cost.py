"""Costs: arithmetic of hours, tokens and energy; what is unknown is said to be so."""

import json

import pytest
from click.testing import CliRunner

from hwmodel.catalogue import load_model
from hwmodel.cli import main
from hwmodel.cost import CostSheet, Terms, api_usd, cost_sheet, price_data, terms_of
from hwmodel.errors import RequestError
from hwmodel.plan import make_plan
from hwmodel.request import make_request


def _sheet(device: str, **terms: float) -> CostSheet:
    plan = make_plan(make_request(device, load_model("step-3.5-flash")))
    return cost_sheet(plan.chosen, terms_of(plan.chosen, **terms), 8192)


def test_every_price_has_a_source_and_a_date() -> None:
    for key, price in price_data().items():
        assert price.source and price.as_of, key


def test_an_owned_hour_is_the_price_over_its_hours_and_the_electricity() -> None:
    terms = Terms(6000.0, None, 500.0, 0.2, years=3, days_per_year=250, hours_per_day=8)
    assert terms.owned_usd_per_h == pytest.approx(6000 / 6000 + 0.5 * 0.2)
    assert terms.break_even_days is None


def test_buying_pays_when_the_saved_rent_is_the_price() -> None:
    terms = Terms(8000.0, 2.0, 1000.0, 0.5, years=3, days_per_year=250, hours_per_day=8)
    assert terms.break_even_days == pytest.approx(8000 / (1.5 * 8))
    dear = Terms(8000.0, 0.4, 1000.0, 0.5, years=3, days_per_year=250, hours_per_day=8)
    assert dear.break_even_days is None


def test_a_million_tokens_cost_what_their_hours_cost() -> None:
    sheet = _sheet("h100", rent=10.0)
    rented = next(c for c in sheet.costs if c.way == "rented")
    assert rented.per_m_output == pytest.approx(1e6 / sheet.output_tok_s / 3600 * 10)
    assert rented.per_m_input == pytest.approx(1e6 / sheet.input_tok_s / 3600 * 10)
    assert rented.per_day == pytest.approx(80)
    watts = sheet.terms.watts
    assert watts is not None and sheet.joules_per_output is not None
    assert sheet.joules_per_output * sheet.output_tok_s == pytest.approx(watts)


def test_cards_need_a_machine_around_them() -> None:
    card, machine = _sheet("rtx-pro-6000"), _sheet("m4max")
    price, count = card.candidate.device.price_usd, card.candidate.count
    assert price is not None and card.terms.buy_usd is not None
    assert card.terms.buy_usd > price * count
    assert machine.terms.buy_usd == machine.candidate.device.price_usd


def test_rent_of_every_card_counts() -> None:
    sheet = _sheet("h100")
    each = sheet.candidate.device.rent_usd_per_h
    assert each is not None and sheet.candidate.count == 2
    assert sheet.terms.rent_usd_per_h == pytest.approx(2 * each)


def test_the_vendors_service_prices_cached_tokens_apart() -> None:
    assert api_usd(1e6, 1e6, 1e6) == pytest.approx(0.10 + 0.02 + 0.30)


@pytest.mark.parametrize(("option", "value"), [("hours", 25.0), ("years", 0.0), ("kwh", -1.0)])
def test_absurd_terms_are_refused(option: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"--{option} is"):
        _sheet("m4max", **{option: value})


def test_the_command_says_what_it_does_not_know() -> None:
    text = CliRunner().invoke(main, ["cost", "--device", "m4max"])
    assert text.exit_code == 0, text.output
    assert "no rent is known for m4max; --rent USD adds it" in text.output
    data = json.loads(CliRunner().invoke(main, ["cost", "--device", "h100", "--json"]).output)
    assert {c["way"] for c in data["costs"]} == {"bought", "rented", "electricity"}


def test_the_vendors_prices_stand_beside_its_own_model_alone() -> None:
    runs = [
        CliRunner().invoke(main, ["cost", "--device", "m4max", "--model", name]).output
        for name in ("step-3.5-flash", "minimax-m2")
    ]
    assert ["vendor's service" in text for text in runs] == [True, False]

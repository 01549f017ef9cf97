"""What quantisation costs: published figures, and what lies between them."""

import pytest

from hwmodel.candidate import quality_of
from hwmodel.model import step_shape
from hwmodel.quality import quality_cost
from hwmodel.quant import load_quant


def test_measured_mixtures_are_returned_as_measured() -> None:
    assert quality_cost("Q5_K_M", 5.98).perplexity_increase == pytest.approx(0.006421)
    assert quality_cost("IQ2_S", 2.78).perplexity_increase == pytest.approx(0.561208)
    assert "AesSedai" in quality_cost("Q5_K_M", 5.98).source


def test_fewer_bits_never_cost_less() -> None:
    bits = [1.6 + 0.1 * i for i in range(80)]
    costs = [quality_cost("x", b).perplexity_increase or 0.0 for b in bits]
    assert costs == sorted(costs, reverse=True)


def test_what_nobody_measured_is_said() -> None:
    assert "extrapolated below 2.78 bits" in quality_cost("IQ1_S", 1.6).text()
    assert quality_cost("FP8-experts", 8.3).perplexity_increase is None
    assert "no published perplexity" in quality_cost("FP8-experts", 8.3).text()
    assert quality_cost("BF16", 16).text() == "no loss (the model's own type)"


def test_the_vendors_type_costs_about_five_percent() -> None:
    cost = quality_of(step_shape(), load_quant("Q4_K_S"))
    assert 0.04 < (cost.perplexity_increase or 0) < 0.06
    assert cost.text().startswith("perplexity about +4.9 %")

"""Tokens per step from acceptance by position."""

import pytest

from hwmodel.speculative import PUBLISHED_SHARES, conditional_acceptance, tokens_per_step
from refimpl.errors import InputError


def test_expected_tokens_are_one_plus_the_chances_of_each_prefix() -> None:
    assert tokens_per_step(3, (0.9, 0.8, 0.5)) == pytest.approx(1 + 0.9 + 0.72 + 0.36)
    assert tokens_per_step(1, (0.9, 0.8, 0.5)) == pytest.approx(1.9)
    assert tokens_per_step(0) == 1


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_published_shares_are_reproduced(drafts: int) -> None:
    """Accepted tokens per step over drafts per step is the share that the logs print."""
    share = (tokens_per_step(drafts) - 1) / drafts
    assert share == pytest.approx(PUBLISHED_SHARES[drafts - 1])


def test_chances_are_between_0_and_1() -> None:
    assert all(0 <= p <= 1 for p in conditional_acceptance((0.9, 0.2, 0.1)))


def test_one_figure_speaks_for_all_positions() -> None:
    assert tokens_per_step(2, (0.5,)) == pytest.approx(1.75)


def test_impossible_acceptance_is_refused() -> None:
    with pytest.raises(InputError, match="outside"):
        tokens_per_step(2, (1.2, 0.5))

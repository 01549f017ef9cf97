"""Claims about prices, and the vendor's table of decoding cost."""

from __future__ import annotations

from functools import lru_cache

from hwmodel.claims.finding import CONTRADICTED, HOLDS, Finding, Test, untestable, when
from hwmodel.claims.machines import fewest, priced
from hwmodel.cost import RentOffer, rent_offers
from hwmodel.devices import load_device
from hwmodel.rivals import Rival, compare_rivals

HOURS = 8
CLAIMED_RENT = (1.5, 2.5)


def h100_rent() -> Finding:
    """C15"""
    offers = rent_offers("h100")
    inside = [o for o in offers if CLAIMED_RENT[0] <= o.usd_per_h <= CLAIMED_RENT[1]]
    shown = ", ".join(f"{o.usd_per_h:g} ({o.note})" for o in offers)
    verdict = HOLDS if len(inside) == len(offers) else CONTRADICTED
    if inside and len(inside) < len(offers):
        verdict = when("one takes " + " or ".join(dict.fromkeys(o.note for o in inside)))
    return Finding(
        computed=f"USD per hour: {shown}",
        verdict=verdict,
        why=f"In the claimed range: {len(inside)} of {len(offers)} listed prices.",
        command="hwmodel cost --device h100",
        values={f"offer_{i}": o.usd_per_h for i, o in enumerate(offers)},
        rests_on=_quoted(offers),
    )


def _quoted(offers: tuple[RentOffer, ...]) -> tuple[str, ...]:
    """Rents with the dates at which they were listed."""
    return tuple(f"{o.usd_per_h:g} USD an hour as of {o.as_of}" for o in offers)


def a_days_rent() -> Finding:
    """C16"""
    need = fewest("h100", "Q4_K_S")
    low, high = (HOURS * need * price for price in CLAIMED_RENT)
    prices = [o.usd_per_h for o in rent_offers("h100")]
    least, most = HOURS * need * min(prices), HOURS * need * max(prices)
    return Finding(
        computed=f"{need} cards x {HOURS} h: {low:.0f} to {high:.0f} dollars at the article's own "
        f"price, {least:.0f} to {most:.0f} at listed ones",
        verdict=CONTRADICTED if low > 12 else HOLDS,
        why="12 to 20 dollars pay for one card, which does not hold the int4 file; they buy "
        f"{12 / HOURS / need:.2f} to {20 / HOURS / need:.2f} dollars an hour for each of {need}.",
        command="hwmodel cost --device h100 --hours 8",
        values={"needed": float(need), "least": least, "most": most, "low": low, "high": high},
        rests_on=_quoted(rent_offers("h100")),
    )


def four_4090_price() -> Finding:
    """C20"""
    each = load_device("rtx4090").price_usd or 0.0
    total = 4 * each
    return Finding(
        computed=f"4 x {each:,.0f} = {total:,.0f} dollars",
        verdict=HOLDS if abs(total / 6400 - 1) < 0.02 else CONTRADICTED,
        why="The list price of 2022, for the cards alone, without the machine around them.",
        command="hwmodel devices show rtx4090",
        values={"usd": total},
        rests_on=priced("rtx4090", "price.buy_usd"),
    )


# The vendor's table says "Hopper" and no more. The assumptions are fixed for all of its rows before
# anything is computed: this card, experts over as many cards as the row says, each sequence's
# attention on one card, machines that exchange over their network, sliding layers that keep their
# window. A verdict follows from them alone; other cards are shown beside it and decide nothing.
CARD = "h100"
OTHER_CARDS = ("h800", "h200", "h20")
CLOSE = 1.5  # a factor that the spread of the estimates leaves open
WHY = (
    "Device time per token at 128K against Step's, at the largest batch that keeps the stated "
    "speed; {card}, expert parallel as stated, each sequence's attention on one card, for all "
    "rows. The vendor's figures are estimates too (its note 4). Beside the verdict: {beside}."
)


@lru_cache(maxsize=16)
def _table(card: str = CARD, sliding: str = "window") -> dict[str, Rival]:
    """The vendor's rows by title, machines exchanging over their network."""
    found = compare_rivals(sliding=sliding, links="network", device=card)
    return {r.title: r for r in found.rivals}


def _factor(found: float, stated: float) -> float:
    """By how much stated and computed differ, 1 or more."""
    return max(found / stated, stated / found)


def _rival_claim(*titles: str) -> Finding:
    """Device time per token against Step's on `CARD`, within `CLOSE` of what is stated or not."""
    values: dict[str, float | None] = {}
    shown, beside = [], []
    worst = 1.0
    for title in titles:
        row = _table()[title]
        if row.relative is None:
            return untestable(f"{title} does not reach the stated speed on {CARD}.")
        worst = max(worst, _factor(row.relative, row.stated_relative))
        others = {card: _table(card)[title].relative for card in OTHER_CARDS}
        full = _table(sliding="full")[title].relative
        values |= {f"{title}_stated": row.stated_relative, f"{title}_{CARD}": row.relative}
        values |= {f"{title}_{card}": r for card, r in others.items()}
        values[f"{title}_full_caches"] = full
        shown.append(
            f"{title} {row.stated_relative:g}x stated; computed {row.relative:.1f} on {CARD}"
        )
        beside.append(
            f"{title} "
            + ", ".join(f"{_figure(r)} on {card}" for card, r in others.items())
            + f"; {_figure(full)} on {CARD} where sliding layers keep the whole context"
        )
    left = HOLDS if worst <= 1.1 else when(f"a factor of {worst:.1f} is left to the estimate")
    return Finding(
        computed="; ".join(shown),
        verdict=left if worst <= CLOSE else CONTRADICTED,
        why=WHY.format(card=load_device(CARD).title, beside="; ".join(beside)),
        command="; ".join(
            ["hwmodel rivals", *(f"hwmodel rivals --device {c}" for c in OTHER_CARDS),
             "hwmodel rivals --sliding full"]
        ),
        values=values,
        extrapolated=True,
        rests_on=_engine(),
    )  # fmt: skip


def _figure(relative: float | None) -> str:
    return "not reached" if relative is None else f"{relative:.1f}"


def _engine() -> tuple[str, ...]:
    """The engine of the comparison with its version and date."""
    run = _table()["Step 3.5 Flash"].alone.run
    return (getattr(run.engine.engine, "label", run.engine.engine.name),)


def step_itself() -> Finding:
    """C29: the unit of the comparison; what can be tested is how many users get its speed."""
    row = _table()["Step 3.5 Flash"]
    point = row.found
    if point is None:
        return untestable("the stated speed is not reached on such cards.")
    return Finding(
        computed=f"100 tok/s for each of {point.batch} users on {row.devices} cards "
        f"({row.alone.tok_s:.0f} alone), {point.device_s_per_token * 1e3:.2f} ms of a card a token",
        verdict=when(f"at most {point.batch} users share the {row.devices} cards"),
        why="The unit of the vendor's table: 1.0 by definition; its speed is what can be tested.",
        command="hwmodel rivals",
        values={"batch": float(point.batch), "alone_tok_s": row.alone.tok_s},
        extrapolated=True,
        rests_on=_engine(),
    )


def deepseek() -> Finding:
    """C30"""
    return _rival_claim("deepseek-v3.2")


def kimi() -> Finding:
    """C31"""
    return _rival_claim("kimi-k2")


def glm() -> Finding:
    """C32"""
    return _rival_claim("GLM-4.7")


def minimax_and_mimo() -> Finding:
    """C33"""
    return _rival_claim("minimax-m2", "mimo-v2-flash")


TESTS: dict[str, Test] = {
    "C15": h100_rent, "C16": a_days_rent, "C20": four_4090_price, "C29": step_itself,
    "C30": deepseek, "C31": kimi, "C32": glm, "C33": minimax_and_mimo,
}  # fmt: skip

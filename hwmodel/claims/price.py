"""Claims about prices, and the vendor's table of decoding cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from hwmodel.claims.finding import CONTRADICTED, HOLDS, Finding, Test, untestable, when
from hwmodel.claims.machines import fewest
from hwmodel.cost import rent_offers
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
        why=f"{len(inside)} of {len(offers)} listed prices lie in the claimed range.",
        command="hwmodel cost --device h100",
        values={f"offer_{i}": o.usd_per_h for i, o in enumerate(offers)},
    )


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
    )


CLOSE = 1.5  # a factor that the spread of the estimates leaves open
ATTENTION = ("machine", "card")  # data-parallel attention of models on several machines


@lru_cache(maxsize=8)
def _table(sliding: str, attention: str) -> dict[str, Rival]:
    """The vendor's rows by title, machines exchanging over their network."""
    found = compare_rivals(sliding=sliding, links="network", attention=attention)
    return {r.title: r for r in found.rivals}


def _relatives(title: str, sliding: str) -> list[float]:
    """Cost against Step's for both forms of attention; one value on a single machine."""
    found = [_table(sliding, attention)[title].relative for attention in ATTENTION]
    return sorted({r for r in found if r is not None})


def _factor(found: Sequence[float], stated: float) -> float:
    """How far a stated value lies above (> 1) or below (< 1) the computed range, 1 inside."""
    return max(1.0, stated / found[-1]) * min(1.0, stated / found[0])


def _is_close(factor: float) -> bool:
    return max(factor, 1 / factor) <= CLOSE


def _rival_claim(*titles: str) -> Finding:
    """Device time per token against Step's; close where the stated value lies within a factor."""
    values: dict[str, float | None] = {}
    shown, off, conditions = [], [], []
    close, worst = True, 1.0
    for title in titles:
        stated = _table("window", "machine")[title].stated_relative
        found, full = _relatives(title, "window"), _relatives(title, "full")
        if not found:
            return untestable(f"{title} does not reach the stated speed on such cards.")
        factor = _factor(found, stated)
        values |= {f"{title}_stated": stated, f"{title}_low": found[0], f"{title}_high": found[-1]}
        shown.append(f"{title} {' to '.join(f'{v:.1f}' for v in found)}x")
        off.append(f"{title} is stated {_apart(factor)}")
        close = close and _is_close(factor)
        worst = max(worst, factor, 1 / factor)
        if full and not _is_close(_factor(full, stated)):
            conditions.append("caches of sliding layers hold only their window")
        if len(found) > 1:
            conditions.append("every card or machine keeps the attention of its own sequences")
    if worst > 1.1:
        conditions.append(f"a factor of {worst:.1f} is left to the estimate")
    asked = " and ".join(dict.fromkeys(conditions))
    return Finding(
        computed=", ".join(shown),
        verdict=(when(asked) if asked else HOLDS) if close else CONTRADICTED,
        why="Device time per token at 128K against Step's, at the largest batch that keeps the "
        f"stated speed: {'; '.join(off)}.",
        command="hwmodel rivals; hwmodel rivals --attention card; hwmodel rivals --sliding full",
        values=values,
        extrapolated=True,
    )


def _apart(factor: float) -> str:
    if factor == 1:
        return "inside what is computed"
    far = max(factor, 1 / factor)
    return f"{far:.1f} times {'above' if factor > 1 else 'below'} what is computed"


def step_itself() -> Finding:
    """C29: the unit of the comparison; what can be tested is how many users get its speed."""
    row = _table("window", "machine")["Step 3.5 Flash"]
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

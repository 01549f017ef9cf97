"""Claims about prices, and the vendor's table of decoding cost."""

from __future__ import annotations

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


def _rivals(*titles: str) -> list[tuple[Rival, Rival]]:
    """The rows with the exchange between machines hidden, and over their network."""
    hidden = {r.title: r for r in compare_rivals(links="domain").rivals}
    network = {r.title: r for r in compare_rivals(links="network").rivals}
    return [(hidden[t], network[t]) for t in titles]


def _rival_claim(*titles: str) -> Finding:
    rows = _rivals(*titles)
    values: dict[str, float | None] = {}
    shown = []
    factors = []
    for hidden, network in rows:
        values[f"{hidden.title}_stated"] = hidden.stated_relative
        values[f"{hidden.title}"] = hidden.relative
        values[f"{hidden.title}_network"] = network.relative
        if hidden.relative is None or network.relative is None:
            return untestable(f"{hidden.title} does not reach the stated speed on such cards.")
        text = f"{hidden.title} {hidden.relative:.1f}x"
        if hidden.devices > 8:
            text += f" (over a network {network.relative:.1f}x)"
        shown.append(text)
        factors.append(hidden.relative / hidden.stated_relative)
    worst = max(factors, key=lambda f: max(f, 1 / f))
    close = max(worst, 1 / worst) <= 1.5
    off = f"{max(worst, 1 / worst):.1f} times {'above' if worst > 1 else 'below'}"
    return Finding(
        computed=", ".join(shown),
        verdict=when("sliding layers keep only their window and machines exchange for nothing")
        if close
        else CONTRADICTED,
        why="Device time per token at 128K, at the largest batch that keeps the stated speed; "
        + ("within a factor of 1.5 of the vendor's figure." if close else f"{off} the vendor's."),
        command="hwmodel rivals",
        values=values,
        extrapolated=True,
    )  # fmt: skip


def step_itself() -> Finding:
    """C29: the unit of the comparison; what can be tested is its speed at batch one."""
    (row, _), *_rest = _rivals("Step 3.5 Flash")
    point = row.found
    if point is None:
        return untestable("the stated speed is not reached on such cards.")
    return Finding(
        computed=f"100 tok/s for each of {point.batch} users on {row.devices} cards "
        f"({row.alone.tok_s:.0f} alone), {point.device_s_per_token * 1e3:.2f} ms of a card a token",
        verdict=when(f"at most {point.batch} users share the eight cards"),
        why="The unit of the vendor's table: 1.0 by definition; its speed is within reach.",
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

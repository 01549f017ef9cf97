"""What tokens cost: bought, rented, or electricity alone; per day, per million, in joules.

One machine is used `hours_per_day` on `days_per_year`. Bought, its price is written off in a
straight line over `years` of such hours; rented, every hour costs the same; electricity is what
the devices draw at their limit and the machine around them (an upper bound: decoding is bound by
memory and draws less). A token's cost is the cost of an hour over the tokens of an hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hwmodel.candidate import Candidate
from hwmodel.devices import Device, load_device, read_sources, read_toml
from hwmodel.errors import RequestError, check_range
from hwmodel.predict import predict
from hwmodel.quantity import Quantity, read_quantity
from hwmodel.run import Estimate

J_PER_KWH = 3.6e6
SERVER_CLASSES = ("nvidia-datacenter", "amd-instinct")
CARDS_PER_DESKTOP, CARDS_PER_SERVER = 4, 8
API_MODEL = "step-3.5-flash"  # what the prices in the section `api` are asked for


@lru_cache(maxsize=1)
def price_data() -> dict[str, Quantity]:
    """The shipped prices by dotted key such as `electricity.usd_per_kwh`."""
    path = Path(__file__).parent / "data" / "prices.toml"
    raw = read_toml(path)
    sources = read_sources(raw, path)
    return {
        f"{section}.{key}": read_quantity(path, f"{section}.{key}", value, sources)
        for section in ("electricity", "ownership", "api")
        for key, value in raw[section].items()
    }


@dataclass(frozen=True)
class RentOffer:
    """A price of renting one device for an hour, and whose it is."""

    usd_per_h: float
    note: str
    source: str
    as_of: str = ""


@lru_cache(maxsize=64)
def rent_offers(device: str) -> tuple[RentOffer, ...]:
    """Listed prices of renting one device, the lowest first; that of its own file included."""
    path = Path(__file__).parent / "data" / "prices.toml"
    raw = read_toml(path)
    sources = read_sources(raw, path)
    listed = [
        read_quantity(path, f"rent.{device}.{key}", value, sources)
        for key, value in raw["rent"].get(device, {}).items()
    ]
    own = load_device(device).quantities.get("price.rent_usd_per_h")
    quoted = [*listed, own] if own is not None else listed
    found = [RentOffer(q.value, q.note, q.source, q.as_of) for q in quoted]
    return tuple(sorted(found, key=lambda o: o.usd_per_h))


def _default(key: str) -> float:
    return price_data()[key].value


@dataclass(frozen=True)
class Terms:
    """How a machine is paid for and used; None where nothing is known.

    `buy_usd`, `rent_usd_per_h` and `watts` are of the whole machine.
    """

    buy_usd: float | None
    rent_usd_per_h: float | None
    watts: float | None
    usd_per_kwh: float
    years: float
    days_per_year: float
    hours_per_day: float

    @property
    def electricity_usd_per_h(self) -> float | None:
        """Dollars of electricity in an hour of work."""
        return None if self.watts is None else self.watts / 1000 * self.usd_per_kwh

    @property
    def owned_usd_per_h(self) -> float | None:
        """Dollars that an hour of work costs on a bought machine."""
        if self.buy_usd is None:
            return None
        hours = self.years * self.days_per_year * self.hours_per_day
        return self.buy_usd / hours + (self.electricity_usd_per_h or 0.0)

    @property
    def break_even_days(self) -> float | None:
        """Days of work after which buying was cheaper than renting; None where it never is."""
        if self.buy_usd is None or self.rent_usd_per_h is None:
            return None
        saved = self.rent_usd_per_h - (self.electricity_usd_per_h or 0.0)
        return self.buy_usd / (saved * self.hours_per_day) if saved > 0 else None


def terms_of(
    candidate: Candidate,
    buy: float | None = None,
    rent: float | None = None,
    watts: float | None = None,
    kwh: float | None = None,
    years: float | None = None,
    days: float | None = None,
    hours: float | None = None,
) -> Terms:
    """The terms of a configuration: what the user states, else the device's file and the prices.

    Raises:
        RequestError: a stated number is absurd.
    """
    for option, value, low, high in (
        ("--buy", buy, 0, 1e9), ("--rent", rent, 0, 1e5), ("--watts", watts, 0, 1e6),
        ("--kwh", kwh, 0, 100), ("--years", years, 0.01, 100), ("--days", days, 1, 366),
        ("--hours", hours, 0.01, 24),
    ):  # fmt: skip
        check_range(option, value, low, high)
    device, count = candidate.device, candidate.count
    each = device.rent_usd_per_h
    return Terms(
        buy_usd=_machine_usd(device, count) if buy is None else buy,
        rent_usd_per_h=(None if each is None else each * count) if rent is None else rent,
        watts=_machine_w(device, count) if watts is None else watts,
        usd_per_kwh=_default("electricity.usd_per_kwh") if kwh is None else kwh,
        years=_default("ownership.years") if years is None else years,
        days_per_year=_default("ownership.days_per_year") if days is None else days,
        hours_per_day=_default("ownership.hours_per_day") if hours is None else hours,
    )


def _hosts(device: Device, count: int) -> int:
    """Machines around cards; 0 where the device is a machine itself."""
    if device.unified or device.is_cpu:
        return 0
    server = device.device_class in SERVER_CLASSES
    return -(-count // (CARDS_PER_SERVER if server else CARDS_PER_DESKTOP))


def _machine_usd(device: Device, count: int) -> float | None:
    if device.price_usd is None:
        return None
    key = "server_usd" if device.device_class in SERVER_CLASSES else "host_usd"
    return device.price_usd * count + _hosts(device, count) * _default(f"ownership.{key}")


def _machine_w(device: Device, count: int) -> float | None:
    if device.limit_w is None:
        return None
    return device.limit_w * count + _hosts(device, count) * _default("ownership.host_w")


@dataclass(frozen=True)
class TokenCost:
    """What one way of paying makes of tokens, in dollars; `per_day` of `hours_per_day`."""

    way: str
    usd_per_h: float
    per_day: float
    per_m_output: float
    per_m_input: float


@dataclass(frozen=True)
class CostSheet:
    """The answer: speeds of the machine, and each way of paying that is known.

    `decode` and `prefill` are estimates per sequence; the machine makes `sequences` times as many
    output tokens. `joules_per_*` are at the power limit, None where it is not known.
    """

    candidate: Candidate
    terms: Terms
    depth: int
    decode: Estimate
    prefill: Estimate
    sequences: int
    costs: tuple[TokenCost, ...]
    joules_per_output: float | None
    joules_per_input: float | None

    @property
    def output_tok_s(self) -> float:
        """Output tokens/s of the whole machine."""
        return self.sequences * (self.decode.value or 0.0)

    @property
    def input_tok_s(self) -> float:
        """Prompt tokens/s of the whole machine."""
        return self.prefill.value or 0.0


def cost_sheet(candidate: Candidate, terms: Terms, depth: int, drafts: int = 0) -> CostSheet:
    """Costs of a configuration that decodes at `depth` after prompts of that length.

    Raises:
        RequestError: the speed cannot be predicted.
    """
    decode = predict(candidate.at(depth=depth, drafts=drafts), "decode_tok_s")
    asked = candidate.at(depth=0, prompt_tokens=max(1, depth), concurrency=1, drafts=0)
    prefill = predict(asked, "prefill_tok_s")
    if not decode.value or not prefill.value:
        raise RequestError(f"no speed can be predicted: {decode.reason or prefill.reason}")
    sequences = candidate.run.workload.concurrency
    out, into = 3600 * sequences * decode.value, 3600 * prefill.value
    ways = (
        ("bought", terms.owned_usd_per_h),
        ("rented", terms.rent_usd_per_h),
        ("electricity", terms.electricity_usd_per_h),
    )
    costs = tuple(
        TokenCost(way, usd, usd * terms.hours_per_day, 1e6 * usd / out, 1e6 * usd / into)
        for way, usd in ways
        if usd is not None
    )
    watts = terms.watts
    return CostSheet(
        candidate=candidate,
        terms=terms,
        depth=depth,
        decode=decode,
        prefill=prefill,
        sequences=sequences,
        costs=costs,
        joules_per_output=None if watts is None else 3600 * watts / out,
        joules_per_input=None if watts is None else 3600 * watts / into,
    )


def api_usd(input_tokens: float, cached_tokens: float, output_tokens: float) -> float:
    """What the vendor's own service asks for so many tokens."""
    return 1e-6 * (
        input_tokens * _default("api.usd_per_m_input")
        + cached_tokens * _default("api.usd_per_m_cached")
        + output_tokens * _default("api.usd_per_m_output")
    )

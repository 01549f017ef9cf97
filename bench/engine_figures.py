"""Figures of the report on the CPU engine, from raw rounds: the rows of its target table.

Every figure is taken within rounds (an engine over another one, bytes over the probes beside them)
and then the median over rounds. Quiet rounds are preferred; where a case has none, steady ones
serve, and for ratios between engines even unsteady ones; the basis of each figure says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.engine_cases import ACCEPTANCE, EMBEDDED, ENGINE, MTP_TYPES, TYPES
from bench.interleave import Ratio, Round, best_probe, ratio, ratio_of, usable
from bench.runners.base import Measurement

MEGABYTE = 1e6
SHARES = {"q4_0": 0.65, "q4_k_s": 0.55, "q8_0": 0.75}
RESIDENT_LIMIT_BYTES = 300e6
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One row of the target table.

    Attributes:
        what: the quantity and its case.
        figure: value with its interval over rounds, or None.
        at_least, aim: as demanded; for times and sizes the value must not exceed them.
        unit: 'x', '%' or 'MB'.
        lower_is_better: whether the demand is an upper limit.
        basis: how many rounds of which kind, and what else the figure stands on.
    """

    what: str
    figure: Ratio | None
    at_least: float | None
    aim: float | None
    unit: str
    basis: str
    lower_is_better: bool = False

    @property
    def verdict(self) -> str:
        """'aim reached', 'reached', 'short' of the demand, 'below the aim' where there is no
        other demand, or that it was not measured."""
        if self.figure is None:
            return NOT_MEASURED
        sign = -1 if self.lower_is_better else 1
        if self.aim is not None and sign * self.figure.value >= sign * self.aim:
            return "aim reached"
        if self.at_least is None:
            return "below the aim"
        return "reached" if sign * self.figure.value >= sign * self.at_least else "short"


class Figures:
    """All rounds of a folder, and what follows from them."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self.rounds = tuple(rounds)
        self.best = best_probe(self.rounds)

    def newest(self, name: str) -> list[Round]:
        """Rounds of a case made with its newest kernels, quiet or busy."""
        mine = [r for r in self.rounds if r.case == name]
        return [r for r in mine if r.kernels == mine[-1].kernels]

    def cases(self) -> list[str]:
        """Names of the cases that were measured."""
        return list(dict.fromkeys(r.case for r in self.rounds))

    def basis(self, name: str, *labels: str) -> str:
        """How many rounds of which kind stand behind a figure of some arms of a case."""
        newest = self.newest(name)
        found, kind = usable(newest, self.best, *labels)
        if not found:
            return "no rounds"
        share = min(min(r.probes(*labels)) / self.best[r.host] for r in found)
        slow = f", memory at {100 * share:.0f} % of its best" if kind == "steady" else ""
        return f"{len(found)} {kind} round{'s' * (len(found) > 1)} of {len(newest)}{slow}"

    def best_llama(self, name: str) -> str | None:
        """The fastest llama.cpp arm of a case, by median over its rounds."""
        labels = {k for r in self.newest(name) for k in r.arms if k.startswith("llama.cpp")}
        speeds = {k: found.value for k in sorted(labels) if (found := self.speed(name, k))}
        return max(speeds, key=lambda k: speeds[k]) if speeds else None

    def over_llama(self, name: str) -> Ratio | None:
        """refimpl over llama.cpp's best variant."""
        best = self.best_llama(name)
        return self.ratio(name, ENGINE, best) if best else None

    def ratio(self, name: str, label: str, to: str) -> Ratio | None:
        """Speed of one arm of a case over that of another."""
        return ratio(usable(self.newest(name), self.best, label, to)[0], label, to)

    def speed(self, name: str, label: str) -> Ratio | None:
        """Tokens/s of an arm."""
        return self.per_round(name, label, lambda _, m: m.median_ts)

    def per_round(
        self, name: str, label: str, value: Callable[[Round, Measurement], float | None]
    ) -> Ratio | None:
        """A value of one arm in each round of a case."""
        rounds, _ = usable(self.newest(name), self.best, label)
        found = [value(r, r.arms[label]) for r in rounds]
        return ratio_of([v for v in found if v is not None])

    def share(self, name: str, label: str) -> Ratio | None:
        """Bytes that the steps of an arm read per second over the probes beside it, where these
        agree.

        Another engine reads the same bytes for the same tokens; those that refimpl counted in
        the same case are taken for it.
        """
        own = None if not label.startswith("llama.cpp") else self.step_bytes(name, ENGINE)

        def value(r: Round, m: Measurement) -> float | None:
            if not r.is_steady(label):
                return None
            return _over(own * m.median_ts if own else bytes_per_s(m), _beside(r, label))

        return self.per_round(name, label, value)

    def step_bytes(self, name: str, label: str) -> float | None:
        """Bytes of a step of an arm, as the engine counted them."""
        found = self.per_round(name, label, lambda _, m: step_bytes(m))
        return found.value if found else None

    def verification(self, kind: str, rows: int) -> tuple[Ratio | None, Ratio | None]:
        """Time of a step of `rows` rows over its bound: the time of a plain step scaled by the
        bytes of both, and the bytes over the probe."""
        name, label = f"verify-{kind}", f"{rows} rows"
        scaled = []
        for r in usable(self.newest(name), self.best, "1 rows", label)[0]:
            one, many = r.arms["1 rows"], r.arms[label]
            bytes_one, bytes_many = step_bytes(one), step_bytes(many)
            if bytes_one and bytes_many:
                bound = bytes_many / bytes_one / one.median_ts
                scaled.append(rows / many.median_ts / bound)
        share = self.share(name, label)
        probed = share and Ratio(1 / share.value, 1 / share.high, 1 / share.low, share.rounds,
                                 share.coverage)  # fmt: skip
        return ratio_of(scaled), probed

    def drafts(self, model: str, mtp: str) -> Ratio | None:
        """Speed of the loop with drafts over the same loop without."""
        return self.ratio(f"drafts-{model}", f"mtp {mtp}", "mtp 0")

    def draft_bound(self, model: str, drafts: int, rates: Sequence[float]) -> float | None:
        """Speed-up that bytes allow: tokens of a step over the bytes of verifying and drafting.

        Args:
            rates: chance that each draft stands once those before it did.
        """
        kind = model.partition("-mtp")[0]
        plain = self.step_bytes(f"verify-{kind}", "1 rows")
        verify = self.step_bytes(f"verify-{kind}", f"{drafts + 1} rows")
        layers = self._mtp_layers(model)
        if plain is None or verify is None or layers is None:
            return None
        tokens = 1 + float(np.cumprod(rates[:drafts]).sum())
        return tokens * plain / (verify + sum(layers[:drafts]))

    def mtp_share(self, model: str) -> tuple[float, float] | None:
        """Bytes of the first MTP layer with its head, and their share of those that a step of
        one token reads; None where either was not counted."""
        plain = self.step_bytes(f"verify-{model.partition('-mtp')[0]}", "1 rows")
        layers = self._mtp_layers(model)
        return (layers[0], layers[0] / plain) if plain and layers else None

    def _mtp_layers(self, model: str) -> list[float] | None:
        """Stored bytes of each MTP layer with its head, of a model whose drafts were timed."""
        found = [m for r in self.newest(f"drafts-{model}") for m in r.arms.values()]
        return (found[-1].record.get("mtp_layer_bytes") or []) if found else None

    def rates(self, model: str) -> tuple[float, ...]:
        """Chances that drafts stand: simulated ones as given, real ones as measured with three
        drafts (from the mean accepted at each length)."""
        if model != EMBEDDED:
            return ACCEPTANCE
        means = [0.0]
        for k in (1, 2, 3):
            found = [r.arms[f"mtp {k}"].record for r in self.newest(f"drafts-{model}")
                     if f"mtp {k}" in r.arms]  # fmt: skip
            steps = sum(f["steps"] for f in found)
            means.append(sum(f["accepted"] for f in found) / steps if steps else means[-1])
        survival = np.clip(np.diff(means), 0, 1)
        out, before = [], 1.0
        for chance in survival.tolist():
            out.append(min(1.0, chance / before) if before > 0 else 0.0)
            before = chance
        return tuple(out)


def step_bytes(m: Measurement) -> float | None:
    """Weight and KV bytes of one decoding step, or None where the engine did not count."""
    weights, kv = m.record.get("weight_bytes_per_step"), m.record.get("kv_bytes_per_step")
    return None if weights is None or kv is None else float(weights) + float(kv)


def bytes_per_s(m: Measurement) -> float | None:
    """Bytes that decoding steps read per second."""
    size = step_bytes(m)
    return None if size is None else size * m.median_ts / m.record.get("n_rows", 1)


def _beside(r: Round, label: str) -> float:
    return float(np.mean(r.probes(label)))


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def rows_of(figures: Figures) -> list[Row]:
    """The target table, every row of it, measured or not."""
    out = [_decode(figures, kind) for kind in TYPES]
    out += [_share(figures, kind) for kind in TYPES]
    out += [*(_prefill(figures, kind) for kind in TYPES), _other_prefill(figures)]
    out += [row for kind in TYPES for row in _verification(figures, kind)]
    out += [row for model in (*(f"{k}-mtp3" for k in MTP_TYPES), EMBEDDED)
            for row in _drafts(figures, model)]  # fmt: skip
    return [*out, _resident(figures)]


def _decode(f: Figures, kind: str) -> Row:
    name = f"decode-{kind}"
    best = f.best_llama(name) or "llama.cpp"
    what = f"decode {kind} over {best}"
    return Row(what, f.over_llama(name), 1.3, 2.0, "x", _pair_basis(f, name))


def _share(f: Figures, kind: str) -> Row:
    name = f"decode-{kind}"
    what = f"decode step {kind}, share of the probed read bandwidth"
    return Row(what, f.share(name, ENGINE), SHARES[kind], 0.90, "%", f.basis(name, ENGINE))


def _pair_basis(f: Figures, name: str) -> str:
    best = f.best_llama(name)
    return f.basis(name, ENGINE, best) if best else "no rounds"


def _has_amx(f: Figures) -> bool:
    return any(r.state.get("amx") for r in f.rounds)


def _prefill(f: Figures, kind: str) -> Row:
    name = f"prefill-{kind}"
    best = f.best_llama(name) or "llama.cpp"
    amx = _has_amx(f)
    what = f"prefill of 512 tokens {kind} over {best}, {'with' if amx else 'no'} AMX"
    least, aim = (1.5, 4.0) if amx else (1.0, 1.5)
    return Row(what, f.over_llama(name), least, aim, "x", _pair_basis(f, name))


def _other_prefill(f: Figures) -> Row:
    """The demand for the kind of processor that this one is not."""
    amx = _has_amx(f)
    what = f"prefill of 512 tokens over llama.cpp, {'AMX forced off' if amx else 'with AMX'}"
    least, aim = (1.0, 1.5) if amx else (1.5, 4.0)
    basis = "not among the cases" if amx else "this processor has no AMX"
    return Row(what, None, least, aim, "x", basis)


def _verification(f: Figures, kind: str) -> list[Row]:
    out = []
    for rows in (2, 4):
        scaled, probed = f.verification(kind, rows)
        one = f.step_bytes(f"verify-{kind}", "1 rows")
        many = f.step_bytes(f"verify-{kind}", f"{rows} rows")
        more = f"; {many / one:.2f} times the bytes of one token" if one and many else ""
        label = f"{rows} rows"
        pair = f.basis(f"verify-{kind}", "1 rows", label) + more
        basis = f.basis(f"verify-{kind}", label) + more
        what = f"verification of {rows} tokens {kind}: time over the bound"
        out.append(Row(f"{what} of a plain step scaled by bytes", scaled, 1.2, 1.1, "x", pair,
                       True))  # fmt: skip
        out.append(Row(f"{what} of bytes at the probed bandwidth", probed, 1.2, 1.1, "x", basis,
                       True))  # fmt: skip
    return out


def _drafts(f: Figures, model: str) -> list[Row]:
    name = f"drafts-{model}"
    auto = f.drafts(model, "auto")
    rates = f.rates(model) if f.newest(name) else ()
    kind = "simulated" if model != EMBEDDED else "real"
    shown = "/".join(f"{p:.2f}".lstrip("0") for p in rates)
    basis = f.basis(name, "mtp auto", "mtp 0") + (f"; {kind} acceptance {shown}" if shown else "")
    out = [Row(f"drafts (auto) over none, {model}", auto, 1.0, None, "x", basis)]
    bounds = {k: b for k in (1, 2, 3) if (b := f.draft_bound(model, k, rates)) is not None}
    if model != EMBEDDED:
        best = max(bounds.values(), default=None)
        share = None if auto is None or best is None else _scaled(auto, 1 / max(best, 1.0))
        note = f"; bound {best:.2f}x" if best else ""
        what = f"drafts (auto), share of the bound, {model}"
        out.append(Row(what, share, None, 0.90, "%", basis + note))
    return out


def _scaled(value: Ratio, factor: float) -> Ratio:
    return Ratio(value.value * factor, value.low * factor, value.high * factor, value.rounds,
                 value.coverage)  # fmt: skip


def _resident(f: Figures) -> Row:
    found: dict[str, float] = {}
    for r in f.rounds:
        if r.kernels != f.newest(r.case)[-1].kernels:
            continue
        for m in r.arms.values():
            resident: dict[str, Any] | None = m.record.get("resident")
            if resident:
                name = str(m.record["model_filename"])
                found[name] = max(found.get(name, 0.0), float(resident["other_bytes"]))
    what = "resident memory beyond touched map, caches, activations"
    worst = max(found, key=lambda k: found[k], default="")
    figure = ratio_of([v / MEGABYTE for v in found.values()])
    if figure is not None:
        figure = Ratio(found[worst] / MEGABYTE, figure.low, figure.high, len(found), 1.0)
    return Row(what, figure, RESIDENT_LIMIT_BYTES / MEGABYTE, None, "MB",
               f"the largest of all tests ({worst})" if worst else "no rounds", True)  # fmt: skip

"""Which known mistake explains a candidate's output, if any.

Every named variant (`refimpl.reference.variant`) is a hypothesis. For each observed row three
distances are formed, as rms over the row's columns in units of the row's own rms: candidate to
the normative model (`base`), candidate to the variant (`left`), and variant to normative model
(`effect`). Rows that a variant leaves alone say nothing about it. A variant explains a row when
it leaves less than half of the distance; rounding cannot do that by chance, because it does not
point along the variant's effect in a space of many columns. So the decision needs no knowledge of
how much the candidate rounds; only the words for what remains do.

Axes: R observed rows of a place, in order of position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.source import WeightSource
from refimpl.config import ModelConfig
from refimpl.golden.candidate import Candidate, Observation, ObservedText, Place
from refimpl.golden.hypotheses import predictions
from refimpl.golden.slips import slip
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace
from refimpl.reference.variant import NORMATIVE, VARIANTS, KnownVariant, Variant

Array = NDArray[Any]
Progress = Callable[[int, int], None]

# Largest row distance that rounding explains, by the candidate's precision.
NOISE = {"float64": 5e-5, "float32": 5e-5, "float16": 2e-2, "bf16": 5e-2}

# Row distance that is no effect but the reference's own rounding, by its arithmetic.
_RESOLUTION = {"float64": 1e-12, "float32": 1e-6}

_FLOOR = 1e-9
_EXPLAINED = 0.5  # of the base distance is left
_NEUTRAL = 0.3  # an effect below this share of the base distance is lost in it
_WORSE = 3.0  # times the base distance: a row that speaks against a variant
_SAME = 0.2  # variants whose mean log distances differ by less than this cannot be told apart
_SHARE_LAYERED, _SHARE_WHOLE = 0.5, 0.1
_TIE = 2.0  # expert choices within this multiple of the noise may fall either way


@dataclass(frozen=True)
class Explanation:
    """A variant that explains the candidate.

    Attributes:
        rows: rows that it explains, of `testable` rows where its effect would show.
        left: median distance that remains on those rows; `base` the distance without it.
        place: where the variant changes the model first on this text.
        score: mean log of remaining over original distance, over all rows; lower is better.
    """

    name: str
    phrase: str
    source: str
    rows: int
    testable: int
    left: float
    base: float
    place: Place
    score: float


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and what it rests on.

    Attributes:
        verdict: 'variant', 'nearest' (a variant explains most, something more remains), 'noise'
            or 'unexplained' (no variant; `sentence` names a slip in writing down, if it is one).
        explanations: best first; those after the first cannot be told apart from it here.
        departure: first place where the normative model is left, beyond noise and near ties.
        largest: largest row distance from the normative model.
        untestable: variants that change nothing on this text.
    """

    verdict: str
    sentence: str
    explanations: tuple[Explanation, ...]
    departure: Place | None
    largest: float
    noise: float
    untestable: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


def diagnose(
    source: WeightSource,
    candidate: Candidate,
    dtype: str = "float64",
    precision: str | None = None,
    variants: Mapping[str, KnownVariant] = VARIANTS,
    progress: Progress | None = None,
) -> Diagnosis:
    """Try every variant on a candidate.

    Args:
        dtype: arithmetic of the reference.
        precision: of the candidate, one of `NOISE`; by default what its file says.
        progress: called with (variants tried, variants in all).
    """
    noise = NOISE.get(precision or candidate.precision, NOISE["float32"])
    base = _Base(source, candidate, dtype, noise)
    trials = []
    for i, (name, known) in enumerate(variants.items()):
        if progress:
            progress(i, len(variants))
        trials.append(_Trial(name, known, base).run(source, candidate, dtype))
    if progress:
        progress(len(variants), len(variants))
    return _verdict(base, trials, source, candidate, dtype)


def row_distances(x: Array, y: Array, scale: Array) -> Array:
    """rms over columns of x - y in units of `scale`: (R, W), (R, W), (R,) -> (R,)."""
    with np.errstate(all="ignore"):
        distance = np.sqrt(np.mean(np.square(x - y), axis=-1)) / scale
    return np.where(np.isfinite(distance), distance, np.inf)


@dataclass(frozen=True)
class _Shown:
    """One observation with the normative model's values beside it."""

    text: int
    seen: Observation
    normative: Array
    scale: Array
    distance: Array


class _Base:
    """The normative model on a candidate: distances, and how near expert choices are to a tie."""

    def __init__(
        self, source: WeightSource, candidate: Candidate, dtype: str, noise: float
    ) -> None:
        self.noise = noise
        self.resolution = _RESOLUTION[dtype]
        self.layered = all(t.hidden is not None for t in candidate.sequences)
        self.shown: list[dict[Place, _Shown]] = []
        self.margins: list[dict[int, Array]] = []
        model = ReferenceModel(source, dtype)
        for i, text in enumerate(candidate.sequences):
            trace = Trace(record=frozenset({"route_margin", "hidden"}))
            of_place = {o.place: o for o in text.observations}
            self.shown.append({})
            for place, rows in predictions(model, text, trace):
                self.shown[i][place] = _shown(i, of_place[place], rows)
            moe = source.config.moe_layers
            self.margins.append({layer: trace.rows("route_margin", layer) for layer in moe})

    def all(self) -> Iterable[_Shown]:
        """Every observation in order of computation."""
        return (s for places in self.shown for s in places.values())

    @property
    def largest(self) -> float:
        """Largest row distance."""
        return max((float(s.distance.max(initial=0.0)) for s in self.all()), default=0.0)

    def slip(self) -> str | None:
        """What the first text's logits are, if they are the normative ones with a slip."""
        s = self.shown[0].get(("logits", None))
        if s is None or s.seen.columns is not None or s.seen.logprob:
            return None
        return slip(s.seen.values, s.normative, self.noise)

    def departures(self) -> dict[tuple[int, Place], Array]:
        """(text, place) to rows (R,) beyond the noise that no near tie excuses."""
        found = {}
        for i, places in enumerate(self.shown):
            for place, s in places.items():
                beyond = (s.distance > self.noise) & ~self.excused(s)
                if beyond.any():
                    found[i, place] = beyond
        return found

    def excused(self, s: _Shown) -> Array:
        """Rows (R,) that an expert choice at a near tie may have moved: layer by layer the rows
        of the tie, in a whole run every row from there on."""
        if self.layered:
            return self._near_tie(s.text, s.seen.place, s.seen.positions)
        beyond = np.flatnonzero(s.distance > self.noise)
        if not len(beyond):
            return np.zeros(len(s.distance), dtype=bool)
        first = s.seen.positions[beyond[0]]
        near = min((float(m[first]) for m in self.margins[s.text].values()), default=np.inf)
        from_first: Array = s.seen.positions >= first
        return from_first & (near < _TIE * self.noise)

    def _near_tie(self, text: int, place: Place, positions: Array) -> Array:
        name, layer = place
        margin = self.margins[text].get(layer) if name == "hidden" and layer is not None else None
        if margin is None:
            return np.zeros(len(positions), dtype=bool)
        near: Array = margin[positions] < _TIE * self.noise
        return near


def _shown(text: int, seen: Observation, rows: Array) -> _Shown:
    normative = seen.pick(rows).astype(np.float64)
    scale = np.sqrt(np.mean(np.square(normative), axis=-1)) + 1e-30
    return _Shown(text, seen, normative, scale, row_distances(normative, seen.values, scale))


class _Trial:
    """One variant on a candidate, given up as soon as it is refuted."""

    def __init__(self, name: str, known: KnownVariant, base: _Base) -> None:
        self.name, self.known, self._base = name, known, base
        self.refuted = False
        self.place: Place | None = None
        self.testable = self.explained = 0
        self._clean_testable = self._clean_explained = 0
        self._left: list[Array] = []
        self._before: list[Array] = []
        self._logs: list[Array] = []

    def run(self, source: WeightSource, candidate: Candidate, dtype: str) -> _Trial:
        model = ReferenceModel(source, dtype, self.known.flags)
        for i, text in enumerate(candidate.sequences):
            for place, rows in predictions(model, text):
                self._look(self._base.shown[i][place], rows)
                if self.refuted:
                    return self
        return self

    def _look(self, shown: _Shown, rows: Array) -> None:
        values = shown.seen.pick(rows).astype(np.float64)
        effect = row_distances(values, shown.normative, shown.scale)
        before = shown.distance
        changed = effect > self._base.resolution
        if not changed.any():
            self._logs.append(np.zeros(len(before)))
            return
        if self.place is None:
            self.place = shown.seen.place
        left = row_distances(values, shown.seen.values, shown.scale)
        with np.errstate(all="ignore"):
            ratio = np.log(np.minimum(left, 1e3) + _FLOOR) - np.log(
                np.minimum(before, 1e3) + _FLOOR
            )
        self._logs.append(np.where(changed, ratio, 0.0))
        clean = ~self._base.excused(shown)
        testable = changed & (effect > _NEUTRAL * before)
        explained = testable & (left < _EXPLAINED * before)
        worse = changed & (left > 2 * before) & (effect > before)
        self.testable += int(testable.sum())
        self.explained += int(explained.sum())
        self._clean_testable += int((testable & clean).sum())
        self._clean_explained += int((explained & clean).sum())
        self._left.append(left[explained])
        self._before.append(before[explained])
        if not self._base.layered:
            # A mistake is there from the first row that it touches; what begins to fit later
            # has only made the same choice at some near tie.
            ahead = slice(0, int(np.argmax(explained)) if explained.any() else None)
            self.refuted |= bool((worse & clean & (left > _WORSE * before))[ahead].any())
        elif not explained.any():
            departs = changed & (before > self._base.noise)
            self.refuted = bool(worse.mean() > 0.5 * changed.mean() or departs.mean() > 0.5)

    @property
    def score(self) -> float:
        """Mean log of the remaining share of the distance, over all rows seen."""
        logs = np.concatenate(self._logs)
        return float(logs.mean()) if len(logs) else 0.0

    @property
    def explains(self) -> bool:
        """Whether enough of the rows where the variant would show are explained by it: of those
        that no near tie has moved, where there are any."""
        if self.refuted or not self.explained:
            return False
        share = _SHARE_LAYERED if self._base.layered else _SHARE_WHOLE
        if self._clean_testable:
            return self._clean_explained >= max(1, share * self._clean_testable)
        return self.explained >= _SHARE_LAYERED * self.testable

    def explanation(self) -> Explanation:
        """The trial as a finding."""
        assert self.place is not None
        left, before = np.concatenate(self._left), np.concatenate(self._before)
        return Explanation(
            self.name, self.known.phrase, self.known.source, self.explained, self.testable,
            float(np.median(left)), float(np.median(before)), self.place, self.score,
        )  # fmt: skip


def _verdict(
    base: _Base, trials: list[_Trial], source: WeightSource, candidate: Candidate, dtype: str
) -> Diagnosis:
    untestable = tuple(t.name for t in trials if t.place is None)
    ranked = sorted((t for t in trials if t.explains), key=lambda t: t.score)
    departure = next((place for _, place in base.departures()), None)
    same: list[Explanation] = []
    slipped = base.slip() if departure == ("logits", None) else None
    if slipped:
        kind, sentence = "unexplained", slipped
    elif ranked:
        same = [t.explanation() for t in ranked if t.score - ranked[0].score < _SAME]
        if same[0].place == ("logits", None):
            flags = ranked[0].known.flags
            layer = first_effect(source, candidate.sequences[0], flags, dtype)
            if layer is not None:
                same[0] = replace(same[0], place=("hidden", layer))
        kind = "variant" if same[0].left <= base.noise else "nearest"
        sentence = _variant_sentence(kind, same, source.config)
    else:
        kind = "noise" if departure is None else "unexplained"
        sentence = _plain_sentence(kind, base, departure, source.config)
    return Diagnosis(kind, sentence, tuple(same), departure, base.largest, base.noise, untestable)


def _variant_sentence(kind: str, same: list[Explanation], config: ModelConfig) -> str:
    best = same[0]
    names = best.phrase + "".join(f", or with {e.phrase}" for e in same[1:])
    where = _from(best.place, config)
    tail = " (on this text they cannot be told apart)" if len(same) > 1 else ""
    if kind == "variant":
        return f"equals the reference with {names}, {where}{tail}"
    share = 100 * (1 - best.left / best.base)
    return (
        f"comes nearest to the reference with {names}, {where}{tail}: it explains {share:.0f} % of "
        f"the difference, and {best.left:.1e} of a row's size remains"
    )


def _plain_sentence(kind: str, base: _Base, place: Place | None, config: ModelConfig) -> str:
    if kind == "noise":
        return (
            "no known mistake: differs by honest noise, at most "
            f"{base.largest:.1e} of a row's size"
            + (
                " where a near tie between experts may fall either way"
                if base.largest > base.noise
                else ""
            )
        )
    assert place is not None
    where = place_name(place, config)
    if not base.layered and place[0] == "logits":
        where += " (no hidden states were given that would say where)"
    return (
        f"departs at {where} in a way no known mistake explains: up to {base.largest:.1e} of a "
        f"row's size, where rounding explains {base.noise:.0e}"
    )


def _from(place: Place, config: ModelConfig) -> str:
    return f"from {place_name(place, config)} on"


def place_name(place: Place, config: ModelConfig) -> str:
    """A place in words."""
    name, layer = place
    if name == "hidden":
        return "the embeddings" if layer == -1 else f"layer {layer}"
    if name.startswith("mtp_"):
        return f"MTP layer {config.num_hidden_layers + int(name.rpartition('_')[2])}"
    return "the logits"


def first_effect(
    source: WeightSource, text: ObservedText, variant: Variant, dtype: str = "float64"
) -> int | None:
    """The first trunk layer whose output a variant changes on a text; None after the trunk."""
    runs = []
    for flags in (NORMATIVE, variant):
        trace = Trace(record=frozenset({"hidden"}))
        model = ReferenceModel(source, dtype, flags)
        model.prefill(text.tokens, model.new_cache(len(text.tokens)), trace=trace)
        runs.append(trace)
    for i in range(source.config.num_hidden_layers):
        if not np.array_equal(runs[0].rows("hidden", i + 1), runs[1].rows("hidden", i + 1)):
            return i
    return None

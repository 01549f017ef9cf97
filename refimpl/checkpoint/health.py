"""Reading every block of a checkpoint and saying what cannot be right.

Found per tensor: values that are not finite, block scales that no quantiser writes, rows far
beyond the rest of their tensor (a flipped exponent bit), tensors of zeros; over the whole
checkpoint: norm weights that look as if the + 1 of the zero-centred norm had been applied twice
or not at all.

Scales that no quantiser writes: any that is not finite, and negative ones where `SCALE_FIELDS` says
`never_negative` (Q8_0; the scale of Q4_1 and Q5_1; both scales of Q2_K, Q4_K and Q5_K); of FP8 what
`scale_faults` lists. A scale of zero over codes that are not zero is no finding: quantisers write
it for a block whose values are below the least half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.block_scales import SCALE_FIELDS, field_values
from refimpl.checkpoint.stored import StoredTensor

Array = NDArray[Any]
Progress = Callable[[int, int], None]

_CHUNK_VALUES = 1 << 22
_FAR = 1000.0  # a row's peak over the typical row's rms: trained weights stay below about 100
_MAY_BE_ZERO = ("router_bias",)
_NORM_NAMES = "norm weights"


@dataclass(frozen=True)
class Finding:
    """Something wrong: the tensor's name, and a sentence."""

    tensor: str
    problem: str


def check_values(stored: Iterable[StoredTensor], progress: Progress | None = None) -> list[Finding]:
    """Read every block of the tensors of an open checkpoint.

    Args:
        progress: called with (bytes read, bytes in all).
    """
    tensors = list(stored)
    total, done = sum(t.stored_bytes for t in tensors), 0
    findings: list[Finding] = []
    for tensor in tensors:
        statistics = _Statistics(tensor)
        step = max(1, _CHUNK_VALUES // tensor.spec.shape[-1])
        for start in range(0, len(tensor.rows), step):
            statistics.add(start, min(len(tensor.rows), start + step))
            done += int(tensor.rows[start : start + step].size)
            if progress:
                progress(done, total)
        done += tensor.stored_bytes - int(tensor.rows.size)  # scales, read along the way
        findings += [Finding(_name(tensor), problem) for problem in statistics.problems()]
    with np.errstate(all="ignore"):  # what is infinite or no number has been reported
        return findings + _norm_findings([t for t in tensors if t.spec.plus_one])


def _name(tensor: StoredTensor) -> str:
    return tensor.where.rpartition(": tensor ")[2]


class _Statistics:
    """What is counted while the rows of one tensor go by."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        self._peaks: list[Array] = []
        self._rms: list[Array] = []
        self._not_finite = 0
        self._bad_scales: dict[str, int] = {}
        self._first_bad: int | None = None

    def add(self, start: int, stop: int) -> None:
        """Look at rows start..stop."""
        self._look_at_scales(start, stop)
        with np.errstate(all="ignore"):
            values = self._tensor.values(start, stop).astype(np.float32, copy=False)
            finite = np.isfinite(values)
            if not finite.all():
                self._not_finite += int((~finite).sum())
                self._note_row(start, ~finite)
                values = np.where(finite, values, 0.0)
            self._peaks.append(np.abs(values).max(axis=-1))  # (rows,)
            self._rms.append(np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=-1)))

    def _look_at_scales(self, start: int, stop: int) -> None:
        kind = self._tensor.kind
        if self._tensor.scales is not None:
            for what, bad in self._tensor.scales.scale_faults(start, stop).items():
                self._count_scales(what, bad, start)
        for place in SCALE_FIELDS.get(kind.name, ()):
            scales = field_values(self._tensor.rows[start:stop], kind.block_bytes, place)
            broken = ~np.isfinite(scales)
            self._count_scales("not finite", broken, start)
            if place.never_negative:
                self._count_scales("negative", ~broken & (scales < 0), start)

    def _count_scales(self, what: str, bad: Array, start: int) -> None:
        count = int(bad.sum())
        if count:
            self._bad_scales[what] = self._bad_scales.get(what, 0) + count
            self._note_row(start, bad)

    def _note_row(self, start: int, bad: Array) -> None:
        if self._first_bad is None:
            self._first_bad = start + int(np.argmax(bad.any(axis=-1)))

    def problems(self) -> list[str]:
        """One sentence for each kind of damage."""
        at = "" if self._first_bad is None else f", the first in row {self._first_bad}"
        found = [
            f"{n} block scales of {self._tensor.kind.name} are {what}{at}"
            for what, n in self._bad_scales.items()
        ]
        if self._not_finite:
            found.append(f"{self._not_finite} values are not finite{at}")
        peaks = np.concatenate(self._peaks).astype(np.float64)  # so that _FAR times it is finite
        rms = np.concatenate(self._rms).astype(np.float64)
        typical = float(np.median(rms[rms > 0])) if (rms > 0).any() else 0.0
        far = np.flatnonzero(peaks > _FAR * typical)
        if not typical:
            if self._tensor.spec.key not in _MAY_BE_ZERO:
                found.append("all values are zero")
        elif len(far):
            row = int(far[0])
            found.append(
                f"{len(far)} rows hold values far beyond the rest, the first row {row} with "
                f"{peaks[row]:.3g} where {typical:.3g} is typical"
            )
        return found


def _norm_findings(norms: list[StoredTensor]) -> list[Finding]:
    """Judge all effective norm scales 1 + w together; a right one is mostly positive, and a
    trained one often below 1."""
    if not norms:
        return []
    scales = [t.values(0, 1)[0].astype(np.float64) + (not t.holds_one_plus) for t in norms]
    scales = [s[~np.isnan(s)] for s in scales]
    scales = [s for s in scales if len(s)]
    if not scales:
        return []  # their values have been reported as not finite
    medians = [float(np.median(s)) for s in scales]
    negative = float(np.mean([np.mean(s < 0) for s in scales]))
    low = float(np.median([np.percentile(s, 5) for s in scales]))
    middle = float(np.median(medians))
    if negative > 0.1:
        return [
            Finding(
                _NORM_NAMES,
                f"{100 * negative:.0f} % of the effective scales are negative (median "
                f"{middle:.2f}): it looks as if + 1 was never applied to them",
            )
        ]
    if middle > 1.6 and low > 1.0:
        return [
            Finding(
                _NORM_NAMES,
                f"the median effective scale is {middle:.2f} and hardly any is below 1: it looks "
                "as if + 1 was applied twice",
            )
        ]
    return []

"""Plants every known mistake and counts how often `golden diagnose` names it.

    python tests/golden/diagnose_sweep.py --seeds 1 --forms golden,logits

Every variant that changes anything on a checkpoint is planted in it, computed in float64 and in
float32 (real rounding of that precision), and shown as a golden file, as logits alone, or as the
logarithms of the five most probable tokens. Honest cases are float32 runs without a mistake, in
chunks of several sizes. Seeds from 900 on were not used while the method was developed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from golden_shared import tiny_c
from threadpoolctl import threadpool_limits

import refimpl.golden.diagnose as diagnose_module
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.source import WeightSource
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.golden.candidate import Candidate, Observation, ObservedText, from_arrays
from refimpl.golden.diagnose import Diagnosis, diagnose, row_distances
from refimpl.golden.dump import golden_arrays
from refimpl.golden.hypotheses import predictions
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace
from refimpl.reference.variant import NORMATIVE, VARIANTS, Variant

TOKENS = 70
CONFIGS = {"tiny_a": PRESETS["tiny_a"], "tiny_b": PRESETS["tiny_b"], "tiny_c": tiny_c}
FORMS = ("golden", "logits", "top5")
SMALLEST = 1e-6  # row distance below which a variant is lost in float32's own resolution
CHUNKS = (None, 1, 7, 16)


class Memory:
    """`predictions` that remembers runs from the tokens: they do not depend on the candidate."""

    def __init__(self) -> None:
        self._runs: dict[Any, tuple[list[Any], Trace | None]] = {}

    def __call__(
        self, model: ReferenceModel, text: ObservedText, trace: Trace | None = None
    ) -> Iterator[Any]:
        if text.hidden is not None:
            yield from predictions(model, text, trace)
            return
        places = frozenset(o.place for o in text.observations)
        key = (id(model.weights.source), model.weights.variant, text.tokens, places)
        if key not in self._runs:
            self._runs[key] = (list(predictions(model, text, trace)), trace)
        made, recorded = self._runs[key]
        if trace is not None and recorded is not None:
            trace._arrays = recorded._arrays
        yield from made

    def forget(self) -> None:
        """Before the next checkpoint."""
        self._runs.clear()


class Lab:
    """One checkpoint of one seed, and what its runs wrote down."""

    def __init__(self, source: WeightSource, preset: str, seed: int) -> None:
        self.source, self.preset, self.seed = source, preset, seed
        rng = np.random.default_rng([seed, zlib.crc32(preset.encode())])
        self.prompt = rng.integers(0, source.config.vocab_size, TOKENS).tolist()
        self._runs: dict[Any, dict[str, np.ndarray]] = {}

    def arrays(self, flags: Variant, dtype: str, chunk: int | None = None) -> dict[str, np.ndarray]:
        """The golden file of a run, floats stored in the run's own precision."""
        key = (flags, dtype, chunk)
        if key not in self._runs:
            model = ReferenceModel(self.source, dtype, flags)
            self._runs[key] = golden_arrays(model, self.prompt, 0, chunk)
        return self._runs[key]

    def candidate(self, arrays: dict[str, np.ndarray], form: str) -> Candidate:
        """The run as a form shows it."""
        config = self.source.config
        if form == "golden":
            return from_arrays("golden", arrays, {}, config)
        if form == "logits":
            return from_arrays("logits", {"logits": arrays["logits"]}, {}, config, self.prompt)
        logits = arrays["logits"].astype(np.float64)
        best = np.argsort(-logits, axis=-1)[:, :5]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        values = np.round(np.take_along_axis(logprobs, best, -1), 6)
        seen = Observation(("logits", None), np.arange(TOKENS), values, best, logprob=True)
        return Candidate((ObservedText(tuple(self.prompt), (seen,)),))

    def effect(self, flags: Variant, form: str) -> float:
        """Largest row distance that the variant makes where the form would show it."""
        ours, theirs = self.arrays(NORMATIVE, "float64"), self.arrays(flags, "float64")
        names = ["logits"]
        if form == "golden":
            names += [n for n in ours if n == "hidden" or n.startswith("mtp_")]
        found = 0.0
        for name in names:
            scale = np.sqrt(np.mean(np.square(ours[name]), axis=-1))
            found = max(found, float(row_distances(ours[name], theirs[name], scale).max()))
        return found


def labs(names: Sequence[str], seeds: Sequence[int]) -> Iterator[Lab]:
    """Checkpoints in float32, one after the other."""
    for name in names:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                path = synthesize(CONFIGS[name](), seed, Path(folder) / "m", "f32")
                with contextlib.closing(open_checkpoint(path)) as source:
                    yield Lab(source, name, seed)


def planted(lab: Lab, form: str, names: Sequence[str]) -> Iterator[tuple[str, str, Diagnosis]]:
    """(variant, dtype, diagnosis) of every mistake that shows."""
    for name in names:
        flags = VARIANTS[name].flags
        if lab.effect(flags, form) < SMALLEST:
            continue
        for dtype in ("float64", "float32"):
            shown = lab.candidate(lab.arrays(flags, dtype), form)
            yield name, dtype, diagnose(lab.source, shown)


def honest(lab: Lab, form: str) -> Iterator[tuple[str, Diagnosis]]:
    """(chunk, diagnosis) of float32 runs without a mistake."""
    for chunk in CHUNKS:
        shown = lab.candidate(lab.arrays(NORMATIVE, "float32", chunk), form)
        yield f"chunks of {chunk or 'all'}", diagnose(lab.source, shown)


def sweep(args: argparse.Namespace) -> int:
    """Run all cases and print the rates; 1 if one is below 95 %."""
    names = args.variants.split(",") if args.variants else list(VARIANTS)
    good, all_, first = Counter(), Counter(), Counter()
    memory = diagnose_module.predictions = Memory()  # type: ignore[assignment]
    for lab in labs(args.presets.split(","), args.seeds):
        for form in args.forms.split(","):
            for name, dtype, found in planted(lab, form, names):
                named = [e.name for e in found.explanations]
                key = ("planted", lab.preset, form, dtype)
                all_[key] += 1
                good[key] += name in named
                first[key] += named[:1] == [name]
                if name not in named or args.verbose:
                    print(f"{lab.preset} {lab.seed} {form} {dtype} {name}: {found.sentence}")
            for what, found in honest(lab, form):
                key = ("honest", lab.preset, form, "float32")
                all_[key] += 1
                good[key] += found.verdict == "noise"
                if found.verdict != "noise":
                    print(f"{lab.preset} {lab.seed} {form} honest {what}: {found.sentence}")
            sys.stdout.flush()
        memory.forget()
    rates = []
    for kind in ("planted", "honest"):
        for key in [k for k in all_ if k[0] == kind]:
            extra = f", {first[key]} of them first" if kind == "planted" else ""
            print(f"{' '.join(key)}: {good[key]} of {all_[key]}{extra}")
        n = sum(v for k, v in all_.items() if k[0] == kind)
        g = sum(v for k, v in good.items() if k[0] == kind)
        rates.append(g / max(n, 1))
        print(f"{kind}: {g} of {n} = {100 * rates[-1]:.1f} %")
    return int(min(rates) < 0.95)


def main() -> int:
    """Parse and sweep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--presets", default=",".join(CONFIGS))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--variants", default="", help="names, separated by commas; default all")
    parser.add_argument("--verbose", action="store_true")
    with threadpool_limits(1):
        return sweep(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())

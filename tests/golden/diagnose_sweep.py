"""Plants every known mistake and counts how often `golden diagnose` names it.

    python tests/golden/diagnose_sweep.py --seeds 1 950 --report reports

Every variant that changes anything on a checkpoint is planted in it, computed in float64 and in
float32 (real rounding of that precision), and shown as a golden file, as logits alone, or as the
logarithms of the five most probable tokens. Honest cases are float32 runs without a mistake, in
chunks of several sizes. Seeds from 900 on were not used while the method was developed.
--report writes the counts as diagnose.json and diagnose.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from refimpl.checkpoint.atomic import atomic_file
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
UNUSED = 900  # the first seed that development did not use


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
    missed: list[str] = []

    def miss(line: str) -> None:
        missed.append(line)
        print(line)

    memory = diagnose_module.predictions = Memory()  # type: ignore[assignment]
    for lab in labs(args.presets.split(","), args.seeds):
        for form in args.forms.split(","):
            for name, dtype, found in planted(lab, form, names):
                named = [e.name for e in found.explanations]
                key = ("planted", lab.preset, form, dtype, lab.seed)
                all_[key] += 1
                good[key] += name in named
                first[key] += named[:1] == [name]
                line = f"{lab.preset} {lab.seed} {form} {dtype} {name}: {found.sentence}"
                if name not in named:
                    miss(line)
                elif args.verbose:
                    print(line)
            for what, found in honest(lab, form):
                key = ("honest", lab.preset, form, "float32", lab.seed)
                all_[key] += 1
                good[key] += found.verdict == "noise"
                if found.verdict != "noise":
                    miss(f"{lab.preset} {lab.seed} {form} honest {what}: {found.sentence}")
            sys.stdout.flush()
        memory.forget()
    rows = [
        dict(zip(("kind", "preset", "form", "dtype", "seed"), key, strict=True))
        | {"cases": all_[key], "right": good[key], "named_first": first[key]}
        for key in sorted(all_)
    ]
    for row in rows:
        print(" ".join(str(value) for value in row.values()))
    if args.report is not None:
        text = json.dumps(
            {"tokens": TOKENS, "variants": len(names), "rows": rows, "missed": missed}, indent=1
        )
        written = {"json": text + "\n", "md": page(rows, missed)}
        for suffix, content in written.items():
            with atomic_file(args.report / f"diagnose.{suffix}") as file:
                file.write(content.encode())
    shares = [share(rows, kind) for kind in ("planted", "honest")]
    print(f"planted: {shares[0]}\nhonest: {shares[1]}")
    counts = [total(rows, kind) for kind in ("planted", "honest")]
    return int(min(right / max(1, cases) for right, cases in counts) < 0.95)


def total(rows: Sequence[dict[str, Any]], kind: str, **where: Any) -> tuple[int, int]:
    """(right, cases) of the rows that match."""
    chosen = [r for r in rows if r["kind"] == kind and all(r[key] == v for key, v in where.items())]
    return sum(r["right"] for r in chosen), sum(r["cases"] for r in chosen)


def share(rows: Sequence[dict[str, Any]], kind: str, **where: Any) -> str:
    """'right of cases = percent'."""
    right, cases = total(rows, kind, **where)
    return f"{right} of {cases} = {100 * right / max(1, cases):.1f} %"


def page(rows: Sequence[dict[str, Any]], missed: Sequence[str]) -> str:
    """The counts as Markdown."""
    seeds = sorted({r["seed"] for r in rows})
    developed = [s for s in seeds if s < UNUSED]
    lines = [
        "# Known mistakes, planted and named", "",
        f"Generated by `python tests/golden/diagnose_sweep.py --seeds {' '.join(map(str, seeds))} "
        "--report reports`. Every variant of `golden diagnose` that shows on a checkpoint is "
        "planted in it, in float64 and in float32, and shown as a golden file, as logits, or as "
        f"the logarithms of the five most probable tokens, over {TOKENS} tokens. Honest cases are "
        "float32 runs without a mistake, in chunks of several sizes; right is \"no known "
        f"mistake\". Seeds from {UNUSED} on were not used while the method was developed "
        f"(used: {', '.join(map(str, developed)) or 'none'}).", "",
        "| | planted: named | honest: no known mistake |", "|---|---|---|",
    ]  # fmt: skip
    parts: list[tuple[str, dict[str, Any]]] = [("all", {})]
    for column in ("seed", "preset", "form", "dtype"):
        parts += [(f"{column} {v}", {column: v}) for v in sorted({r[column] for r in rows})]
    for label, where in parts:
        honest_too = where.get("dtype") != "float64"
        last = share(rows, "honest", **where) if honest_too else ""
        lines.append(f"| {label} | {share(rows, 'planted', **where)} | {last} |")
    lines += ["", f"Cases that were not right: {len(missed)}.", ""]
    return "\n".join([*lines, *(f"* {line}" for line in missed)]).rstrip() + "\n"


def main() -> int:
    """Parse and sweep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--presets", default=",".join(CONFIGS))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--variants", default="", help="names, separated by commas; default all")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write diagnose.json, .md")
    with threadpool_limits(1):
        return sweep(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())

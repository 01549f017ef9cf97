"""Print how closely the reference agrees with each golden file, as a Markdown table.

Run: python tests/golden/agreement.py [--mutations]     (needs only NumPy and refimpl)

`--mutations` adds what each known mistake costs: the largest logit difference that the variant
makes, per checkpoint, in float64.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from golden_runs import Runs
from golden_shared import Array, Golden, goldens, load

from refimpl.reference.variant import VARIANTS

_GROUPS = {
    "activations": ("hidden", "attn_out", "ffn_out", "final"),
    "logits": ("logits", "greedy_logits"),
    "MTP chain": ("mtp_forced", "draft_chain"),
    "own MTP wiring": ("tf_wiring", "llamacpp_wiring"),
}


def rows(golden: Golden, runs: Runs) -> Iterator[str]:
    """Table rows of one golden file: arrays in groups, float values only."""
    pairs = list(runs.pairs(golden))
    whole = [(n, a, b) for n, a, b in pairs if a.dtype.kind == "i"]
    same = all(np.array_equal(a, b) for _, a, b in whole)
    for group, prefixes in _GROUPS.items():
        found = [(n, a, b) for n, a, b in pairs if n.startswith(prefixes) and a.dtype.kind == "f"]
        if not found:
            continue
        delta = np.concatenate([np.abs(a.astype(float) - b).ravel() for _, a, b in found])
        rms = float(np.sqrt(np.mean(delta**2)))
        top1 = _top1([(a, b) for n, a, b in found if "logits" in n])
        yield (
            f"| {golden.meta['peer']} {golden.meta['dtype']} | {golden.meta['checkpoint']} "
            f"| {group} | {delta.max():.1e} | {rms:.1e} | {top1} | {'yes' if same else 'NO'} |"
        )


def _top1(found: list[tuple[Array, Array]]) -> str:
    if not found:
        return "-"
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in found])
    return f"{100 * same.mean():g} %"


def mutations(runs: Runs) -> Iterator[str]:
    """Table rows of every registered variant: largest |change| of trunk and MTP logits."""
    files = [load(path) for path in goldens("transformers", "float64")]
    names = [g.meta["checkpoint"] for g in files]
    yield f"| variant | {' | '.join(f'{n} trunk | {n} MTP' for n in names)} |"
    yield f"|---{'|---' * 2 * len(files)}|"
    for name, known in VARIANTS.items():
        cells = []
        for golden in files:
            ours = runs.arrays(golden, "float64", known.flags, new=0)
            for part in ("logits", "mtp_forced_logits"):
                deltas = [
                    np.abs(theirs - ours[array]).max()
                    for array, theirs in golden.arrays.items()
                    if array.startswith(part)
                ]
                cells.append(f"{max(deltas):.1e}")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutations", action="store_true", help="also what each mistake costs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        print("| peer | checkpoint | arrays | max | rms | top-1 | tokens and experts equal |")
        print("|---|---|---|---|---|---|---|")
        for path in goldens():
            for row in rows(load(path), runs):
                print(row)
        if args.mutations:
            print()
            for row in mutations(runs):
                print(row)


if __name__ == "__main__":
    main()

"""The yardstick: an interpolated 3-gram with modified Kneser-Ney smoothing, in NumPy.

It is trained on every training token once and judged on the tokens on which the model is judged:
in every held-out document, all tokens after bos (the text and eos).

    python -m refimpl.mini.ngram DATA [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import data, tokenizer

SHIFT = 12  # bits per token: 4096 entries

Keys = NDArray[np.int64]
Values = NDArray[np.float64]


def _lookup(keys: Keys, values: Values, wanted: Keys) -> Values:
    """Value of each wanted key, 0 where it does not occur; `keys` sorted."""
    where = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[where] == wanted, values[where], 0.0)


@dataclass(frozen=True)
class Order:
    """One order of the model: discounted share per n-gram and back-off weight per context."""

    grams: Keys  # sorted
    share: Values
    contexts: Keys  # sorted
    backoff: Values

    @classmethod
    def fit(cls, grams: Keys, counts: NDArray[np.int64]) -> Order:
        """From sorted n-grams and their (continuation) counts, with three discounts."""
        seen = [int((counts == i).sum()) for i in (1, 2, 3, 4)]
        if min(seen):
            n1, n2, n3, n4 = seen
            y = n1 / (n1 + 2 * n2)
            d = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        else:  # too little text to estimate them
            d = np.array([0.0, 0.75, 0.75, 0.75])
        discount = d[np.minimum(counts, 3)]
        contexts, index = np.unique(grams >> SHIFT, return_inverse=True)
        total = np.bincount(index, counts.astype(np.float64))
        backoff = np.bincount(index, discount) / total
        return cls(grams, (counts - discount) / total[index], contexts, backoff)

    def mix(self, wanted: Keys, lower: Values) -> Values:
        """Interpolate with the lower order's probabilities; unseen contexts pass it through."""
        context = wanted >> SHIFT
        where = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        weight = np.where(self.contexts[where] == context, self.backoff[where], 1.0)
        return _lookup(self.grams, self.share, wanted) + weight * lower


class Trigram:
    """Probabilities of a token after the two before it."""

    def __init__(self, tokens: NDArray[np.uint16]) -> None:
        x = tokens.astype(np.int64)
        tri, tri_counts = np.unique(
            (x[:-2] << 2 * SHIFT) | (x[1:-1] << SHIFT) | x[2:], return_counts=True
        )
        # Lower orders count in how many different contexts a gram occurs.
        bi, bi_counts = np.unique(tri & ((1 << 2 * SHIFT) - 1), return_counts=True)
        uni, uni_counts = np.unique(bi & ((1 << SHIFT) - 1), return_counts=True)
        self.tri, self.bi = Order.fit(tri, tri_counts), Order.fit(bi, bi_counts)
        self.uni = Order.fit(uni, uni_counts)

    def probabilities(self, a: Keys, b: Keys, c: Keys) -> Values:
        """P(c | a, b), elementwise."""
        flat = self.uni.mix(c, np.full(len(c), 1.0 / tokenizer.VOCAB))
        pair = self.bi.mix((b << SHIFT) | c, flat)
        return self.tri.mix((a << 2 * SHIFT) | (b << SHIFT) | c, pair)


def judged(tokens: NDArray[np.uint16]) -> NDArray[np.intp]:
    """Positions of the tokens that are judged: all but the bos of each document."""
    return np.flatnonzero(tokens != tokenizer.BOS)


def evaluate(folder: Path) -> dict[str, float | int]:
    """nats/token, perplexity and bits/byte of the 3-gram on the held-out documents."""
    stream = np.concatenate([np.load(folder / "library.npy"), np.load(folder / "tests.npy")])
    model = Trigram(stream)
    held = data.held_out()
    x = np.concatenate(([tokenizer.EOS], held["tokens"])).astype(np.int64)
    at = judged(held["tokens"].astype(np.uint16)) + 1
    nats = -np.log(model.probabilities(x[at - 2], x[at - 1], x[at]))
    text_bytes = int(held["text_bytes"].sum())
    return {
        "train_tokens": len(stream),
        "judged_tokens": len(at),
        "nats_per_token": float(nats.mean()),
        "perplexity": float(np.exp(nats.mean())),
        "bits_per_byte": float(nats.sum() / np.log(2) / text_bytes),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.ngram",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="folder made by streams")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    figures = evaluate(args.data)
    if args.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:16} {value:,.4f}" if isinstance(value, float) else f"{key:16} {value:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training windows as a pure function of (seed, step), and the fixed held-out windows.

Every step takes four windows: three from library code, one from unit tests, so tests are 25 % of
the tokens.  A stream is cut into slots of the window length; each pass over it visits the slots
in a new order and with a new offset.  Half of the windows are moved on to the next line start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import tokenizer

HERE = Path(__file__).parent
ROWS = ("library", "library", "library", "tests")  # one window of each step a row
EXTRA = 4  # tokens beyond the window: next-token target and three MTP targets


def newline_table(folder: Path) -> NDArray[np.bool_]:
    """(V,) True for tokens after which a new line begins."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [bpe.id_to_token(i) or "" for i in range(tokenizer.VOCAB)]
    table = np.array([piece.endswith("\u010a") for piece in pieces])  # byte 10 in the BPE alphabet
    table[tokenizer.BOS] = True
    return table


@dataclass
class Stream:
    """One token stream and its line starts."""

    tokens: NDArray[np.uint16]
    lines: NDArray[np.intp]
    tag: int

    def window(self, index: int, length: int, seed: int) -> NDArray[np.uint16]:
        """Window number `index` (it grows with the step): (length + EXTRA,) tokens."""
        need = length + EXTRA
        slots = (len(self.tokens) - need) // length - 1
        turn, position = divmod(index, slots)
        rng = np.random.default_rng([seed, self.tag, turn])
        offset = int(rng.integers(length))
        start = offset + int(rng.permutation(slots)[position]) * length
        if int(rng.permutation(slots)[position]) % 2:
            start = int(self.lines[np.searchsorted(self.lines, start)])
        start = min(start, len(self.tokens) - need)
        return self.tokens[start : start + need]


class Windows:
    """Batches of training windows."""

    def __init__(self, folder: Path, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        newline = newline_table(HERE / "bf16")
        self.streams: dict[str, Stream] = {}
        for tag, name in enumerate(("library", "tests")):
            tokens = np.load(folder / f"{name}.npy")
            lines = np.flatnonzero(newline[tokens]) + 1
            self.streams[name] = Stream(tokens, np.append(lines, len(tokens)), tag)

    def batch(self, step: int) -> NDArray[np.int64]:
        """(4, length + EXTRA) tokens of one step."""
        taken = dict.fromkeys(self.streams, 0)
        rows = []
        for name in ROWS:
            index = step * ROWS.count(name) + taken[name]
            taken[name] += 1
            rows.append(self.streams[name].window(index, self.length, self.seed))
        return np.stack(rows).astype(np.int64)


def held_out() -> dict[str, NDArray[np.generic]]:
    """The committed held-out file: tokens, lengths, text_bytes, paths."""
    with np.load(HERE / "heldout.npz") as file:
        return {key: file[key] for key in file.files}


def held_windows(length: int, count: int = 16) -> NDArray[np.int64]:
    """(count, length + EXTRA) evenly spaced windows for the curve in the training log."""
    tokens = held_out()["tokens"]
    starts = np.linspace(0, len(tokens) - length - EXTRA, count).astype(int)
    return np.stack([tokens[s : s + length + EXTRA] for s in starts]).astype(np.int64)

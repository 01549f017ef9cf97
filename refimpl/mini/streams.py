"""Token streams: the corpus as integers, with nothing of the held-out text left in training.

`python -m refimpl.mini.streams OUT` trains the tokenizer, writes `OUT/library.npy` and
`OUT/tests.npy` (uint16, documents as bos + text + eos) and the committed `heldout.npz`, and
prints how many 50-token spans the two sides share (0).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import corpus, tokenizer

HERE = Path(__file__).parent
SPAN = 50  # tokens; no span of this length may be in both training and held-out text
MIN_PIECE = 64  # tokens; shorter remains of a cut document are dropped

Tokens = NDArray[np.uint16]


def span_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """(n,) tokens -> (n - SPAN + 1,) 64-bit hashes of all spans of SPAN tokens."""
    table = np.random.default_rng(50).integers(1, 2**63, size=2**16, dtype=np.uint64)
    mixed = table[tokens]
    count = len(tokens) - SPAN + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    out = np.zeros(count, np.uint64)
    for offset in range(SPAN):
        out *= np.uint64(0x9E3779B97F4A7C15)
        out += mixed[offset : offset + count]
    return out


def shared_spans(tokens: Tokens, forbidden: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Start indices of the spans of `tokens` whose hash is among `forbidden` (sorted)."""
    hashes = span_hashes(tokens)
    if not len(hashes) or not len(forbidden):
        return np.zeros(0, np.intp)
    where = np.searchsorted(forbidden, hashes)
    where[where == len(forbidden)] = 0
    return np.flatnonzero(forbidden[where] == hashes)


def without_shared(tokens: Tokens, forbidden: NDArray[np.uint64]) -> list[Tokens]:
    """The pieces of a document that remain when every shared span is cut out."""
    starts = shared_spans(tokens, forbidden)
    if not len(starts):
        return [tokens]
    keep = np.ones(len(tokens), bool)
    for start in starts:
        keep[start : start + SPAN] = False
    edges = np.flatnonzero(np.diff(np.concatenate(([0], keep.view(np.int8), [0]))))
    pieces = [tokens[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [piece for piece in pieces if len(piece) >= MIN_PIECE]


def wrapped(pieces: list[Tokens]) -> Tokens:
    """Pieces -> one stream of bos + piece + eos."""
    bos = np.array([tokenizer.BOS], np.uint16)
    eos = np.array([tokenizer.EOS], np.uint16)
    parts: list[Tokens] = []
    for piece in pieces:
        parts += [bos, piece, eos]
    return np.concatenate(parts)


def build(out: Path) -> dict[str, object]:
    """Write tokenizer, streams and held-out file; return the figures of the provenance note."""
    texts = corpus.load()
    library = texts.select(held_out=False, is_test=False)
    tests = texts.select(held_out=False, is_test=True)
    held = texts.select(held_out=True)
    # Every third unit test: merges should serve library code first.
    bpe = tokenizer.train([d.text for d in library] + [d.text for d in tests[::3]])
    tokenizer.save(bpe, HERE / "bf16")

    def encode(documents: list[corpus.Document]) -> list[Tokens]:
        encoded = bpe.encode_batch([d.text for d in documents])
        return [np.array(e.ids, np.uint16) for e in encoded]

    held_tokens = encode(held)
    forbidden = np.unique(np.concatenate([span_hashes(t) for t in held_tokens]))
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, object] = {}
    for name, documents in (("library", library), ("tests", tests)):
        pieces = [p for t in encode(documents) for p in without_shared(t, forbidden)]
        stream = wrapped(pieces)
        figures[name] = {
            "files": len(documents),
            "bytes": sum(len(d.text.encode()) for d in documents),
            "tokens": len(stream),
            "spans_shared_with_held_out": len(shared_spans(stream, forbidden)),
        }
        np.save(out / f"{name}.npy", stream)
    held_bytes = [len(d.text.encode()) for d in held]
    np.savez_compressed(
        HERE / "heldout.npz",
        tokens=wrapped(held_tokens),
        lengths=np.array([len(t) + 2 for t in held_tokens], np.int32),
        text_bytes=np.array(held_bytes, np.int32),
        paths=np.array([d.path for d in held]),
    )
    figures["held_out"] = {
        "files": len(held),
        "unit_test_files": sum(d.is_test for d in held),
        "bytes": sum(held_bytes),
        "tokens": sum(len(t) + 2 for t in held_tokens),
    }
    figures["python"] = platform.python_version()
    figures["corpus_sha256"] = texts.digest
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def main(argv: list[str] | None = None) -> int:
    """Command line: build everything below OUT and print the figures."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.streams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder for library.npy and tests.npy")
    print(json.dumps(build(parser.parse_args(argv).out), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

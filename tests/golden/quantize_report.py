"""What `refimpl convert` and `refimpl perplexity` are beside llama.cpp's programs, as one page.

    python tests/golden/quantize_report.py

Needs none of the peers: it reads what was measured with them (quantize.json here, of
make_quantize.py; reports/convert_speed.json, of convert_speed.py; reports/llamacpp_perplexity.json,
of perplexity_llamacpp.py), writes reports/conversion.md and prints it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import convert_speed
import perplexity_llamacpp
from quantize_shared import RECORD

OUT = RECORD.parents[2] / "reports" / "conversion.md"
SOURCES = {
    "mini": "embedded model's BF16 weights",
    "gaussian": "Gaussian",
    "heavy": "outliers (Student's t, 4 degrees of freedom)",
    "tiny_a": "tiny_a",
    "tiny_b": "tiny_b",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    text = page(
        json.loads(RECORD.read_text()),
        json.loads(convert_speed.RECORD.read_text()),
        json.loads(perplexity_llamacpp.RECORD.read_text()),
    )
    args.out.write_text(text, encoding="utf-8")
    print(text, end="")


def page(record: dict[str, Any], speed: dict[str, Any], perplexity: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    mixtures = sum(len(kinds) for kinds in record["types"].values())
    keys = record["keys"]
    different = ", ".join(keys["different"]) or "none"
    parts = [
        "# Conversion and perplexity beside llama.cpp",
        f"The peer is {record['by']}. Written by `python tests/golden/quantize_report.py`.",
        "## Types, names and keys",
        f"The types of all tensors are compared with those that `llama-quantize --dry-run` gives "
        f"for {mixtures} pairs of a model and a mixture (a test does it); {keys['files']} pairs "
        f"of files were written by both, and differ in these keys, names, shapes or types: "
        f"{different}.",
        "## Error of the blocks",
        "Root mean square error over all tensors of a type, ours over llama-quantize's, both "
        "against the same unquantised weights; below 1 ours is the smaller. In the last column "
        "the worst ratio of a single tensor.",
        *errors(record["errors"]),
        "## The converted files run",
        "The embedded model in each type, over the first bundled prompts: how often the most "
        "probable token is the same, and the rms difference of the logits. llama.cpp and the "
        "engine round activations to 8 bits, the reference does not. *source* is the BF16 "
        "checkpoint on the reference.",
        running(record["running"]),
        "## Speed",
        f"{speed['weights'] / 1e6:,.0f} million BF16 weights from memory, whole processes with "
        f"all cores, in turns ({speed['rounds'][-1]['host']}); medians and ranges. `refimpl "
        "convert` forces its file to disk besides.",
        "\n".join(convert_speed.table(speed)),
        "## Perplexity",
        perplexity_llamacpp.sentence(perplexity),
    ]
    return "\n\n".join(parts) + "\n"


def errors(found: dict[str, Any]) -> list[str]:
    """The ratios of all types by source, and the figures behind them."""
    kinds = sorted({kind for by_type in found.values() for kind in by_type})
    sources = list(found)
    ratios = []
    for kind in kinds:
        rows = [found[s].get(kind) for s in sources]
        worst = max(row["worst_ratio"] for row in rows if row)
        cells = ["" if row is None else f"{row['rms'][1] / row['rms'][0]:.4f}" for row in rows]
        ratios.append([kind, *cells, f"{worst:.4f}"])
    figures = [
        [SOURCES[s], kind, str(row["tensors"]), *(f"{v:.4g}" for v in row["rms"])]
        for s in sources
        for kind, row in found[s].items()
    ]
    return [
        markdown(["type", *(SOURCES[s] for s in sources), "worst tensor"], ratios),
        "The errors themselves:",
        markdown(["source", "type", "tensors", "llama-quantize", "refimpl"], figures),
    ]


def running(found: dict[str, Any]) -> str:
    """Agreement of the most probable token, pair by pair."""
    pairs = [k for k in next(iter(found.values()), {}) if k != "rows"]
    rows = [
        [name, *(f"{100 * row[p][0]:.2f} %, {row[p][1]:g}" for p in pairs)]
        for name, row in found.items()
    ]
    return markdown(["type", *pairs], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()

"""What the shipped model is worth, measured through `refimpl` itself, without PyTorch.

    python -m refimpl.mini.measure [--model PATH] [--ngram DATA] --out reports/mini.json --report

Held-out perplexity on the same tokens as the 3-gram, the twenty fixed prompts, drafts accepted
in a real draft-and-verify loop on held-out code, greedy text with 0 to 3 drafts (all on the
reference), and what `measure_types` adds; some seven minutes of processor time. Without --ngram the
3-gram's figures, which need the training streams, are those of the file that is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backend import Backend
from refimpl.checkpoint.atomic import atomic_file, check_writable
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions, Generation
from refimpl.decoding.sampling import SamplingParams
from refimpl.mini import data, ngram, prompts, report
from refimpl.mini.evaluate import windows
from refimpl.mini.measure_types import measure_types

NEW_TOKENS = prompts.NEW_TOKENS
DEPTHS = (0, 1, 2, 3)
TEMPERATURE = 1.0  # sampled text does not fall into loops, in which drafts are too easy
SEED = 1


@dataclass(frozen=True)
class Continuation:
    """One prompt's continuation under one draft depth."""

    prompt: prompts.Prompt
    run: Generation


def held_out(model: Backend, limit: int | None = None) -> dict[str, float | int]:
    """nats/token over the held-out documents in windows of 1024 that advance by 512.

    Args:
        limit: judge only this many windows, evenly spaced (None = all).
    """
    tokens, masks = windows()
    length = masks.shape[1]
    if limit is not None:
        picked = np.linspace(0, len(tokens) - 1, limit).astype(int)
        tokens, masks = tokens[picked], masks[picked]
    nats = np.zeros(len(tokens))
    for i, (row, mask) in enumerate(zip(tokens, masks, strict=True)):
        last = int(np.flatnonzero(mask)[-1]) + 1
        cache = model.new_cache(length)
        logits = model.prefill(row[:last], cache, all_logits=True).logits.astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(last), row[1 : last + 1]]
        loss = np.log(np.exp(logits).sum(axis=-1)) - chosen  # (last,)
        nats[i] = loss[mask[:last]].sum()
        if i % 20 == 19 or i + 1 == len(tokens):
            print(f"held out: {i + 1}/{len(tokens)} windows", file=sys.stderr)
    count = int(masks.sum())
    mean = float(nats.sum()) / count
    result = {"judged_tokens": count, "nats_per_token": mean, "perplexity": math.exp(mean)}
    if limit is None:
        text_bytes = int(data.held_out()["text_bytes"].sum())
        result["bits_per_byte"] = float(nats.sum()) / math.log(2) / text_bytes
    return result


def continuations(
    model: Backend, encode: Any, decoder: Any, depth: int, temperature: float = 0.0
) -> list[Continuation]:
    """The twenty prompts with `depth` drafts a step, greedily or sampled; stops at the end of
    text."""
    sampling = SamplingParams(temperature=temperature, seed=SEED if temperature else None)
    options = GenerateOptions(max_new_tokens=NEW_TOKENS, sampling=sampling, mtp=depth)
    out = []
    for prompt in prompts.load():
        run = generate(model, encode(prompt.text), options, new_decoder=decoder)
        if run.finish_reason == "interrupted":  # Ctrl-C ends a text early
            raise KeyboardInterrupt
        out.append(Continuation(prompt, run))
    print(f"prompts: done with {depth} drafts, temperature {temperature:g}", file=sys.stderr)
    return out


def acceptance(runs: Sequence[Continuation]) -> dict[str, Any]:
    """Accepted drafts per verification over all runs, and by position."""
    steps = sum(c.run.mtp.steps for c in runs)
    accepted = sum(c.run.mtp.accepted for c in runs)
    return {
        "verifications": steps,
        "drafted": sum(c.run.mtp.drafted for c in runs),
        "accepted": accepted,
        "mean_accepted": accepted / steps,
    }


def measure(path: Path, ngram_folder: Path | None, limit: int | None) -> dict[str, Any]:
    """All figures of one checkpoint."""
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.reference.model import ReferenceModel
    from refimpl.text.tokenizer import tokenizer_of

    source = open_checkpoint(path)
    model = ReferenceModel(source, "float32")
    tokenizer = tokenizer_of(path)
    if tokenizer is None:
        raise SystemExit(f"{path}: has no tokenizer")
    runs = {
        depth: continuations(model, tokenizer.encode, tokenizer.stream, depth) for depth in DEPTHS
    }
    sampled = continuations(model, tokenizer.encode, tokenizer.stream, DEPTHS[-1], TEMPERATURE)
    plain = runs[0]
    verdicts = [prompts.judge(c.prompt.text, c.run.text or "") for c in plain]
    figures: dict[str, Any] = {
        "model": path.name,
        "prompts": {
            "parsed": sum(verdicts),
            "of": len(verdicts),
            "runs": [
                {"path": c.prompt.path, "function": c.prompt.function, "parses": verdict,
                 "continuation": c.run.text}
                for c, verdict in zip(plain, verdicts, strict=True)
            ],
        },
        "greedy_identical": all(
            c.run.ids == p.run.ids
            for others in runs.values()
            for c, p in zip(others, plain, strict=True)
        ),
        "acceptance": {str(depth): acceptance(runs[depth]) for depth in DEPTHS if depth},
        "acceptance_sampled": {
            "temperature": TEMPERATURE, "depth": DEPTHS[-1], **acceptance(sampled)
        },
        "held_out": held_out(model, limit),
    }  # fmt: skip
    if ngram_folder is not None:
        figures["three_gram"] = ngram.evaluate(ngram_folder)
    return figures


def _completed(figures: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """With the 3-gram's figures of the older file, and the ratio to them."""
    if "three_gram" not in figures and out is not None and out.is_file():
        older = json.loads(out.read_text(encoding="utf-8"))
        figures |= {k: older[k] for k in ("three_gram",) if k in older}
    if "three_gram" in figures:
        ratio = figures["held_out"]["perplexity"] / figures["three_gram"]["perplexity"]
        figures["perplexity_over_three_gram"] = ratio
    return figures


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=data.HERE / "step-mini-q4_0.gguf")
    parser.add_argument("--ngram", type=Path, help="training streams, to judge the 3-gram too")
    parser.add_argument("--limit", type=int, help="judge only this many held-out windows")
    parser.add_argument("--out", type=Path, help="write JSON here instead of printing it")
    parser.add_argument("--report", action="store_true", help="the page and plots beside OUT too")
    args = parser.parse_args(argv)
    if args.report and args.out is None:
        parser.error("--report goes beside --out FILE")
    if args.out is not None:
        check_writable(args.out)
    figures = _completed(measure(args.model, args.ngram, args.limit), args.out)
    if args.report:
        figures["by_type"] = measure_types()
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    if args.out is None:
        print(text)
        return 0
    with atomic_file(args.out) as file:
        file.write((text + "\n").encode())
    if args.report:
        report.write(figures, args.out.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The trainer's own view of exported weights: held-out loss, draft acceptance, twenty prompts.

    python -m refimpl.mini.evaluate [FOLDER] [--quantise] [--prompts] [--temperature X]

Every held-out document is read in windows of 1024 tokens that advance by 512, so all tokens
but the first of a document are judged once, with at least 512 tokens before them where the
document has them.  Acceptance is teacher-forced: a draft counts when it equals the trunk's own
greedy choice for the same position behind the true text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import data, prompts, tokenizer

LENGTH = 1024
STRIDE = 512
ROWS = 4
DRAFTS = 3


def windows() -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Held-out windows (n, LENGTH + EXTRA) and which of their LENGTH targets are judged."""
    held = data.held_out()
    tokens = held["tokens"].astype(np.int64)
    ends = np.cumsum(held["lengths"].astype(np.int64))
    rows, masks = [], []
    for begin, end in zip(np.concatenate(([0], ends[:-1])), ends, strict=True):
        document = tokens[begin:end]
        for start in range(0, max(1, len(document) - 1 - (LENGTH - STRIDE)), STRIDE):
            row = np.full(LENGTH + data.EXTRA, tokenizer.EOS, np.int64)
            part = document[start : start + LENGTH + data.EXTRA]
            row[: len(part)] = part
            mask = np.zeros(LENGTH, bool)
            fresh = 0 if start == 0 else LENGTH - STRIDE  # the rest was judged one window ago
            mask[fresh : len(document) - 1 - start] = True
            rows.append(row)
            masks.append(mask)
    return np.stack(rows), np.stack(masks)


def load_model(folder: Path, length: int, quantise: bool) -> Any:
    """Exported weights as a torch model that computes windows of `length` tokens."""
    from safetensors.torch import load_file

    from . import torch_model

    masters = {k: v.float() for k, v in load_file(str(folder / "model.safetensors")).items()}
    model = torch_model.Model(torch_model.read_config(folder), masters, length)
    if quantise:
        model.quantised = True
        model.refresh()
    return model


def held_out(model: Any) -> dict[str, float | int]:
    """nats/token, bits/byte and acceptance on all held-out tokens."""
    import torch

    tokens, masks = windows()
    nats = count = 0.0
    hits, runs, drafts = np.zeros(DRAFTS), 0.0, 0
    for i in range(0, len(tokens), ROWS):
        w = torch.from_numpy(tokens[i : i + ROWS])
        mask = masks[i : i + ROWS]
        with torch.no_grad():
            u = model.trunk(w[:, :LENGTH])
            target = w[:, 1 : LENGTH + 1]
            logits = model.head(u, target)[1].float()
            loss = torch.nn.functional.cross_entropy(logits, target.reshape(-1), reduction="none")
            nats += float(loss.view(mask.shape).numpy()[mask].sum())
            count += mask.sum()
            greedy = logits.argmax(-1).view(mask.shape).numpy()
            equal = []
            for k in range(DRAFTS):
                u = model.mtp(u, w[:, 1 + k : LENGTH + 1 + k], k)
                picks = model.mtp_head(u, w[:, 2 + k : LENGTH + 2 + k], k)[1]
                picks = picks.float().argmax(-1).view(mask.shape).numpy()
                ahead = greedy[:, 1 + k : LENGTH - DRAFTS + 1 + k]
                equal.append(picks[:, : LENGTH - DRAFTS] == ahead)
        # A row is judged when the trunk's row DRAFTS further on is judged too.
        rows = mask[:, : LENGTH - DRAFTS] & mask[:, DRAFTS:]
        hits += [e[rows].sum() for e in equal]
        runs += np.cumprod(np.stack(equal), 0).sum(0)[rows].sum()
        drafts += int(rows.sum())
    text_bytes = int(data.held_out()["text_bytes"].sum())
    return {
        "judged_tokens": int(count),
        "nats_per_token": nats / count,
        "perplexity": float(np.exp(nats / count)),
        "bits_per_byte": nats / np.log(2) / text_bytes,
        **{f"accepted_{k + 1}": float(hits[k] / drafts) for k in range(DRAFTS)},
        "mean_accepted_run": float(runs / drafts),
    }


def continuations(model: Any, texts: list[str], temperature: float, seed: int = 0) -> list[str]:
    """NEW_TOKENS tokens for every text (greedy at temperature 0), without a cache."""
    import torch
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(data.HERE / "bf16" / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    ids = [bpe.encode(text).ids for text in texts]
    starts = [len(x) for x in ids]
    head = model.copies["lm_head.weight"]
    for _ in range(prompts.NEW_TOKENS):
        batch = torch.zeros(len(ids), model.length, dtype=torch.int64)
        for row, x in zip(batch, ids, strict=True):
            row[: len(x)] = torch.tensor(x)
        with torch.no_grad():
            h = model.trunk(batch)
            last = torch.stack([h[i, len(x) - 1] for i, x in enumerate(ids)])
            from .torch_ops import BF16, rms

            logits = (rms(last, model.copies["model.norm.weight"]).to(BF16) @ head.t()).float()
        if temperature:
            p = torch.softmax(logits / temperature, -1)
            picks = torch.multinomial(p, 1, generator=generator)[:, 0]
        else:
            picks = logits.argmax(-1)
        for x, pick in zip(ids, picks.tolist(), strict=True):
            if x[-1] != tokenizer.EOS:
                x.append(pick)
    return [bpe.decode(x[n:]) for x, n in zip(ids, starts, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Command line: prints JSON."""
    parser = argparse.ArgumentParser(
        prog="refimpl.mini.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=data.HERE / "bf16")
    parser.add_argument("--quantise", action="store_true", help="matrices as Q4_0 stores them")
    parser.add_argument("--prompts", action="store_true", help="continue the twenty prompts")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args(argv)
    os.environ["MINI_EAGER"] = "1"
    if not args.prompts:
        print(json.dumps(held_out(load_model(args.folder, LENGTH, args.quantise)), indent=1))
        return 0
    model = load_model(args.folder, STRIDE, args.quantise)
    committed = prompts.load()
    texts = continuations(model, [p.text for p in committed], args.temperature)
    verdicts = [prompts.judge(p.text, t) for p, t in zip(committed, texts, strict=True)]
    for prompt, text, verdict in zip(committed, texts, verdicts, strict=True):
        record = {"path": prompt.path, "function": prompt.function, "parses": verdict}
        print(json.dumps({**record, "continuation": text}))
    print(json.dumps({"parsed": sum(verdicts), "of": len(verdicts)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

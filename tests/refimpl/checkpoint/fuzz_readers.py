"""Feeds damaged checkpoints to the readers under a memory limit, and prints what happened.

    python tests/refimpl/checkpoint/fuzz_readers.py GGUF SAFETENSORS [--cases N] [--seed S]

GGUF is a small good file, SAFETENSORS a small good folder. Each case changes a header field
(counts, lengths, offsets, types, dimensions, strings), flips bits or cuts the file; opening must
end in a checkpoint whose tensors can be read or in a `RefimplError` of one line. Exits 1 with the
case's number if anything else happens. Prints "N cases: R refused, O opened, 0 crashes".
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

MEMORY_BYTES = 4 << 30
NUMBERS = (0, 1, 5, 8, 9, 31, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("safetensors", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(options.safetensors, Path(name) / "m")
        targets = [
            (Path(name) / "m.gguf", options.gguf.read_bytes(), gguf_header_bytes(options.gguf)),
            (folder / "model.safetensors", *safetensors_parts(options.safetensors)),
        ]
        for case in range(options.cases):
            path, good, head = targets[case % 2]
            path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
            path.write_bytes(damaged(good, head, rng))
            try:
                counts[attempt(path if path.suffix == ".gguf" else folder)] += 1
            except BaseException:
                traceback.print_exc()
                print(f"case {case} of seed {options.seed} crashed", file=sys.stderr)
                return 1
    print(f"{options.cases} cases: {counts['refused']} refused, {counts['opened']} opened, "
          "0 crashes")  # fmt: skip
    return 0


def attempt(path: Path) -> str:
    import numpy as np

    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.errors import RefimplError
    from refimpl.text.tokenizer import tokenizer_of

    try:
        source = open_checkpoint(path)
        tokenizer_of(path, source.metadata or None)
    except RefimplError as error:
        if not str(error).isprintable():
            raise AssertionError(f"not one line: {error}") from error
        return "refused"
    with np.errstate(all="ignore"):  # damaged values may be infinite or not a number
        source.matrix("lm_head", None, np.float32)
        source.norm_scale("norm", None, np.float64)
        for spec in source.config.trunk:
            source.matrix("q_proj", spec.index, np.float64)
            if spec.is_moe:
                source.expert("experts.down", spec.index, 0, np.float32)
    source.close()
    return "opened"


def gguf_header_bytes(path: Path) -> int:
    from refimpl.checkpoint.gguf_read import read_gguf

    return path.stat().st_size - sum(
        -(-t.data.size // 32) * 32 for t in read_gguf(path).tensors.values()
    )


def safetensors_parts(folder: Path) -> tuple[bytes, int]:
    good = (folder / "model.safetensors").read_bytes()
    return good, 8 + int.from_bytes(good[:8], "little")


def damaged(good: bytes, head: int, rng: random.Random) -> bytes:
    data = bytearray(good)
    at = rng.randrange(head)
    kind = rng.randrange(6)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + 8] = rng.choice((*NUMBERS, len(good))).to_bytes(8, "little")
    elif kind == 2:
        data[at : at + 4] = (rng.choice(NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
    elif kind == 3:
        del data[rng.randrange(len(data)) :]
    elif kind == 4:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(head)] = rng.randrange(256)
    else:  # a digit of a JSON number, or a letter: what a flipped bit rarely makes
        data[at] = rng.choice(b'0123456789-.{}[]",:')
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())

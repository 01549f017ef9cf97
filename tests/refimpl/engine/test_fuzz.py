"""Damaged files never reach the unchecked kernels: they are refused, or they run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.model import EngineModel
from refimpl.errors import RefimplError

CASES = 150


def mutated(data: bytes, header: int, rng: np.random.Generator) -> bytes:
    """One file in four is cut; in the others up to four bytes of the header change."""
    if rng.random() < 0.25:
        return data[: int(rng.integers(len(data)))]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        out[int(rng.integers(header))] = int(rng.choice([0, 1, 2, 255, rng.integers(256)]))
    return bytes(out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_files_are_refused_or_run(
    tiny_gguf: Callable[[str, str], StoredSource], tmp_path: Path
) -> None:
    where = tiny_gguf("tiny_a", "q8_0").stored("lm_head", None).where
    data = Path(where.partition(": tensor ")[0]).read_bytes()
    # Behind the vocabulary, which is most of the header and of no concern to kernels, and before.
    header = data.index(b"output_norm.weight") + 4096
    rng, path = np.random.default_rng(1), tmp_path / "damaged.gguf"
    refused = ran = 0
    for _ in range(CASES):
        path.unlink(missing_ok=True)  # the map of the last case goes on living
        path.write_bytes(mutated(data, header, rng))
        try:
            model = EngineModel(open_checkpoint(path), threads=1)
            model.prefill([1, 2, 3], model.new_cache(8))
            model.close()
            ran += 1
        except RefimplError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused + ran == CASES
    assert refused > CASES // 4 and ran > 0, (refused, ran)

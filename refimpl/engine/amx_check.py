"""A first product with AMX, in a process of its own, against the emulation.

A processor or hypervisor that says it has AMX may still refuse an instruction, and would end the
process; so this is tried apart, once for each version of the kernels and set of processor flags.
The answer is kept beside the compiled kernels.

`python -P -m refimpl.engine.amx_check` is the other process (-P: nothing is imported from the
folder that the user is in): exit code 0 if products are right.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint.atomic import atomic_file
from refimpl.engine.amx import (
    PANEL_TOKENS,
    UNIT_TILES,
    TileUnit,
    amx_multiplying,
    amx_scratch_bytes,
)
from refimpl.engine.memory import address, zeroed
from refimpl.engine.simd import cpu_features, sources_hash
from refimpl.engine.tiles_codes import TILE_ROWS
from refimpl.errors import RefimplError

_LONGEST_S = 120
_COLUMNS = 480
_SHAPES = ((6, 32, 0), (6, 21, 96), (5, 16, 0), (5, 9, 96))
"""Tiles, rows of activations, first column: every loop of the kernel is gone through, with all the
instructions that it is unrolled into, so that none is met for the first time in prefill."""
_WRONG = 3  # exit code of the other process when products are wrong


def why_not(unit: TileUnit) -> str:
    """What went wrong when `unit` was tried, or ''."""
    path = _kept_at(unit)
    if path is not None and path.exists():
        try:
            return str(json.loads(path.read_text())["wrong"])
        except (OSError, ValueError, KeyError):
            pass  # half a file or not ours: try again
    wrong, certain = _tried()
    if path is not None and certain:
        try:
            with atomic_file(path) as file:
                file.write(json.dumps({"wrong": wrong}).encode())
        except RefimplError:
            pass  # it will be tried again next time
    return wrong


def _kept_at(unit: TileUnit) -> Path | None:
    """Where the answer lies, or None where compiled kernels are not kept either."""
    folder = getattr(amx_multiplying(unit)._cache, "cache_path", None)
    if not folder:
        return None
    flags = hashlib.sha256(" ".join(sorted(cpu_features())).encode()).hexdigest()[:16]
    return Path(folder) / f"amx_check-{unit.sources}-{flags}.json"


def _tried() -> tuple[str, bool]:
    """What went wrong, or '', and whether it would again."""
    command = [sys.executable, "-P", "-m", "refimpl.engine.amx_check"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"AMX could not be tried ({type(error).__name__})", False
    if done.returncode == 0:
        return "", True
    if done.returncode == _WRONG:
        return "AMX gave wrong products", True
    if done.returncode < 0:
        return f"AMX ended its trial with {signal.Signals(-done.returncode).name}", True
    return f"AMX could not be tried (exit code {done.returncode})", False


def largest_error(unit: TileUnit) -> float:
    """Largest difference of the products of `unit` from those of the emulation, over the number of
    their terms, whose size is about 1."""
    random, worst = np.random.default_rng(1), 0.0
    reference = amx_multiplying(TileUnit("amx emulated", unit.sources))
    for count, rows, first in _SHAPES:
        weights = random.standard_normal((count, _COLUMNS, TILE_ROWS)).astype(np.float32)
        x = random.standard_normal((rows, first + _COLUMNS)).astype(np.float32)
        got, expected = (
            _products(f, weights, x, first) for f in (amx_multiplying(unit), reference)
        )
        with np.errstate(invalid="ignore"):
            error = np.abs(got - expected).max() / _COLUMNS
        worst = max(worst, float(error) if np.isfinite(error) else np.inf)
    return worst


def _products(function: Any, weights: Any, x: Any, first: int) -> Any:
    """Products (rows, tiles, 16) by the compiled function, added to ones if `first` is not 0."""
    count, columns, rows = len(weights), weights.shape[1], len(x)
    pairs = _bfloat16(weights.reshape(count, columns // 2, 2, TILE_ROWS).transpose(0, 1, 3, 2))
    tile_bytes = 32 * columns
    tiles = zeroed(UNIT_TILES * tile_bytes + amx_scratch_bytes(columns))
    tiles[: count * tile_bytes] = pairs.reshape(-1).view(np.uint8)
    blobs = [np.ascontiguousarray(_bfloat16(row)) for row in x]
    places = np.array([address(b) for b in blobs], dtype=np.int64)
    y = np.ones((rows, count, TILE_ROWS), dtype=np.float32)
    assert rows <= PANEL_TOKENS
    function.ctypes(address(tiles), tile_bytes, count, first, columns, x.shape[1], address(places),
                    rows, 0, address(y), y.strides[0])  # fmt: skip
    return y


def _bfloat16(values: Any) -> Any:
    """The bits of float32 values cut to bfloat16."""
    return np.ascontiguousarray(np.ascontiguousarray(values).view(np.uint32) >> 16, np.uint16)


def _main() -> int:
    from refimpl.engine.amx_choice import request_permission

    if request_permission():
        return 1
    return 0 if largest_error(TileUnit("amx", sources_hash())) < 1e-5 else _WRONG


if __name__ == "__main__":
    sys.exit(_main())

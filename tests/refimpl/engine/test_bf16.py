"""Rounding to bfloat16, with the processor's instruction and without."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROUND = """
import sys
import numpy as np
from numba import types
from refimpl.engine.bf16 import rounded, rounded_pair
from refimpl.engine.jit import cfunc
from refimpl.engine.loads import load, store
from refimpl.engine.memory import address
from refimpl.engine.vec import F32x16

@cfunc(types.void(*[types.int64] * 4))
def both(x, count, out, pairs):
    for i in range(0, count, 16):
        values = load(F32x16, x + 4 * i)
        store(out + 2 * i, rounded(values))
        store(pairs + 4 * i, rounded_pair(values, values))

x = np.load(sys.argv[1])
out, pairs = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint32)
both.ctypes(address(x), len(x), address(out), address(pairs))
np.save(sys.argv[2], np.stack([out, pairs >> 16, pairs & 0xFFFF]).astype(np.uint16))
"""
PLAIN = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c"}


@pytest.mark.parametrize("processor", ["this one", "without AVX512-BF16"])
def test_values_are_rounded_to_the_nearest_ties_to_even(processor: str, tmp_path: Path) -> None:
    """Where there is no instruction for it, LLVM by itself would call a function that is not there
    and end the process."""
    if processor != "this one" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("for x86")
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1 << 32, 1 << 14, dtype=np.uint32)
    x[::3] = x[::3] & 0xFFFF0000 | 0x8000  # ties
    values = x.view(np.float32)
    values[:6] = np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0
    values[np.abs(values) < np.finfo(np.float32).tiny] = 0  # the instruction has no denormals
    np.save(tmp_path / "x.npy", values)
    environment = {**os.environ, **(PLAIN if processor != "this one" else {})}
    command = [sys.executable, "-c", ROUND, str(tmp_path / "x.npy"), str(tmp_path / "out.npy")]
    subprocess.run(command, env=environment, check=True)
    made, numbers = np.load(tmp_path / "out.npy"), ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # not a number
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    for bits in made:
        np.testing.assert_array_equal(bits[numbers], expected[numbers])
        assert np.isnan(bits[~numbers].view(ml_dtypes.bfloat16).astype(np.float32)).all()

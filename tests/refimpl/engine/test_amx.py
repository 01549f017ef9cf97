"""Prefill with AMX, on machines that do not have it.

The kernel runs with emulated instructions, the emulation is held against Intel's description, and
the real instructions are looked at in the machine code made for a processor that has them (which
runs in `test_amx_trap.py`).
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tile_products import error, products

from refimpl.engine import amx_check, amx_choice
from refimpl.engine.amx import TileUnit
from refimpl.engine.amx_emulated import (
    REGISTERS_BYTES,
    emulated_configure,
    emulated_dot,
    emulated_load,
    emulated_release,
    emulated_store,
)
from refimpl.engine.formats import FORMATS
from refimpl.engine.jit import njit
from refimpl.engine.memory import address, zeroed
from refimpl.engine.model import EngineModel
from refimpl.engine.simd import available, choose_simd, sources_hash
from refimpl.engine.tiles import MANY, tiling
from refimpl.errors import InputError
from refimpl.reference.model import ReferenceModel

EMULATED = TileUnit("amx emulated", sources_hash())
ROUNDED = [name for name in FORMATS if name not in ("F32", "F16")]
BF16_ERROR = 2.5e-3
needs_avx512 = pytest.mark.skipif(available()[0] != "avx512", reason="AMX goes with AVX512")
Rows = Callable[[str, int, int], tuple[np.ndarray, np.ndarray]]
Engine = Callable[..., EngineModel]


@pytest.fixture(autouse=True)
def with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever instruction set is forced: AMX goes with AVX512."""
    monkeypatch.setenv("REFIMPL_SIMD", available()[0])


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, ties to even."""
    import ml_dtypes

    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


@needs_avx512
@pytest.mark.parametrize("name", ROUNDED)
def test_products_differ_by_the_rounding_to_bfloat16(stored_rows: Rows, name: str) -> None:
    """Half a unit of the eighth bit for each factor; int8 activations cost three times that."""
    made, simd = tiling(choose_simd(), name, exact=False, amx=EMULATED), choose_simd()
    assert error(made, simd, stored_rows(name, 48, 512), 33) < BF16_ERROR


@needs_avx512
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("count", [1, 8, 15, 16, 17, 31, 32, 45])
def test_nothing_else_is_rounded(stored_rows: Rows, name: str, count: int) -> None:
    """Against products of the rounded factors: any number of rows of activations, an odd number of
    tiles, columns in pieces."""
    simd = choose_simd()
    made = replace(tiling(simd, name, exact=False, amx=EMULATED), columns=256)
    data, values = stored_rows(name, 48, 512)
    x = np.random.default_rng(2).standard_normal((count, 512)).astype(np.float32)
    factors = bfloat16(x).astype(np.float64), bfloat16(values).astype(np.float64)
    got, expected = products(made, simd, data, x), factors[0] @ factors[1].T
    # A value that float32 puts beside a tie may be rounded the other way: hence not 1e-6.
    assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < 2e-4


@needs_avx512
@pytest.mark.parametrize("preset", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("file_type", ["q4_0", "q4_k_s", "q8_0", "bf16"])
def test_prefill_is_nearer_to_the_reference_than_without(
    engine: Engine,
    reference: Callable[..., ReferenceModel],
    prompt: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    file_type: str,
) -> None:
    """All rows at once, so that experts have from none to all of them, fewer than MANY too. In
    `tiny_b` no choice of experts can flip."""
    ids, model = prompt(60), reference(preset, file_type)
    expected = model.prefill(ids, model.new_cache(60), all_logits=True).logits
    far = {}
    for choice in ("off", "emulate"):
        monkeypatch.setenv("REFIMPL_AMX", choice)
        made = engine(preset, file_type, micro_batch={"off": 60, "emulate": 61}[choice])
        assert made.description["amx"].startswith({"off": "off", "emulate": "amx emul"}[choice])
        got = made.prefill(ids, made.new_cache(60), all_logits=True).logits
        far[choice] = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert MANY < 60
    if preset == "tiny_b":
        assert far["emulate"] < 0.02
        assert far["emulate"] < 1.05 * far["off"]
    else:
        assert far["emulate"] < 0.2


@needs_avx512
def test_same_bits_for_any_number_of_threads(
    engine: Engine, prompt: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFIMPL_AMX", "emulate")
    ids, rows = prompt(60), []
    for threads in (1, 3):
        made = engine("tiny_a", "q4_0", threads=threads, micro_batch=59)
        rows.append(made.prefill(ids, made.new_cache(60), all_logits=True).logits)
    np.testing.assert_array_equal(rows[0], rows[1])


# ------------------------------------------------------------------ the emulation


@njit
def _one_dot(registers: int, config: int, c: int, a: int, b: int) -> None:
    configure(registers, config)
    for tile, at in ((0, c), (1, a), (2, b)):
        load_tile(registers, tile, at, 64)
    dot(registers, 0, 1, 2)
    store_tile(registers, 0, c, 64)
    release(registers)


configure, load_tile, dot = njit(emulated_configure), njit(emulated_load), njit(emulated_dot)
store_tile, release = njit(emulated_store), njit(emulated_release)


def shapes(**tiles: tuple[int, int]) -> np.ndarray:
    """LDTILECFG's operand: (rows, bytes of a row) of tiles by number."""
    config = zeroed(64)
    config[0] = 1
    for name, (rows, row_bytes) in tiles.items():
        number = int(name[1:])
        config[16 + 2 * number], config[48 + number] = row_bytes, rows
    return config


def as_described(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """TDPBF16PS step by step: c (M, N), a (M, K, 2), b (K, N, 2), float32 that are bfloat16.

    Each step is exact in float64 but for additions, whose result is rounded once more to float32;
    that double rounding is excluded by the choice of values in the test.
    """

    def flushed(values: np.ndarray) -> np.ndarray:
        single = values.astype(np.float32)
        return np.where(np.abs(single) < np.finfo(np.float32).tiny, np.float32(0), single)

    a, b, c = flushed(a).astype(np.float64), flushed(b).astype(np.float64), flushed(c)
    sums = np.zeros((*c.shape, 2), dtype=np.float32)
    for k in range(a.shape[1]):
        sums = flushed(a[:, None, k] * b[None, k] + sums)
    return flushed(c + flushed(sums[..., 0] + sums[..., 1]))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_the_emulated_product_is_the_described_one(rows: int) -> None:
    """Bit for bit, with denormal factors, sums and results among the values."""
    rng = np.random.default_rng(rows)
    a, b = (bfloat16(rng.standard_normal((16, 16, 2))) for _ in range(2))
    a[:, ::5] *= np.float32(2.0**-130)  # denormal in bfloat16
    b[::3] *= np.float32(2.0**-60)
    a[:, 1::3] *= np.float32(2.0**-66)  # products that are denormal
    a, b = bfloat16(a), bfloat16(b)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    c[:, 3] = np.float32(1e-40)
    packed = [np.ascontiguousarray((v.view(np.uint32) >> 16).astype(np.uint16)) for v in (a, b)]
    out, registers = c.copy(), zeroed(REGISTERS_BYTES)
    config = shapes(t0=(rows, 64), t1=(rows, 64), t2=(16, 64))
    _one_dot(address(registers), address(config), address(out), *(address(p) for p in packed))
    expected = as_described(c[:rows], a[:rows], b)
    np.testing.assert_array_equal(out[:rows], expected)
    np.testing.assert_array_equal(out[rows:], c[rows:])


def test_shapes_that_do_not_fit_leave_not_a_number() -> None:
    """Where the processor would raise a fault."""
    for config in (shapes(t0=(4, 64), t1=(5, 64), t2=(16, 64)), shapes(t0=(4, 64), t1=(4, 64))):
        c, a, b = (np.ones((16, 16), dtype=np.float32) for _ in range(3))
        registers = zeroed(REGISTERS_BYTES)
        _one_dot(address(registers), address(config), *(address(v) for v in (c, a, b)))
        assert np.isnan(c[:4]).all()


# ------------------------------------------------------------------ the real instructions

_PRINT_ASSEMBLY = """
from refimpl.engine.amx import TileUnit, amx_multiplying
print(amx_multiplying(TileUnit("amx", "test"))._library.get_asm_str())
"""


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The kernel's lines for a processor with AMX; compiled, not run."""
    if not sys.platform.startswith("linux") or available()[0] == "portable":
        pytest.skip("made for x86-64 Linux")
    flags = "amx-tile amx-bf16 avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512bf16"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join("+" + flag for flag in flags.split()),
        "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("kernels")),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PRINT_ASSEMBLY],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def loops(assembly: list[str]) -> list[list[str]]:
    """Instructions of the innermost loops: from a label to the first jump, if that goes back."""
    found: list[list[str]] = []
    label, body = "", list[str]()
    for line in assembly:
        text = line.strip()
        if match := re.match(r"(\.LBB\w+):", text):
            label, body = match[1], []
        elif re.match(r"[a-z]", text):
            body.append(text)
            if text.startswith("j"):
                if text.split()[-1] == label:
                    found.append(body)
                label, body = "", []
    return found


def count(lines: list[str], instruction: str) -> int:
    return sum(line.strip().startswith(instruction) for line in lines)


def test_the_kernel_is_made_of_tile_instructions(assembly: list[str]) -> None:
    """How often each is run is seen in `test_amx_trap.py`."""
    names = ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")
    for name in names:
        assert count(assembly, name) > 0, name


def test_inner_loops_load_and_multiply_tiles_and_nothing_else(assembly: list[str]) -> None:
    """Four products for four loads with up to 32 rows of activations, for five with up to 16, and
    two for three at the end; sums stay in their registers, no tile or vector goes by way of the
    stack."""
    kinds = set()
    for body in loops(assembly):
        products, loads = count(body, "tdpbf16ps"), count(body, "tileloadd")
        if not products:
            continue
        kinds.add(products / loads)
        assert not [line for line in body if re.search(r"%[xyz]mm|tile.*\(%rsp", line)]
        assert count(body, "tilestored") == count(body, "tilezero") == 0
        written = {line.split("%")[-1] for line in body if line.startswith("tdpbf16ps")}
        assert written == {f"tmm{i}" for i in range(2 if products / loads == 2 / 3 else 4)}
    assert kinds == {1.0, 4 / 5, 2 / 3}


# ------------------------------------------------------------------ the choice


def chosen(monkeypatch: pytest.MonkeyPatch, wanted: str, **options: bool) -> amx_choice.AmxChoice:
    monkeypatch.setenv("REFIMPL_AMX", wanted)
    return amx_choice.choose_amx(choose_simd(), **options)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "off").text == "off (REFIMPL_AMX=off)"
    assert chosen(monkeypatch, "on", exact=True).text == "off (float32 activations)"
    with pytest.raises(InputError, match="'yes', expected one of on, off, emulate"):
        chosen(monkeypatch, "yes")
    for name in set(available()) - {"avx512"}:
        monkeypatch.setenv("REFIMPL_AMX", "emulate")
        assert f"these are {name}" in amx_choice.choose_amx(choose_simd(name)).reason


@needs_avx512
def test_a_processor_without_it_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx_choice, "cpu_features", lambda: frozenset({"amx-tile"}))
    made = chosen(monkeypatch, "on")
    assert made.unit is None and not made.failed
    assert made.reason == "this processor has no amx-bf16"


@needs_avx512
@pytest.mark.parametrize("wrong", ["", "AMX gave wrong products"])
def test_a_trial_decides_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str) -> None:
    tried: list[str] = []

    def trial() -> tuple[str, bool]:
        tried.append(wrong)
        return wrong, True

    monkeypatch.setattr(amx_choice, "cpu_features", lambda: frozenset({"amx-tile", "amx-bf16"}))
    monkeypatch.setattr(amx_choice, "request_permission", lambda: "")
    monkeypatch.setattr(amx_check, "_tried", trial)
    monkeypatch.setattr(amx_check, "_kept_at", lambda unit: tmp_path / "amx.json")
    for _ in range(2):
        amx_choice._usable.cache_clear()
        made = chosen(monkeypatch, "on")
        assert (made.unit is None, made.failed) == (bool(wrong), bool(wrong))
    assert len(tried) == 1
    amx_choice._usable.cache_clear()


def test_the_trial_is_lost_by_a_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the interpreter, a program that ends as an illegal instruction would end it."""
    monkeypatch.setattr(amx_check.sys, "executable", "/bin/sh")
    run = subprocess.run

    def killed(command: list[str], **options: object) -> object:
        return run([command[0], "-c", "kill -ILL $$"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(amx_check.subprocess, "run", killed)
    assert amx_check._tried() == ("AMX ended its trial with SIGILL", True)


@needs_avx512
def test_wrong_products_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amx_check.largest_error(EMULATED) == 0
    right = amx_check._products

    def shifted(function: object, weights: np.ndarray, x: np.ndarray, first: int) -> np.ndarray:
        made = right(function, weights, x, first)
        shifted.calls += 1  # type: ignore[attr-defined]
        return np.roll(made, shifted.calls % 2, axis=-1)  # type: ignore[attr-defined]

    shifted.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(amx_check, "_products", shifted)
    assert amx_check.largest_error(EMULATED) > 1e-3

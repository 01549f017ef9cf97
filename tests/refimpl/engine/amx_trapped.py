"""Code made for a processor with AMX, run on one without: what `test_amx_trap.py` starts.

`python amx_trapped.py PART JOB` handles tile instructions as `amx_trap` does, has the product's
compiled function replaced by the object code that JOB names, and prints what PART found, as JSON.
All else is the engine as it is, but that the processor is said to have AMX, and Linux to allow it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from amx_trap import Trap
from llvmlite import binding
from tile_products import products

from refimpl.engine import amx, amx_check, amx_choice, tiles
from refimpl.engine.memory import address, zeroed
from refimpl.engine.simd import choose_simd, cpu_features, sources_hash

UNITS = {name: amx.TileUnit(name, sources_hash()) for name in ("amx", "amx emulated")}
TILES, ROWS, COLUMNS, FIRST = (1, 2, 3, 5, 8), (1, 5, 15, 16, 17, 31, 32), (32, 96, 480), (0, 64)
_MARGIN = 64  # bytes around what a product may write


class _Loaded:
    """A compiled function out of an object file, in place of one that was compiled here."""

    _cache = None

    def __init__(self, path: str, symbol: str) -> None:
        machine = binding.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        self._engine.add_object_file(binding.ObjectFileRef.from_path(path))
        self._engine.finalize_object()
        self.address = self._engine.get_function_address(symbol)
        self.ctypes = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 11)(self.address)


def use(job: dict[str, Any]) -> None:
    """Let the engine take this for a processor with AMX, for which `job` has the code."""
    loaded, own = _Loaded(job["object"], job["symbol"]), amx.amx_multiplying
    made: Any = lambda unit: loaded if unit.real else own(unit)  # noqa: E731
    tiles.amx_multiplying = amx_check.amx_multiplying = made
    have = cpu_features() | {"amx-tile", "amx-bf16"}
    amx_choice.cpu_features = lambda: have
    amx_choice.request_permission = lambda: ""


def shapes(trap: Trap) -> dict[str, Any]:
    """All shapes of a call: bits, margins, products."""
    random, different, calls, predicted = np.random.default_rng(3), [], 0, 0
    for count in TILES:
        for rows in ROWS:
            for columns in COLUMNS:
                for first in FIRST:
                    made = _factors(random, count, rows, columns, first)
                    if not np.array_equal(*(_called(u, *made, first) for u in UNITS.values())):
                        different.append((count, rows, columns, first))
                    calls += 1
                    predicted += -(-count // 2) * columns // 32 * (4 if rows > 16 else 2)
    return {"different": different, "calls": calls, "predicted": predicted, **_found(trap)}


def _factors(random: Any, count: int, rows: int, columns: int, first: int) -> tuple[Any, Any]:
    """Bits of bfloat16 weights (tiles, their columns and rows in pairs) and rows of activations.
    Their sizes go from 2**-70 to 2**70, so that products are denormal as well, and too large."""

    def made(*shape: int) -> Any:
        values = random.standard_normal(shape).astype(np.float32)
        values *= np.exp2(random.choice([-70, 0, 0, 0, 0, 60], shape)).astype(np.float32)
        return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16))

    return made(count, columns // 2, 16, 2), made(rows, first + columns)


def _called(unit: amx.TileUnit, weights: Any, x: Any, first: int) -> Any:
    """The sums, with the bytes around them that must stay."""
    count, rows, columns = len(weights), len(x), x.shape[1] - first
    tile_bytes, extra = 32 * columns, amx.amx_scratch_bytes(columns)
    scratch = zeroed(amx.UNIT_TILES * tile_bytes + extra + _MARGIN)
    scratch[: count * tile_bytes] = weights.reshape(-1).view(np.uint8)
    scratch[-_MARGIN:] = 7
    y = np.ones((rows + 2, 16 * count + 2 * _MARGIN // 4), dtype=np.float32)
    places = np.array([address(row) for row in x], dtype=np.int64)
    function = tiles.amx_multiplying(unit)
    function.ctypes(address(scratch), tile_bytes, count, first, columns, x.shape[1],
                    address(places), rows, 0, address(y[1:]) + _MARGIN, y.strides[0])  # fmt: skip
    assert (scratch[-_MARGIN:] == 7).all()
    inner = y[1:-1, _MARGIN // 4 : -_MARGIN // 4].copy()
    y[1:-1, _MARGIN // 4 : -_MARGIN // 4] = 1
    assert (y == 1).all(), "written beside the sums"
    return inner.view(np.uint32)


def types(trap: Trap, stored: str, count: int) -> dict[str, Any]:
    """Stored rows of every type times `count` rows of activations, columns in two pieces."""
    simd, different, simd_types = choose_simd(), [], np.load(stored)
    for name, data in simd_types.items():
        columns = 512
        x = np.random.default_rng(4).standard_normal((count, columns)).astype(np.float32)
        made = [replace(tiles.tiling(simd, name, False, u), columns=256) for u in UNITS.values()]
        got, expected = (products(m, simd, data, x) for m in made)
        if not np.array_equal(got, expected):
            different.append(name)
    return {"different": different, "types": list(simd_types), **_found(trap)}


def prefill(trap: Trap, path: str, tokens: list[int], rows: int, threads: int) -> dict[str, Any]:
    """A file's prompt by way of the ordinary engine, trial in a process of its own included."""
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.engine.model import EngineModel

    logits, names, found = [], [], {}
    for choice in ("on", "emulate"):
        os.environ["REFIMPL_AMX"] = choice
        made = EngineModel(open_checkpoint(Path(path)), threads=threads, micro_batch=rows)
        names.append(made.description["amx"])
        logits.append(made.prefill(tokens, made.new_cache(len(tokens)), all_logits=True).logits)
        found = found or _found(trap)
    same, finite = np.array_equal(*logits), bool(np.isfinite(logits[0]).all())
    return {"same": same, "finite": finite, "choices": names, **found}


def _trap_trials(job_path: str) -> list[str]:
    """Let the trial of `refimpl.engine.amx_check` run with tile instructions handled; its commands
    as they are given."""
    commands: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(" ".join(command[1:]))
        return subprocess.run([sys.executable, __file__, "trial", job_path], **options)

    amx_check.subprocess = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    return commands


def trial(trap: Trap) -> dict[str, Any]:
    """What the trial runs, and which of the instructions it reaches."""
    return {"code": amx_check._main(), **_found(trap)}


def machine_code(trap: Trap, codes: dict[str, str]) -> dict[str, Any]:
    """Bytes of instructions, called with a configuration, a source, a target and a stride."""
    out: dict[str, Any] = {}
    for name, (code, changes) in codes.items():
        config, source, target = zeroed(64), np.arange(8192, dtype=np.uint8), zeroed(32768)
        config[0], config[16:32:2], config[48:56] = 1, 64, 16
        for at, value in changes:
            config[at] = value
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(bytes.fromhex(code))
        entry = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(entry)
        trap.forget()
        call(address(config), address(source), address(target) + 128, 192)
        out[name] = {"target": target.tolist() if changes == [] else [], **_found(trap)}
    return out


def _found(trap: Trap) -> dict[str, Any]:
    return {
        "counts": trap.counts(),
        "threads": trap.threads(),
        "configured": trap.configured(),
        "places": trap.places(),
        "faults": trap.faults(),
    }


def _main(part: str, path: str) -> None:
    job, trap = json.loads(Path(path).read_text()), Trap()
    use(job)
    if part == "trial":
        found = trial(trap)
        Path(job["trial"]).write_text(json.dumps(found))
        sys.exit(found["code"])
    out: dict[str, Any] = {"machine code": machine_code(trap, job["codes"])}
    trap.forget()
    out["shapes"] = shapes(trap)
    trap.forget()
    out["types"] = types(trap, job["stored"], job["count"])
    out["trials"] = _trap_trials(path)
    for name, file in job["files"].items():
        trap.forget()
        out[name] = prefill(trap, file, job["tokens"], job["rows"], job["threads"])
    print(json.dumps(out))


if __name__ == "__main__":
    _main(*sys.argv[1:])

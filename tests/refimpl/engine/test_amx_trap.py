"""Prefill with AMX as a processor that has it would run it, on one that does not.

The product's kernel is compiled for Sapphire Rapids by a process of its own, and that very object
code runs here: tile instructions, which are illegal on this processor, are done by a handler
(`amx_trap`) in a process that the tests start (`amx_trapped`), so that a crash is a failed test.
Against it stands the same kernel compiled with emulated instructions (`REFIMPL_AMX=emulate`), which
is written apart from the handler.
"""

import base64
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoints import micro

from refimpl.checkpoint.gguf_write import write_gguf
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.stored import StoredSource
from refimpl.checkpoint.synth import synthesize
from refimpl.engine.formats import FORMATS
from refimpl.engine.simd import available, cpu_features
from refimpl.engine.tiles import MANY
from refimpl.inventory import inventory

if not sys.platform.startswith("linux") or available()[0] != "avx512":
    pytest.skip("x86-64 Linux with AVX512, on which AMX is put", allow_module_level=True)
if "amx-tile" in cpu_features():
    pytest.skip("this processor has AMX: nothing to handle", allow_module_level=True)

HERE = Path(__file__).parent
# What LLVM knows of Sapphire Rapids, and so what the engine is compiled with there.
FEATURES = (
    "64bit adx aes amx-bf16 amx-int8 amx-tile avx avx2 avx512bf16 avx512bitalg avx512bw "
    "avx512cd avx512dq avx512f avx512fp16 avx512ifma avx512vbmi avx512vbmi2 avx512vl "
    "avx512vnni avx512vpopcntdq avxvnni bmi bmi2 cldemote clflushopt clwb cmov crc32 cx16 cx8 "
    "enqcmd f16c fma fsgsbase fxsr gfni invpcid lzcnt mmx movbe movdir64b movdiri pclmul "
    "pconfig pku popcnt prfchw ptwrite rdpid rdrnd rdseed sahf serialize sha shstk sse sse2 "
    "sse3 sse4.1 sse4.2 ssse3 tsxldtrk uintr vaes vpclmulqdq waitpkg wbnoinvd xsave xsavec "
    "xsaveopt xsaves"
)
COMPILE = """
import base64, json
from refimpl.engine.amx import TileUnit, amx_multiplying
from refimpl.engine.simd import sources_hash
made = amx_multiplying(TileUnit("amx", sources_hash()))
code = base64.b64encode(made._library._get_compiled_object()).decode()
print(json.dumps([made.native_name, code]))
"""
TILED = [name for name in FORMATS if name not in ("F32", "F16")]
COUNT = 45  # rows of activations: 32 and 13
TOKENS, ROWS, THREADS = 75, 45, 3  # steps of 45 rows, 32 and 13, and of 30

CONFIGURE, RELEASE = "c4e2784907", "c4e27849c0"
DOT_1_2, DOT_1_1 = "c4e26a5cc1", "c4e2725cc1"  # tile 0 += tile 1 x tile 2, or x tile 1
RETURN = "c3"
MOVES = (
    (
        CONFIGURE + "4989f2" + "4989c9"
        "c4827b4b5c4a40"  # tileloadd 64(r10, 2 r9), tile 3; r10 = source, r9 = stride
        "c4e27a4b5c0a80"  # tilestored tile 3, -128(target, stride)
        "c4e2794b8c2600100000"  # tileloaddt1 4096(source), tile 1: no stride
        "c4e27a4b8c0a00200000"  # tilestored tile 1, 8192(target, stride)
        "c4e27949844a00400000"  # sttilecfg 16384(target, 2 stride)
        "c4e27b49d8"  # tilezero tile 3
        "c4e27a4b9c0a00500000"  # tilestored tile 3, 20480(target, stride)
    )
    + RELEASE
    + RETURN
)
Changes = list[tuple[int, int]]  # of the configuration: byte, value; else eight whole tiles
WRONG: dict[str, tuple[str, Changes]] = {
    "tilezero at : #UD: tiles are not configured": ("c4e27b49c0", []),
    "ldtilecfg at : #GP: reserved bytes or palette": (CONFIGURE, [(0, 2)]),
    "ldtilecfg at : #GP: reserved bytes or palette, too": (CONFIGURE, [(40, 1)]),
    "ldtilecfg at : #GP: shape of a tile": (CONFIGURE, [(50, 17)]),
    "ldtilecfg at : #GP: shape of a tile, too": (CONFIGURE, [(55, 0)]),
    "ldtilecfg at : start row is not 0": (CONFIGURE, [(1, 1)]),
    "tdpbf16ps at : #UD: the same tile twice": (CONFIGURE + DOT_1_1, []),
    "tdpbf16ps at : #UD: shapes do not fit": (CONFIGURE + DOT_1_2, [(49, 4)]),
    "tdpbf16ps at : #UD: shapes do not fit, too": (CONFIGURE + DOT_1_2, [(50, 4)]),
    "tilezero at : #UD: tile without shape": (CONFIGURE + "c4e27b49f0", [(28, 0), (54, 0)]),
}  # fmt: skip


def python(code: list[str], **environment: str) -> str:
    """Standard output of an interpreter; its standard error where it fails."""
    done = subprocess.run(
        [sys.executable, *code], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=600,  # seconds are needed; an instruction that is tried for ever has no end
    )  # fmt: skip
    assert done.returncode == 0, f"code {done.returncode}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The product for Sapphire Rapids: its symbol and object code."""
    out = python(
        ["-c", COMPILE],
        NUMBA_CPU_NAME="sapphirerapids",
        NUMBA_CPU_FEATURES=",".join("+" + name for name in FEATURES.split()),
        NUMBA_CACHE_DIR=str(tmp_path_factory.mktemp("kernels")),
    )
    symbol, code = json.loads(out)
    return symbol, base64.b64decode(code)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose rows fill blocks of 256, all experts selected, by type."""
    root = tmp_path_factory.mktemp("models")
    wide = micro(
        hidden_size=256, intermediate_size=256, moe_intermediate_size=256, share_expert_dim=256,
        head_dim=64, num_attention_heads=4, sliding_attention_heads=8, num_attention_groups=1,
        moe_top_k=4,
    )  # fmt: skip
    synthesize(wide, 1, root / "wide", "f32")
    made = {name: root / f"{name}.gguf" for name in ("q4_0", "q4_k_s")}
    for name, path in made.items():
        write_gguf(open_checkpoint(root / "wide"), path, name)
    return made


@pytest.fixture(scope="module")
def found(
    kernel: tuple[str, bytes],
    files: dict[str, Path],
    stored_rows: Callable[[str, int, int], tuple[np.ndarray, np.ndarray]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the processes with handled instructions have found."""
    root = tmp_path_factory.mktemp("trap")
    (root / "kernel.o").write_bytes(kernel[1])
    np.savez(root / "stored.npz", **{name: stored_rows(name, 112, 512)[0] for name in TILED})
    wrong = {name: (code + RELEASE + RETURN, changes) for name, (code, changes) in WRONG.items()}
    job = {
        "object": str(root / "kernel.o"), "symbol": kernel[0], "stored": str(root / "stored.npz"),
        "count": COUNT, "files": {name: str(path) for name, path in files.items()},
        "tokens": np.random.default_rng(0).integers(0, 288, TOKENS).tolist(), "rows": ROWS,
        "threads": THREADS, "trial": str(root / "trial.json"),
        "codes": {"moves": (MOVES, []), **wrong},
    }  # fmt: skip
    (root / "job.json").write_text(json.dumps(job))
    shared = str(HERE.parents[1] / "shared")
    path = os.pathsep.join(filter(None, (shared, os.environ.get("PYTHONPATH"))))
    out = python(
        ["-X", "faulthandler", str(HERE / "amx_trapped.py"), "all", str(root / "job.json")],
        PYTHONPATH=path,
        REFIMPL_SIMD="avx512",
    )
    return {**json.loads(out), "trial": json.loads((root / "trial.json").read_text())}


# ------------------------------------------------------------------ the handler


def test_instructions_move_what_they_say(found: dict[str, Any]) -> None:
    """Base, index, scale and displacement; rows apart; configuration written back."""
    made = found["machine code"]["moves"]
    target = np.array(made["target"], dtype=np.uint8)
    source = np.arange(8192, dtype=np.uint8)

    def tile(at: int) -> np.ndarray:
        return np.array([target[at + 192 * r : at + 192 * r + 64] for r in range(16)])

    np.testing.assert_array_equal(
        tile(0), [source[64 + 384 * r : 128 + 384 * r] for r in range(16)]
    )
    np.testing.assert_array_equal(tile(128 + 8192), [source[4096:4160]] * 16)
    at = 128 + 16384 + 2 * 192
    assert target[at : at + 64].tolist() == (
        [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
    )
    assert not target[128 + 20480 :].any()
    assert made["faults"] == [0, ""]
    assert made["counts"] == {
        "ldtilecfg": 1, "sttilecfg": 1, "tilerelease": 1, "tilezero": 1, "tileloadd": 1,
        "tileloaddt1": 1, "tilestored": 3, "tdpbf16ps": 0,
    }  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_the_processor_refuses_is_a_fault(found: dict[str, Any], fault: str) -> None:
    number, text = found["machine code"][fault]["faults"]
    kind, _, rest = text.partition(" at ")
    assert number == 1
    assert f"{kind} at :{rest.partition(':')[2]}" == fault.removesuffix(", too")


# ------------------------------------------------------------------ the kernel


def test_every_shape_gives_the_bits_of_the_emulation(found: dict[str, Any]) -> None:
    """1 to 8 tiles, 1 to 32 rows, columns in one and several turns of a loop, sums begun or gone
    on with; nothing is written beside them."""
    assert found["shapes"]["different"] == []


def test_every_type_gives_the_bits_of_the_emulation(found: dict[str, Any]) -> None:
    """As the engine calls it: 7 tiles, columns in two pieces, COUNT rows."""
    assert found["types"]["types"] == TILED
    assert found["types"]["different"] == []


PARTS = ("shapes", "types", "q4_0", "q4_k_s", "trial")


@pytest.mark.parametrize("part", PARTS)
def test_the_processor_would_raise_no_fault(found: dict[str, Any], part: str) -> None:
    assert found[part]["faults"] == [0, ""]


@pytest.mark.parametrize("part", PARTS)
def test_tiles_are_given_up_after_each_call(found: dict[str, Any], part: str) -> None:
    counts = found[part]["counts"]
    assert counts["ldtilecfg"] == counts["tilerelease"] > 0
    assert found[part]["configured"] == 0
    assert counts["sttilecfg"] == counts["tileloaddt1"] == 0


# VEX.128.0F38.W0 with one of three opcodes, which no other instructions have
TILE_INSTRUCTION = re.compile(rb"\xc4[\x82\xa2\xc2\xe2][\x00-\x7f](\x49|\x4b|\x5c)", re.DOTALL)


@pytest.mark.parametrize("part", ["shapes", "trial"])
def test_every_tile_instruction_of_the_code_was_run(
    found: dict[str, Any], kernel: tuple[str, bytes], part: str
) -> None:
    """By the trial too that decides whether AMX is used: it has seen all that prefill will run."""
    opcodes = Counter(TILE_INSTRUCTION.findall(kernel[1]))
    assert opcodes[b"\x5c"] >= 6  # products
    assert found[part]["places"] == opcodes.total()


def tile_products(rows: int, columns: int, tokens: int) -> int:
    """TDPBF16PS of a matrix (rows, columns) with `tokens` rows of activations, 16 x 16 sums and 32
    columns each: tiles of 16 rows go in pairs or fours within units of 128, an odd one twice, rows
    of activations in panels of 32 and a last one of up to 16."""
    units = [min(128, rows - at) // 16 for at in range(0, rows, 128)]
    pairs = sum(-(-tiles // 2) for tiles in units)
    last = tokens % 32
    return pairs * columns // 32 * (tokens // 32 * 4 + (4 if last > 16 else 2 * (last > 0)))


def test_products_are_as_many_as_tiles_say(found: dict[str, Any]) -> None:
    counts = found["shapes"]["counts"]
    assert counts["tdpbf16ps"] == found["shapes"]["predicted"]
    assert counts["ldtilecfg"] == found["shapes"]["calls"]
    assert found["types"]["counts"]["tdpbf16ps"] == len(TILED) * tile_products(112, 512, COUNT)


def test_the_trial_is_made_once_and_passed(found: dict[str, Any]) -> None:
    """In a process of its own, when the first engine is opened."""
    assert found["trials"] == ["-P -m refimpl.engine.amx_check"]
    assert found["trial"]["code"] == 0


# ------------------------------------------------------------------ the engine


def prefill_products(path: Path) -> tuple[int, set[str]]:
    """TDPBF16PS of a prefill with logits of all rows, from the file's tensors, and their types."""
    source = open_checkpoint(path)
    assert isinstance(source, StoredSource)
    config, total, types = source.config, 0, set()
    for spec in inventory(config):
        own = spec.key == "lm_head" if spec.layer is None else spec.layer < config.num_hidden_layers
        if not own or len(spec.shape) < 2:
            continue
        kind = source.stored(spec.key, spec.layer).kind.name
        if kind in TILED:
            *stack, rows, columns = spec.shape
            each = sum(tile_products(rows, columns, t) for t in (ROWS, TOKENS - ROWS))
            total += int(np.prod(stack, initial=1)) * each
            types |= {kind} if rows >= 16 else set()
    return total, types


@pytest.mark.parametrize("name", ["q4_0", "q4_k_s"])
def test_prefill_has_the_bits_of_the_emulation(found: dict[str, Any], name: str) -> None:
    made = found[name]
    assert made["choices"] == [
        "amx (checked on this processor)", "amx emulated (REFIMPL_AMX=emulate)"
    ]  # fmt: skip
    assert made["finite"] and made["same"]


@pytest.mark.parametrize("name", ["q4_0", "q4_k_s"])
def test_prefill_multiplies_all_matrices_with_tiles(
    found: dict[str, Any], files: dict[str, Path], name: str
) -> None:
    assert min(ROWS, TOKENS - ROWS) >= MANY
    total, types = prefill_products(files[name])
    assert {"q4_0": "Q4_0", "q4_k_s": "Q4_K"}[name] in types
    counts = found[name]["counts"]
    assert counts["tdpbf16ps"] == total
    assert min(counts["tilezero"], counts["tilestored"], counts["tileloadd"]) > 0
    assert 2 <= found[name]["threads"] <= THREADS

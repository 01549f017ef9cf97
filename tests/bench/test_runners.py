"""Runners: the flags they pass, the records they read, and what they say when a program fails."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.runners.base import Measurement, RunnerError, RunnerTest
from bench.runners.llamacpp import LlamaBenchRunner, find_llama_bench
from bench.runners.refimpl import RefimplRunner

Program = Callable[..., Path]
HELP = """  -fa, --flash-attn <on|off|auto>  -lm, --load-mode <auto|none|mmap>  --repack <0|1>"""
OLD_HELP = """  -fa, --flash-attn <0|1>   -mmp, --mmap <0|1>"""


def a_record(argv: list[str]) -> dict[str, object]:
    """One test as llama-bench of 2026 prints it, shortened."""
    return {
        "build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "backends": "CPU",
        "model_filename": "/somewhere/model.gguf", "model_type": "step35 ?B Q4_0",
        "model_size": 14160512, "model_n_params": 22850064, "n_threads": 2, "type_k": "f16",
        "repack": True, "n_prompt": 0, "n_gen": 16, "n_depth": 0, "avg_ns": 3514572,
        "stddev_ns": 148550, "avg_ts": 4557.772859, "stddev_ts": 188.056674,
        "samples_ns": [3686022, 3433023, 3424672], "samples_ts": [4340.72, 4660.62, 4671.98],
        "argv": argv,
    }  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A stand-in for llama-bench: prints `help`, a version, or the record; or does `instead`."""

    def make(help: str = HELP, instead: str = "") -> Path:
        path = tmp_path / "llama-bench"
        text = json.dumps(a_record([]))
        path.write_text(
            f"#!{sys.executable}\n"
            "import json, os, sys\n"
            f"if '--help' in sys.argv: print({help!r}); sys.exit()\n"
            "if '--version' in sys.argv:\n"
            "    print('version: 0.5.0-dev (build 1, commit 0c1e570)', file=sys.stderr)\n"
            "    sys.exit()\n"
            f"{instead}\n"
            f"record = {{**json.loads({text!r}), 'argv': sys.argv[1:]}}\n"
            "print(json.dumps([record]))\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


TEST = RunnerTest(Path("/models/m.gguf"), n_gen=16, n_depth=32, repetitions=3, threads=2)


def test_llama_bench_is_asked_for_the_test_and_its_samples_are_read(program: Program) -> None:
    found = LlamaBenchRunner(program()).measure(TEST)
    assert found.record["argv"] == [
        "-m", "/models/m.gguf", "-p", "0", "-n", "16", "-d", "32", "-r", "3", "-t", "2",
        "-o", "json",
    ]  # fmt: skip
    assert found.samples_ts == (4340.72, 4660.62, 4671.98)
    assert found.samples_ns == (3686022, 3433023, 3424672)
    assert found.median_ts == 4660.62
    assert (found.engine, found.build) == ("llama.cpp", "0c1e570")
    assert found.record["model_filename"] == "model.gguf"  # no folder of this machine


def test_kv_type_and_micro_batch_are_passed_on(program: Program) -> None:
    test = RunnerTest(Path("m"), n_prompt=512, kv_type="q8_0", micro_batch=128)
    argv = " ".join(LlamaBenchRunner(program()).measure(test).record["argv"])
    assert "-ctk q8_0 -ctv q8_0 -ub 128" in argv and "-p 512 -n 0" in argv


@pytest.mark.parametrize(
    ("variant", "new", "old"),
    [
        ("default", (), ()),
        ("no-repack", ("--repack", "0"), None),
        ("fa-off", ("-fa", "off"), ("-fa", "0")),
        ("fa-on", ("-fa", "on"), ("-fa", "1")),
        ("no-mmap", ("-lm", "none"), ("-mmp", "0")),
    ],
)
def test_variants_are_spelled_as_the_version_spells_them(
    program: Program, variant: str, new: tuple[str, ...], old: tuple[str, ...] | None
) -> None:
    assert LlamaBenchRunner(program(HELP), variant).flags == new
    runner = LlamaBenchRunner(program(OLD_HELP), variant)
    if old is None:
        with pytest.raises(RunnerError, match=f"no variant '{variant}'"):
            _ = runner.flags
    else:
        assert runner.flags == old


def test_name_and_version(program: Program) -> None:
    runner = LlamaBenchRunner(program(), "no-repack", "no-amx")
    assert runner.name == "llama.cpp no-amx no-repack"
    assert runner.version == "0.5.0-dev (build 1, commit 0c1e570)"


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        ("sys.exit('cannot load')", "ended with 1: cannot load"),
        ("os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("print('hello'); sys.exit()", "printed no JSON list with one record: 'hello"),
        ("print('[]'); sys.exit()", "no JSON list with one record"),
        ("print('[{}]'); sys.exit()", "no usable samples"),
        ("print(json.dumps([{'model_filename': 'm', 'samples_ts': [-1.0], 'samples_ns': [1]}]))\n"
         "sys.exit()", "no usable samples"),
    ],
)  # fmt: skip
def test_programs_that_fail_give_one_sentence(program: Program, instead: str, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        LlamaBenchRunner(program(instead=instead)).measure(TEST)


@pytest.mark.parametrize(
    "test",
    [
        RunnerTest(Path("m"), n_gen=8, mtp="1"),
        RunnerTest(Path("m"), n_gen=8, n_rows=2),
        RunnerTest(Path("m"), n_gen=8, n_depth=64, synthetic_kv=True),
    ],
)
def test_what_llama_bench_cannot_do_is_refused(program: Program, test: RunnerTest) -> None:
    with pytest.raises(RunnerError, match="llama-bench"):
        LlamaBenchRunner(program()).measure(test)


def test_programs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunnerError, match="no such program"):
        find_llama_bench(str(tmp_path / "llama-bench"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_bench(None) is None
    with pytest.raises(RunnerError, match="expected default, no-repack"):
        LlamaBenchRunner(tmp_path, "turbo")
    with pytest.raises(RunnerError, match="cannot be started"):
        LlamaBenchRunner(tmp_path / "llama-bench").measure(TEST)


def test_refimpl_is_measured_in_a_process_of_its_own() -> None:
    runner = RefimplRunner(backend="reference")
    test = RunnerTest(Path("mini"), n_gen=2, repetitions=2)
    found = runner.measure(test)
    assert runner.name == "refimpl reference"
    assert len(found.samples_ts) == len(found.samples_ns) == 2
    for speed, ns in zip(found.samples_ts, found.samples_ns, strict=True):
        assert speed == pytest.approx(2e9 / ns)
    assert found.record["n_gen"] == 2 and found.record["backend"] == "reference"
    with pytest.raises(RunnerError, match="no such file"):
        runner.measure(RunnerTest(Path("/nowhere/m.gguf"), n_gen=2))


def test_measurements_without_speeds_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Measurement("e", "1", "", (), ())
    with pytest.raises(ValueError, match="positive"):
        Measurement("e", "1", "", (float("inf"),), (0,))

"""`refimpl generate` and `refimpl golden dump` on the engine: the default for GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.slice import write_random
from refimpl.checkpoint.synth import tiny_a
from refimpl.cli import main
from refimpl.engine.simd import choose_simd
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace

IDS = [5, 17, 300, 4, 9, 12, 44, 100]


@pytest.fixture(scope="module")
def gguf(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("engine") / "tiny.gguf")
    assert run("convert", str(tiny_dir("tiny_a")), out, "--type", "q8_0").exit_code == 0
    return out


@pytest.fixture
def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(IDS))
    return str(path)


def run(*args: str) -> Result:
    done = CliRunner().invoke(main, args)
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done


def run_json(*args: str) -> dict[str, Any]:
    done = run("generate", *args, "--json", "--max-new-tokens", "12")
    assert done.exit_code == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_files_run_on_the_engine_and_the_output_says_so(gguf: str, ids: str) -> None:
    record = run_json("--tokens", ids, "--model", gguf, "--threads", "2")
    assert record["backend"] == "engine"
    described = record["engine"]
    assert described["threads"] == 2 and described["kv_type"] == "f16"
    done = run("generate", "--tokens", ids, "--model", gguf, "--max-new-tokens", "3")
    assert "refimpl: backend: engine (" in done.stderr


def test_folders_and_named_arithmetic_run_on_the_reference(
    gguf: str, ids: str, tiny_dir: Callable[[str], Path]
) -> None:
    for more in (("--model", str(tiny_dir("tiny_a"))), ("--model", gguf, "--dtype", "float64")):
        record = run_json("--tokens", ids, *more)
        assert record["backend"] == "reference"
        assert "engine" not in record and record["dtype"]


def test_the_engine_has_activations_instead_of_a_dtype(gguf: str, ids: str) -> None:
    record = run_json("--tokens", ids, "--model", gguf)
    expected = "int8" if choose_simd(None).integer else "float32"
    assert record["dtype"] is None and record["engine"]["activations"] == expected


def test_exact_text_is_the_references_with_any_drafts(gguf: str, ids: str) -> None:
    args = ("--tokens", ids, "--model", gguf)
    expected = run_json(*args, "--backend", "reference")["ids"]
    for more in (("--mtp", "0"), ("--mtp", "3"), ("--mtp", "auto", "--threads", "1")):
        assert run_json(*args, "--exact", *more)["ids"] == expected


def test_a_type_without_kernels_is_refused_and_nothing_else_is_run(
    tmp_path: Path, ids: str
) -> None:
    path = tmp_path / "old.gguf"
    write_random(tiny_a(), path, "q4_1", 1)
    done = run("generate", "--tokens", ids, "--model", str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "type Q4_1, which the engine has no kernels for" in done.stderr
    assert "tensor blk.0." in done.stderr and "--backend reference" in done.stderr
    assert run_json("--tokens", ids, "--model", str(path), "--backend", "reference")["ids"]


def test_statistics_count_what_the_reference_counts(gguf: str, ids: str) -> None:
    args = ("--tokens", ids, "--model", gguf, "--stats", "--exact", "--mtp", "0")
    record = run_json(*args)
    stats, new = record["stats"], record["ids"]
    model, trace = ReferenceModel(open_checkpoint(gguf)), Trace()
    cache = model.new_cache(64)
    model.prefill(IDS, cache)
    for token in new[:-1]:
        model.decode([token], cache, trace)
    read = sum(size for role, size in trace.weight_bytes.items() if role != "embedding")
    assert stats["steps"] == trace.steps == 11
    assert stats["weight_bytes_per_token"] == read / 11
    assert stats["expert_bytes_per_token"] == trace.weight_bytes["routed"] / 11
    assert stats["kv_bytes_per_token"] == 4 * trace.kv_values_read / 11
    assert stats["bytes_per_s"] > 0 and stats["read_limit_bytes_per_s"] > 0
    assert stats["expert_hit_rate"] is None or 0 <= stats["expert_hit_rate"] <= 1
    if (memory := stats["resident"]) is not None:  # Linux
        assert memory.pop("total_bytes") == sum(memory.values())
        assert all(size > 0 for size in memory.values())
    done = run("generate", *args, "--max-new-tokens", "3")
    assert ("libraries and all else" in done.stderr) == (memory is not None)
    assert "read per token" in done.stderr and "that memory gives these threads" in done.stderr


def test_simulated_acceptance_is_labelled(gguf: str, ids: str) -> None:
    args = ("--tokens", ids, "--model", gguf, "--mtp", "3", "--simulate-acceptance", "1,1,0")
    record = run_json(*args)
    assert record["simulated_acceptance"] == [1.0, 1.0, 0.0]
    assert record["mtp"]["accepted_by_position"][2] == 0
    assert record["mtp"]["accepted"] >= record["mtp"]["steps"]
    assert "drafts stand at simulated rates 1,1,0" in run("generate", *args).stderr


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (("--simulate-acceptance", "2"), "expected 1 to 3 chances from 0 to 1"),
        (("--simulate-acceptance", "a,b"), "expected 1 to 3 chances from 0 to 1"),
        (("--simulate-acceptance", ".9,.9,.9,.9"), "expected 1 to 3 chances"),
        (("--backend", "engine", "--dtype", "bf16"), "--dtype bf16 belongs to the reference"),
        (("--backend", "reference", "--exact"), "--exact belongs to the engine"),
        (("--backend", "reference", "--kv-type", "f16"), "--kv-type belongs to the engine"),
        (("--backend", "reference", "--stats"), "--stats measures the engine"),
        (("--threads", "0"), "threads is 0, expected 1"),
        (("--threads", "1000"), "threads is 1000, expected 1 to 256"),
    ],
)
def test_bad_options_get_a_sentence(gguf: str, ids: str, args: tuple[str, ...], cause: str) -> None:
    done = run("generate", "--tokens", ids, "--model", gguf, *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert cause in done.stderr


@pytest.mark.parametrize("bad", ["[320]", "[-1]", "[99999999999999999999]"])
def test_ids_out_of_range_get_a_sentence(gguf: str, tmp_path: Path, bad: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(bad)
    done = run("generate", "--tokens", str(path), "--model", gguf)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1 and "error: " in done.stderr


def test_golden_files_of_both_backends_are_equal(gguf: str, ids: str, tmp_path: Path) -> None:
    mine, theirs = str(tmp_path / "engine.npz"), str(tmp_path / "reference.npz")
    args = ("golden", "dump", "--model", gguf, "--tokens", ids, "--new", "4", "--out")
    assert run(*args, mine, "--backend", "engine", "--exact").exit_code == 0
    assert run(*args, theirs).exit_code == 0
    done = run("golden", "compare", theirs, mine)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "equal within 5e-05")


def test_a_seed_repeats_a_text_unless_drafts_follow_measured_times(gguf: str, ids: str) -> None:
    args = ("--tokens", ids, "--model", gguf, "--temperature", "1.5", "--seed", "7")
    assert run_json(*args, "--mtp", "2")["ids"] == run_json(*args, "--mtp", "2")["ids"]
    told = run("generate", *args, "--max-new-tokens", "2").stderr
    assert "with --mtp auto a seed does not repeat a text" in told


def test_a_sparse_file_is_small_and_runs(tmp_path: Path, ids: str) -> None:
    out = tmp_path / "sparse.gguf"
    sizes = ("--experts", "8", "--vocab", "512", "--type", "q4_0")
    assert run("synth", str(out), "--preset", "slice", "--sparse", *sizes).exit_code == 0
    assert out.stat().st_size > 100 * 512 * out.stat().st_blocks
    record = run_json("--tokens", ids, "--model", str(out), "--temperature", "1", "--seed", "3")
    assert len(set(record["ids"])) > 6  # a head of zeros: every token is as probable
    done = run("synth", str(tmp_path / "tiny.gguf"), "--sparse")
    assert done.exit_code == 2 and "--sparse goes with slice and published" in done.stderr

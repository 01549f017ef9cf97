"""A model that is larger than the memory it may use: same bits, bounded memory, sentences."""

import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.slice import write_random
from refimpl.checkpoint.stored import StoredSource
from refimpl.checkpoint.synth import tiny_a
from refimpl.cli import main
from refimpl.engine import budget, disk, memory
from refimpl.engine.disk import BLOCK, DirectFile, Readers, slice_speed, span, supported
from refimpl.engine.expert_files import expert_slices, shared_parts, slot_bytes
from refimpl.engine.expert_slots import minimal_slots
from refimpl.engine.memory import own_bytes
from refimpl.engine.model import EngineModel
from refimpl.engine.residency import Residency
from refimpl.errors import CheckpointError, InputError

pytestmark = pytest.mark.skipif(not supported(), reason="the system cannot read into memory")
CONTEXT = 64
TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 40)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_a` with 64 experts of whole blocks: a step of four rows uses half of them at most."""
    path = tmp_path_factory.mktemp("residency") / "model.gguf"
    config = dataclasses.replace(tiny_a(), moe_num_experts=64)
    write_random(config, path, "q4_0", 1)
    return path


@pytest.fixture
def source(model_file: Path) -> Iterator[StoredSource]:
    opened = open_checkpoint(model_file)
    yield opened
    opened.close()


def with_slots(source: StoredSource, slots: int, **options: int) -> EngineModel:
    """An engine with so many slots beside a context of 64 tokens, as if there were no memory for
    more."""
    model = EngineModel(source, **options)
    assert model.residency is None
    beside = -(-model.cache_bytes(CONTEXT) // slot_bytes(source))
    model.residency = Residency(model.program, source, slots + beside)
    return model


def logits(model: EngineModel) -> bytes:
    """Those of a prompt in one chunk, of single tokens and of a verification."""
    cache = model.new_cache(CONTEXT)
    parts = [model.prefill(TOKENS[:24], cache, all_logits=True)]
    parts += [model.decode([token], cache) for token in TOKENS[24:36]]
    parts.append(model.decode(TOKENS[36:40], cache))
    return b"".join(step.logits.tobytes() for step in parts)


@pytest.mark.parametrize(("threads", "rows"), [(1, 4), (2, 4), (3, 4), (2, 24)])
def test_residency_changes_no_bit(source: StoredSource, threads: int, rows: int) -> None:
    """Few slots, so that every expert is read, evicted and read again; in prefill of many rows,
    slots for one layer's experts."""
    plain = EngineModel(source, threads=threads, micro_batch=rows)
    expected = logits(plain)
    plain.close()
    few = 40 if rows == 4 else source.config.moe_num_experts
    model = with_slots(source, few, threads=threads, micro_batch=rows)
    assert model.residency is not None
    assert logits(model) == expected
    seen = model.residency.traffic
    assert 0 < seen.found < seen.chosen
    assert seen.bytes_read >= seen.chosen_bytes - seen.found_bytes
    assert seen.busy_s > 0
    model.close()


def test_what_is_held_is_not_read_again(source: StoredSource) -> None:
    moe = sum(spec.is_moe for spec in source.config.layers)
    model = with_slots(source, moe * source.config.moe_num_experts)
    assert model.residency is not None
    for _ in range(2):
        cache = model.new_cache(CONTEXT)
        model.decode([5], cache)
        before = model.residency.traffic
        del cache
    after = model.residency.traffic
    assert after.found * 2 == after.chosen
    assert after.bytes_read == before.bytes_read
    model.close()


def test_the_least_recently_used_expert_gives_way(source: StoredSource) -> None:
    """With slots for one step's experts of all layers, the same token twice reads nothing the
    second time; after many others it does again."""
    moe = sum(spec.is_moe for spec in source.config.layers)
    model = with_slots(source, max(moe * source.config.moe_top_k, minimal_slots(source.config)))
    assert model.residency is not None

    def missed(token: int) -> int:
        before = model.residency.traffic  # type: ignore[union-attr]
        model.decode([token], model.new_cache(CONTEXT))
        after = model.residency.traffic  # type: ignore[union-attr]
        return after.chosen - after.found - before.chosen + before.found

    missed(5)
    assert missed(5) == 0
    for token in range(40, 60):
        missed(token)
    assert missed(5) > 0
    model.close()


def test_without_direct_reads_or_advice_the_bits_are_the_same(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without direct reads, and a system that refuses madvise and mlock."""
    plain = EngineModel(source, micro_batch=4)
    expected = logits(plain)
    plain.close()
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(disk, "_HUGE_PAGES", -1)

    class Refusing:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    model = with_slots(source, minimal_slots(source.config))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Refusing())
    seen: list[tuple[int, int]] = []
    assert model.read_ahead(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert logits(model) == expected
    model.close()


def test_shared_parts_and_experts_make_up_the_file(source: StoredSource, model_file: Path) -> None:
    """Every byte of an expert lies in a slice; the rest, in whole pages, is shared."""
    model = EngineModel(source)
    covered = np.zeros(model_file.stat().st_size, dtype=bool)
    for path, offset, length in expert_slices(source):
        assert Path(path) == model_file
        assert not covered[offset : offset + length].any()
        covered[offset : offset + length] = True
    experts = int(covered.sum())
    assert experts == sum(t.rows.nbytes for t in source.tensors if t.spec.is_stacked)
    for _, start, length in shared_parts(source, model.files):
        assert start % BLOCK == 0
        covered[start : start + length] = True
    assert covered.all()
    model.close()


def test_a_step_has_no_more_rows_than_memory_has_experts_for(source: StoredSource) -> None:
    k = source.config.moe_top_k
    model = with_slots(source, 6 * k)
    assert model.residency is not None
    cache = model.new_cache(CONTEXT)
    assert model.residency.max_rows == 6
    model.prefill(TOKENS[:20], cache)
    assert sum(model.program.runs.values()) == 4
    model.close()


def test_a_context_takes_the_place_of_experts_and_gives_it_back(source: StoredSource) -> None:
    least = minimal_slots(source.config)
    model = with_slots(source, least)
    residency = model.residency
    assert residency is not None
    beside = residency.slots - least
    logits(model)
    cache = model.new_cache(CONTEXT)
    assert residency.slots == least
    with pytest.raises(InputError, match=rf"leave room for 0 experts .* a step needs {least} of"):
        residency.make_room(least * residency.slot_bytes)
    assert residency.slots == least
    del cache
    assert residency.slots == least + beside
    logits(model)
    model.close()


def test_memory_is_divided_with_the_arithmetic(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is allowed, less what the process has, the shared parts and working memory."""
    monkeypatch.setattr(budget, "own_bytes", lambda: 0)
    plain = EngineModel(source, micro_batch=4)
    size = sum(file.size for file in plain.files)
    shared = sum(length for _, _, length in shared_parts(source, plain.files))
    working = sum(part.nbytes for part in plain.working_memory())
    plain.close()
    allowed = shared + working + 40 * slot_bytes(source)
    assert allowed < size
    model = EngineModel(source, micro_batch=4, memory_bytes=allowed)
    assert model.residency is not None and model.residency.slots == 40
    assert model.description["experts_held"] == 40
    model.close()
    with pytest.raises(InputError, match=r"cannot be left on disk with less than .* for \d+ exp"):
        EngineModel(source, micro_batch=4, memory_bytes=shared)
    with pytest.raises(InputError, match=r"fit the 3\.5 kB that 3\.5 kB leave .* kB for \d+ e"):
        EngineModel(source, micro_batch=4, memory_bytes=3500)
    model = EngineModel(source, micro_batch=4, memory_bytes=size)
    assert model.residency is None
    model.close()
    monkeypatch.setattr(budget, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"may be used, but only .* are free; allow less"):
        EngineModel(source, micro_batch=4, memory_bytes=allowed)


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without memory of its own, so that every byte is the model's."""
    monkeypatch.setattr(budget, "own_bytes", lambda: 0)
    monkeypatch.setattr(memory, "own_bytes", lambda: 0)


@pytest.mark.usefixtures("nothing_else")
def test_more_memory_never_holds_fewer_experts(source: StoredSource) -> None:
    """From what a step needs beside a context up to all of it, each value works; there is no gap
    where the model fits, but its context does not fit beside it."""
    plain = EngineModel(source, micro_batch=4)
    expected, caches = logits(plain), plain.cache_bytes(CONTEXT)
    size, each = sum(file.size for file in plain.files), slot_bytes(source)
    shared = sum(length for _, _, length in shared_parts(source, plain.files))
    working = sum(part.nbytes for part in plain.working_memory())
    plain.close()
    beside = -(-caches // each)
    least = shared + working + (minimal_slots(source.config) + beside) * each
    held = []
    for allowed in (least, (least + size) // 2, size - 1, size, size + caches - 1, size + caches):
        model = EngineModel(source, micro_batch=4, memory_bytes=allowed)
        assert (model.residency is None) == (allowed >= size)
        assert logits(model) == expected
        assert (model.residency is None) == (allowed == size + caches)
        if model.residency is not None:
            cache = model.new_cache(CONTEXT)
            held.append(model.residency.slots)
            assert working + shared + held[-1] * each + caches <= allowed
            del cache
        model.close()
    assert held[0] == minimal_slots(source.config)
    assert held == sorted(held)
    assert held[-1] > held[0]


@pytest.mark.usefixtures("nothing_else")
def test_a_context_decides_whether_experts_stay_on_disk(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is said once; the file is read as a whole only where it then fits."""
    monkeypatch.setattr("refimpl.engine.files.LARGE_BYTES", 0)
    size = sum(file.size for file in EngineModel(source, micro_batch=4).files)
    for room, whole in ((1 << 30, True), (0, False)):
        model = EngineModel(source, micro_batch=4, memory_bytes=size + room)
        seen, said = _told(model)
        caches = [model.new_cache(CONTEXT) for _ in range(2)]
        assert (seen[-1:] == [size]) is whole
        assert said == ([] if whole else [model.residency])
        assert (model.residency is None) is whole
        del caches
        model.close()


def _told(model: EngineModel) -> tuple[list[int], list[Residency | None]]:
    """What will be said of reading ahead, in bytes, and of experts left on disk."""
    seen: list[int] = []
    said: list[Residency | None] = []
    model.on_residency = lambda: said.append(model.residency)
    assert not model.read_ahead(lambda done, total: seen.append(done))
    return seen, said


@pytest.mark.usefixtures("nothing_else")
def test_a_context_that_fits_neither_way_is_refused(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EngineModel(source, micro_batch=4)
    size, context = sum(f.size for f in plain.files), source.config.max_position_embeddings
    monkeypatch.setattr(EngineModel, "cache_bytes", lambda self, capacity: 2 * size)
    model = EngineModel(source, micro_batch=4, memory_bytes=size)
    with pytest.raises(InputError, match=r"for a context leave room for 0 experts in memory, of"):
        model.new_cache(context)
    assert model.residency is None
    monkeypatch.setattr(budget, "supported", lambda: False)
    with pytest.raises(InputError, match=r" 0 bytes are left beside the .* allow more, or ask for"):
        model.new_cache(context)
    model.close()
    plain.close()


@pytest.mark.usefixtures("nothing_else")
def test_the_command_says_that_a_context_leaves_experts_on_disk(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_slots", lambda source, program, size, room, left: 150)
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2, 3]")
    size = model_file.stat().st_size
    words = ["generate", "--tokens", str(ids), "--model", str(model_file), "--max-new-tokens", "2"]
    for room, times in ((10, 1), (1 << 30, 0)):
        done = CliRunner().invoke(main, [*words, "--memory", f"{(size + room) / 1e9:.9f}"])
        assert done.exit_code == 0, done.stderr
        said = "the model with its context is larger than the memory it may use: "
        assert done.stderr.count(said) == times


def test_a_checkpoint_larger_than_free_memory_has_its_experts_on_disk(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "fits_memory", lambda files: False)
    model = EngineModel(source)
    assert model.residency is not None  # memory is ample here: all experts find room
    assert model.residency.slots == model.residency.experts
    model.close()


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_what_is_available(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tightest group counts, its page cache as free; a group without a limit does not."""
    line = "4:memory:/a/b" if version == 1 else "0::/a/b"
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else (
        "memory.max", "memory.current")  # fmt: skip
    prefix = "total_" if version == 1 else ""
    for folder, limit in ((root / "a", "700000"), (root / "a" / "b", "max")):
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text("500000")
        stat = f"{prefix}inactive_file 1000\n{prefix}active_file 200\n"
        (folder / "memory.stat").write_text(stat)
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_MOUNT", tmp_path)
    assert memory.available_bytes() == 700_000 - 500_000 + 1200
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "none")
    assert memory.available_bytes() > 1_000_000
    assert own_bytes() > 0


def test_a_file_that_loses_experts_ends_in_a_sentence(
    source: StoredSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on to its end, the error follows, and the model can be used again."""
    model = with_slots(source, 100, micro_batch=4)
    real = DirectFile.read

    def failing(self: DirectFile, target: memoryview, offset: int, needed: int) -> None:
        raise CheckpointError(f"{self.path}: bytes of the file are gone")

    monkeypatch.setattr(DirectFile, "read", failing)
    with pytest.raises(CheckpointError, match="bytes of the file are gone"):
        model.decode([5], model.new_cache(CONTEXT))
    monkeypatch.setattr(DirectFile, "read", real)
    plain = EngineModel(source, micro_batch=4)
    assert logits(model) == logits(plain)
    model.close()
    plain.close()


def test_reads_of_any_place_are_whole_blocks(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = np.random.default_rng(1).integers(0, 256, 3 * BLOCK + 100, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    file, readers = DirectFile(str(path), len(data)), Readers(2)
    buffer = memoryview(disk.anonymous(8 * BLOCK))
    for offset, length in ((0, 10), (BLOCK - 1, 2), (100, 2 * BLOCK), (3 * BLOCK, 100)):
        low, high = span(offset, length)
        done: list[int] = []
        readers.ask(file, offset, length, buffer[: high - low], lambda d=done: d.append(1))
        readers.settle()
        assert done == [1] and readers.error is None
        found = bytes(buffer[offset - low : offset - low + length])
        assert found == data[offset : offset + length].tobytes()
    readers.ask(file, 3 * BLOCK, 200, buffer[:BLOCK], int)
    readers.settle()
    assert isinstance(readers.error, CheckpointError)
    readers.close()
    file.close()
    with pytest.raises(CheckpointError, match="has shrunk"):
        DirectFile(str(path), len(data) + 1)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        DirectFile(str(tmp_path / "none"), 0)
    assert min(slice_speed([(str(path), 5, 5000)], 10_000, 2)) > 0


def test_the_command_says_what_it_reads_from_disk(model_file: Path, tmp_path: Path) -> None:
    """`--memory` of a model that fits changes nothing; too little is refused in a sentence."""
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2, 3]")
    code = "from refimpl.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "--tokens", str(ids), "--model",
               str(model_file), "--max-new-tokens", "2", "--stats"]  # fmt: skip
    cases: list[tuple[str, int, str]] = [
        ("0", 2, "--memory is 0, expected GB above 0"),
        ("0.0001", 2, "experts cannot be left on disk with less than"),
    ]
    for value, code_wanted, text in cases:
        done = subprocess.run(
            [*command, "--memory", value], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code_wanted, done.stderr
        assert text in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "generate --tokens IDS --model MODEL --max-new-tokens 2",
        "bench -m MODEL -p 4 -n 2 -r 1 -ub 4 --json",
        "perplexity --tokens IDS --model MODEL --context 16",
        "perplexity --tokens IDS --model MODEL --against MODEL --context 16",
        "stats --tokens IDS --model MODEL --context 16 --loops 1 --new-tokens 2",
        "golden dump --tokens IDS --model MODEL --backend engine --out OUT",
    ],
)
def test_every_command_on_the_engine_takes_a_limit_of_memory(
    command: str, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for some of the experts it runs and says so; with too little it says why not."""
    ids = tmp_path / "ids.json"
    ids.write_text(str(TOKENS))
    places = {"MODEL": str(model_file), "IDS": str(ids), "OUT": str(tmp_path / "out.npz")}
    words = [places.get(word, word) for word in command.split()]
    monkeypatch.setattr(budget, "own_bytes", lambda: 0)
    done = CliRunner().invoke(main, [*words, "--memory", "0.0001"])
    assert done.exit_code == 2 and "experts cannot be left on disk" in done.stderr
    done = CliRunner().invoke(main, [*words, "--memory", "-1"])
    assert done.exit_code == 2 and "--memory is -1, expected GB above 0" in done.stderr
    monkeypatch.setattr(budget, "_slots", lambda source, program, size, room, left: 150)
    done = CliRunner().invoke(main, [*words, "--memory", "0.0001"])
    assert done.exit_code == 0, done.stderr
    assert "others are read when chosen" in done.stderr

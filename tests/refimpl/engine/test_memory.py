"""Blocks are used where they lie, and memory is taken for caches and activations only."""

import dataclasses
import json
import mmap
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl.backends import EngineOptions, open_model
from refimpl.checkpoint import stored
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.slice import published_config, slice_config, write_random
from refimpl.checkpoint.stored import StoredSource, StoredTensor
from refimpl.checkpoint.synth import tiny_a
from refimpl.engine.files import LARGE_BYTES, MappedFile, fits_memory, populate
from refimpl.engine.formats import FORMATS
from refimpl.engine.memory import size_text
from refimpl.engine.model import EngineModel
from refimpl.engine.resident import resident_of
from refimpl.engine.stats import Meter
from refimpl.errors import InputError

EXPERT_TENSOR = 16 * 256 * 256
"""Values of a stacked expert tensor of `widened`."""
OTHER_LIMIT = 300_000_000


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_a` with widths of 256, which every stored type can hold, as random blocks."""
    root = tmp_path_factory.mktemp("widened")
    config = dataclasses.replace(
        tiny_a(), hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        share_expert_dim=256, head_dim=64,
    )  # fmt: skip

    def path(file_type: str) -> Path:
        out = root / f"{file_type}.gguf"
        if not out.exists():
            write_random(config, out, file_type, 1)
        return out

    return path


@pytest.mark.parametrize("file_type", [name.lower() for name in FORMATS])
def test_no_tensor_of_an_in_place_type_is_expanded(
    widened: Callable[[str], Path], file_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only vectors and single rows of the embedding table are decoded, and nothing as large as
    one expert tensor is allocated beside caches and activations."""
    decoded = 0

    def values(self: StoredTensor, start: int, stop: int) -> Any:
        assert len(self.spec.shape) == 1, f"{self.where} was expanded"
        return real_values(self, start, stop)

    def decode(kind: Any, rows: Any) -> Any:
        nonlocal decoded
        decoded = max(decoded, len(rows))
        return real_decode(kind, rows)

    real_values, real_decode = StoredTensor.values, stored.decode
    EngineModel(open_checkpoint(widened(file_type)), micro_batch=16).close()  # compiles
    monkeypatch.setattr(StoredTensor, "values", values)
    monkeypatch.setattr(stored, "decode", decode)
    source = open_checkpoint(widened(file_type))
    tracemalloc.start()
    model = EngineModel(source, micro_batch=16)
    cache = model.new_cache(32)
    step = model.prefill(range(12), cache)
    model.draft(cache, step.hidden, range(1, 13), 3, lambda row: int(np.argmax(row)))
    step = model.decode([5, 6, 7, 8], cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(step.logits).all()
    assert decoded <= 12
    own = cache.nbytes + sum(part.nbytes for part in model.working_memory())
    assert peak - own < EXPERT_TENSOR
    model.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose memory it is")
@pytest.mark.parametrize("kind", ["mini", "slice"])
def test_memory_beyond_map_caches_and_activations_is_small(kind: str, tmp_path: Path) -> None:
    """A whole process, interpreter and libraries included; the slice has true widths."""
    model = kind
    if kind == "slice":
        model = str(tmp_path / "slice.gguf")
        write_random(slice_config(8, 1024), Path(model), "q4_k_s", 1, sparse=True)
    code = "from refimpl.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "-m", model, "-p", "64", "-n", "2", "-r", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for record in json.loads(done.stdout):
        assert 0 < record["resident"]["other_bytes"] <= OTHER_LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose memory it is")
def test_experts_that_were_read_into_memory_are_the_models(tmp_path: Path) -> None:
    from refimpl.engine.resident import resident

    experts = np.ones(1 << 24, dtype=np.uint8)
    without, held = resident(tmp_path, [], []), resident(tmp_path, [], [], [experts])
    assert without is not None
    assert held is not None
    assert without["model_bytes"] == 0
    assert held["model_bytes"] == experts.nbytes
    assert held["other_bytes"] < held["total_bytes"] - experts.nbytes + 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose memory it is")
def test_all_files_of_a_model_are_the_models(tmp_path: Path) -> None:
    """As of one split over several, or with its MTP layers apart; a file beside them is not."""
    maps = []
    for name in ("one/a", "two/b", "two/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\1" * (1 << 20))
        maps.append(np.memmap(tmp_path / name, mode="r"))
        assert maps[-1].sum() == 1 << 20
    files = [SimpleNamespace(path=str(tmp_path / name)) for name in ("one/a", "two/b")]
    model = SimpleNamespace(files=files, residency=None, working_memory=lambda: [])
    found = resident_of(model, [])
    assert found is not None and found["model_bytes"] == 2 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose memory it is")
def test_every_page_of_the_process_is_counted_once(widened: Callable[[str], Path]) -> None:
    """Against the system's own sum; what is added to the process is seen where it belongs."""
    model = EngineModel(open_checkpoint(widened("q8_0")), micro_batch=16)
    meter = Meter(model.source, model)
    cache = meter.new_cache(512)
    meter.prefill(range(12), cache)
    meter.decode([5], cache)
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    (line,) = (line for line in rollup.splitlines() if line.startswith("Rss:"))
    found = meter.resident()
    assert found is not None
    total = found.pop("total_bytes")
    assert abs(total - 1024 * int(line.split()[1])) < 4_000_000
    assert sum(found.values()) == total
    assert 0 < found["cache_bytes"] <= cache.nbytes
    written = sum(part.nbytes for part in model.working_memory())
    assert 0 < found["activation_bytes"] <= written
    (file,) = model.files
    assert 0 < found["model_bytes"] <= file.size + 65536
    with mmap.mmap(-1, 1 << 24) as held:
        held.write(b"\1" * len(held))
        grown = meter.resident()
        assert grown is not None
        more = grown["other_bytes"] - found["other_bytes"]
        assert more == pytest.approx(len(held), abs=4_000_000)
    model.close()


def test_a_sparse_file_of_the_published_layout_opens_and_runs_on_any_machine(
    tmp_path: Path,
) -> None:
    """Fewer experts here; the layout, its size and the choice of experts are real."""
    config = dataclasses.replace(published_config(), moe_num_experts=16)
    path = tmp_path / "full.gguf"
    write_random(config, path, "q4_k_s", 1, sparse=True)
    assert path.stat().st_size > 8e9
    assert path.stat().st_blocks * 512 < 1e9
    source = open_checkpoint(path)
    assert source.config.num_hidden_layers == 45
    assert source.norm_scale("norm", None, np.float32).std() > 0.1
    assert not source.stored("lm_head", None).rows[:8].any()
    with pytest.raises(InputError, match=r"only \.gguf files can be sparse"):
        write_random(config, tmp_path / "folder", "bf16", 1, sparse=True)


def test_files_are_read_ahead_part_by_part(
    widened: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refimpl.engine import files

    monkeypatch.setattr(files, "_PART", 1 << 20)
    model = EngineModel(open_checkpoint(widened("q8_0")))
    (file,) = model.files
    for broken in (False, True):  # with the system's own way, and by touching
        if broken:
            monkeypatch.setattr(files, "_POPULATE_READ", -1)
        seen: list[tuple[int, int]] = []
        populate([file], lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (file.size, file.size)
        assert len(seen) == -(-file.size // (1 << 20))
    assert file.resident_bytes() in (None, file.size)
    assert not model.read_ahead(lambda done, total: None)  # too small to ask for
    model.close()


def test_a_file_beyond_memory_is_not_read_ahead(
    widened: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Memory:
        available = 2 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    model = EngineModel(open_checkpoint(widened("q8_0")))
    (file,) = model.files
    assert fits_memory([file])
    large = dataclasses.replace(file, size=3 << 30)
    assert large.size > LARGE_BYTES and not fits_memory([large])
    monkeypatch.setattr(EngineModel, "files", (large,))
    assert not model.read_ahead(lambda done, total: pytest.fail("was read"))


def test_contexts_are_refused_with_the_arithmetic(
    tiny_gguf: Callable[[str, str], StoredSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tiny_a` has three full layers of two KV heads of 32 lanes: 768 bytes a token in f16."""
    import psutil

    class Memory:
        available = (256 << 20) + 1000

    model = EngineModel(tiny_gguf("tiny_a", "q8_0"))
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(InputError, match=r"512 tokens \(f16 KV: 768 bytes a token .* only 268"):
        model.new_cache(512)
    model.close()


def test_a_micro_batch_beyond_memory_is_named_as_the_cause(
    tiny_gguf: Callable[[str, str], StoredSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(InputError, match=r"of 9,999,999 rows .* a smaller --micro-batch") as e:
        EngineModel(tiny_gguf("tiny_a", "q8_0"), micro_batch=9_999_999)
    assert "context" not in str(e.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (3500, "3.5 kB"), (39_400_000, "39.4 MB"),
     (111_500_000_000, "111.50 GB"), (257_600_000_000_000, "257,600.00 GB")],
)  # fmt: skip
def test_sizes_in_sentences_keep_digits(size: int, text: str) -> None:
    assert size_text(size) == text


def test_models_are_opened_with_the_engines_options(widened: Callable[[str], Path]) -> None:
    path = widened("q8_0")
    options = EngineOptions(exact=True, kv_type="q8_0")
    with open_model(path, threads=1, options=options) as opened:
        assert opened.name == "engine"
        assert isinstance(opened.backend, EngineModel)
        assert opened.backend.description == {
            "simd": opened.backend.description["simd"],
            "amx": opened.backend.description["amx"],
            "threads": 1,
            "activations": "float32",
            "kv_type": "q8_0",
            "experts_held": None,
        }
        assert isinstance(opened.backend.files[0], MappedFile)
    with open_model(path, dtype="float64") as opened:
        assert opened.name == "reference"
    with pytest.raises(InputError, match="--exact belongs to the engine"):  # noqa: SIM117
        with open_model(path, "reference", options=options):
            pass

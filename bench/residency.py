"""A model larger than the memory it may use: the engine against page faults and llama.cpp.

Linux only. Each arm runs in a process of its own in a fresh memory control group with a limit that
counts the page cache too, and begins with the file out of memory. A process decodes random tokens;
those after a warm-up, when memory is full, are timed. Before and after each arm the disk is probed
with expert-sized reads of the same file. Making control groups takes the right to (root, or a
delegated group).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.runners.base import RunnerError
from hwmodel.errors import RequestError

ENGINE_ARMS = ("experts on demand", "page faults", "page faults, no readahead", "willneed")
"""Ways of the engine; the last two are what was tried and not taken."""
LLAMA_ARM = "llama.cpp mmap"
DEFAULT_ARMS = ("experts on demand", "page faults", LLAMA_ARM, "willneed")
FORMAT = 1
_MOUNT = Path("/sys/fs/cgroup")
_PROBE_BYTES = 512 << 20
_LIMIT_S = 900


@dataclass(frozen=True)
class Sample:
    """One arm of one round.

    Attributes:
        round: counted from the first one in the file.
        limit_bytes: of the control group.
        cold_s, warm_s: seconds of tokens (or of equal runs of them) before and after memory is
            full, per token.
        hit_rate: share of expert bytes in memory when they were chosen; None where nobody says.
        disk_bytes_per_token: of the timed part; None where the system does not count.
        disk_bytes_per_s: of the timed part.
        busy_disk_bytes_per_s: the same over the time in which the disk was asked for something.
        probe: bytes per second of expert-sized reads before and after.
        peak_bytes: most memory that the group used, page cache included.
        about: what ran.
    """

    arm: str
    round: int
    started: float
    model: str
    file_bytes: int
    limit_bytes: int
    cold_s: tuple[float, ...]
    warm_s: tuple[float, ...]
    hit_rate: float | None
    disk_bytes_per_token: float | None
    disk_bytes_per_s: float | None
    busy_disk_bytes_per_s: float | None
    probe: tuple[float, ...]
    peak_bytes: int
    about: str

    @property
    def tokens_per_s(self) -> float:
        """Of the timed part."""
        return len(self.warm_s) / sum(self.warm_s)


def make_model(path: Path, experts: int) -> None:
    """Write the slice whose routers choose among all experts alike: random, without a bias.

    Raises:
        InputError: the file cannot be written.
    """
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.checkpoint.slice import slice_config, write_random
    from refimpl.engine.files import MappedFile, map_under
    from refimpl.engine.memory import address

    write_random(slice_config(experts), path, "q4_0", seed=1)
    source = open_checkpoint(path)
    with contextlib.closing(source), open(path, "r+b") as file:
        for tensor in source.tensors:
            mapped = map_under(tensor.rows)
            if tensor.spec.key == "router_bias" and mapped is not None:
                file.seek(address(tensor.rows) - MappedFile.of(mapped, str(path)).address)
                file.write(bytes(tensor.rows.nbytes))


def measure(
    model: Path,
    limit_bytes: int,
    arms: Sequence[str],
    rounds: int,
    llama_bench: Path | None,
    keep: Callable[[Sample], None],
    first_round: int = 0,
    tokens: tuple[int, int] = (48, 24),
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Run rounds, each arm once in each, one after the other; `keep` gets each as it ends.

    Args:
        tokens: before memory is full, and timed.

    Raises:
        RunnerError: an arm failed or cannot be run here.
        RequestError: the file is not at least 1.3 times the limit.
    """
    size = model.stat().st_size
    if size < 1.3 * limit_bytes:
        raise RequestError(
            f"{model}: {size / 1e9:.2f} GB are not 1.3 times the limit of {limit_bytes / 1e9:.2f} "
            "GB; give a lower --limit or more --experts"
        )
    if model.stat().st_blocks * 512 < 0.99 * size:
        raise RequestError(f"{model}: the file has holes, which cost no disk reads; write it whole")
    slices = _slices(model)
    for number in range(first_round, first_round + rounds):
        for arm in arms:
            sample = _measured(model, limit_bytes, arm, llama_bench, number, tokens, slices)
            keep(sample)
            note(_line(sample))


def add_rounds(
    model: Path, limit_bytes: int, arms: Sequence[str], rounds: int, llama_bench: Path | None,
    data: Path, note: Callable[[str], None],
) -> list[Sample]:  # fmt: skip
    """Measure rounds and add their samples to a file as each ends; returns the new ones.

    Raises:
        RunnerError, RequestError: see `measure`.
    """
    known = read_samples(data)
    first, made = max((s.round for s in known), default=-1) + 1, []

    def keep(sample: Sample) -> None:
        made.append(sample)
        write_samples(data, [*known, *made])

    measure(model, limit_bytes, arms, rounds, llama_bench, keep, first, note=note)
    return made


def _measured(model: Path, limit: int, arm: str, llama: Path | None, number: int,
              tokens: tuple[int, int], slices: Any) -> Sample:  # fmt: skip
    from refimpl.engine.disk import slice_speed

    command = _command(model, arm, llama, tokens)
    _forget(model)
    before = slice_speed(slices, _PROBE_BYTES)
    began = time.time()
    with control_group(limit) as group:
        found = _run(command, arm, group)
        peak = _peak(group)
    if arm == LLAMA_ARM:
        found = _from_llama(found, tokens)
    after = slice_speed(slices, _PROBE_BYTES)
    return Sample(arm=arm, round=number, started=began, model=model.name,
                  file_bytes=model.stat().st_size, limit_bytes=limit, probe=before + after,
                  peak_bytes=peak, **found)  # fmt: skip


def _command(model: Path, arm: str, llama: Path | None, tokens: tuple[int, int]) -> list[str]:
    from refimpl.engine.threads import default_threads

    if arm in ENGINE_ARMS:
        return [sys.executable, "-m", "bench.residency_arm", str(model), arm, *map(str, tokens)]
    if arm != LLAMA_ARM:
        raise RequestError(f"no arm '{arm}'; expected {', '.join((*ENGINE_ARMS, LLAMA_ARM))}")
    if llama is None:
        raise RunnerError("llama-bench was not found; put it on the PATH or give --llama-bench")
    # Without --repack 0 it copies all weights into memory of its own, which the limit forbids.
    flags = ["-p", "0", "-n", "8", "-r", str(sum(tokens) // 8), "--repack", "0"]
    flags += ["-t", str(default_threads()), *_mmap_flags(llama)]
    return [str(llama), "-m", str(model), *flags, "-o", "json"]


def _mmap_flags(llama: Path) -> list[str]:
    """As this version of llama-bench spells it."""
    try:
        told = subprocess.run([str(llama), "--help"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunnerError(f"{llama}: cannot be started ({error.strerror})") from None
    return ["-lm", "mmap"] if "--load-mode" in told.stdout + told.stderr else ["-mmp", "1"]


def _run(command: list[str], arm: str, group: Path) -> dict[str, Any]:
    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=join, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise RunnerError(f"{arm}: gave no result within {_LIMIT_S} s") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise RunnerError(f"{arm}: cannot be started in a control group ({error})") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        why = "out of memory" if done.returncode == -9 else last
        raise RunnerError(f"{arm}: ended with code {done.returncode} ({why})")
    made = json.loads(done.stdout)
    found: dict[str, Any] = made[0] if isinstance(made, list) else made
    return found


def _from_llama(record: dict[str, Any], tokens: tuple[int, int]) -> dict[str, Any]:
    """llama-bench times runs of eight tokens; nobody counts its reads."""
    each = [ns / 1e9 / 8 for ns in record["samples_ns"]]
    skip = tokens[0] // 8
    return {
        "cold_s": tuple(each[:skip]), "warm_s": tuple(each[skip:]), "hit_rate": None,
        "disk_bytes_per_token": None, "disk_bytes_per_s": None, "busy_disk_bytes_per_s": None,
        "about": f"llama.cpp {record.get('build_commit', '')}, --repack 0, mmap",
    }  # fmt: skip


def _slices(model: Path) -> list[tuple[str, int, int]]:
    """Every expert slice of the file."""
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.engine.expert_files import expert_slices

    with contextlib.closing(open_checkpoint(model)) as source:
        return expert_slices(source)


def _forget(model: Path) -> None:
    """Take the file out of the page cache."""
    with open(model, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """A fresh memory control group with a limit, below that of this process (version 1 or 2).

    Raises:
        RunnerError: this system has none, or this user may not make one.
    """
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    version_1 = "memory" in own
    parent = _MOUNT / "memory" / own["memory"] if version_1 else _MOUNT / own.get("", "")
    group = parent / f"refimpl-residency-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        name = "memory.limit_in_bytes" if version_1 else "memory.max"
        (group / name).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise RunnerError(
            f"cannot make a memory control group ({error.strerror}); this benchmark needs Linux "
            "and the right to make one"
        ) from None
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def _peak(group: Path) -> int:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text())
    return 0


def _line(s: Sample) -> str:
    parts = [f"round {s.round}: {s.arm}: {s.tokens_per_s:.2f} tokens/s"]
    if s.hit_rate is not None:
        parts.append(f"{100 * s.hit_rate:.1f} % of expert bytes in memory")
    if s.disk_bytes_per_s is not None:
        parts.append(f"disk {s.disk_bytes_per_s / 1e9:.2f} GB/s")
    if s.busy_disk_bytes_per_s is not None:
        parts.append(f"{s.busy_disk_bytes_per_s / 1e9:.2f} while asked")
    parts.append(f"probe {median(s.probe) / 1e9:.2f} GB/s")
    return ", ".join(parts)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, oldest first; none if there is no file.

    Raises:
        RequestError: the file is no file of samples.
    """
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        return [Sample(**_tuples(row)) for row in data["samples"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: not a file of residency samples ({error})") from None


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as one JSON file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    from refimpl.checkpoint.atomic import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(s) for s in samples]
    with atomic_file(path) as file:
        file.write(json.dumps({"format": FORMAT, "samples": rows}, indent=1).encode())

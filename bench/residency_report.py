"""The report's section on a model larger than the memory it may use."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.markdown import markdown
from bench.residency import ENGINE_ARMS, LLAMA_ARM, Sample

FILE = "residency.json"
_ARMS = {
    "experts on demand": "experts on demand (the engine's way)",
    "willneed": "mapped, chosen slices asked for by madvise(MADV_WILLNEED)",
    "page faults": "mapped, page faults alone",
    "page faults, no readahead": "mapped, page faults, MADV_RANDOM",
    LLAMA_ARM: "llama.cpp, mmap, --repack 0",
}


def section(samples: Sequence[Sample]) -> list[str]:
    """Paragraphs in Markdown; none without samples."""
    if not samples:
        return []
    groups = sorted({(s.file_bytes, s.limit_bytes) for s in samples})
    parts = ["## A model larger than memory", _method(samples)]
    for size, limit in groups:
        some = [s for s in samples if (s.file_bytes, s.limit_bytes) == (size, limit)]
        parts += [
            f"File {size / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB (file over limit "
            f"{size / limit:.2f}):",
            markdown(_HEADER, _rows(some)),
        ]
    return parts


_HEADER = (
    "way", "rounds", "tokens/s", "over page faults", "over llama.cpp",
    "expert bytes in memory", "MB from disk per token", "disk GB/s", "share of the probe",
    "first tokens/s, cold",
)  # fmt: skip


def _rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in (*ENGINE_ARMS, LLAMA_ARM):
        own = [s for s in samples if s.arm == arm]
        if not own:
            continue
        speeds = [s.tokens_per_s for s in own]
        rows.append((
            _ARMS[arm], str(len(own)),
            f"{median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})",
            _ratio(samples, arm, "page faults"), _ratio(samples, arm, LLAMA_ARM),
            _median([s.hit_rate for s in own], "{:.0%}"),
            _median([s.disk_bytes_per_token for s in own], "{:.0f}", 1e-6),
            _median([s.disk_bytes_per_s for s in own], "{:.2f}", 1e-9),
            _median([s.disk_bytes_per_s and s.disk_bytes_per_s / median(s.probe) for s in own],
                    "{:.0%}"),
            _median([len(s.cold_s) / sum(s.cold_s) for s in own], "{:.1f}"),
        ))  # fmt: skip
    return rows


def _ratio(samples: Sequence[Sample], arm: str, to: str) -> str:
    """Median of the ratios within rounds."""
    speeds = {(s.round, s.arm): s.tokens_per_s for s in samples}
    found = [v / speeds[r, to] for (r, a), v in speeds.items() if a == arm and (r, to) in speeds]
    if not found or arm == to:
        return "-"
    return f"{median(found):.2f}x ({min(found):.2f} to {max(found):.2f})"


def _median(values: Sequence[float | None], form: str, factor: float = 1.0) -> str:
    known = [v * factor for v in values if v is not None]
    return form.format(median(known)) if known else "-"


def _counts(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _method(samples: Sequence[Sample]) -> str:
    probe = median([median(s.probe) for s in samples])
    busy = [s.busy_disk_bytes_per_s for s in samples if s.busy_disk_bytes_per_s]
    while_asked = f", {median(busy) / 1e9:.2f} GB/s while it is asked" if busy else ""
    first, timed = (_counts([len(part) for part in parts]) for parts in (
        [s.cold_s for s in samples if s.arm != LLAMA_ARM],
        [s.warm_s for s in samples if s.arm != LLAMA_ARM]))  # fmt: skip
    return (
        "Linux only. Every way decodes random tokens in a process of its own, in a fresh memory "
        "control group whose limit counts the page cache too, and begins with the file out of "
        f"memory; {timed} tokens after the first {first} are timed. "
        "The file is one of the slices with more experts, written whole (no holes); its routers "
        "are random and have no bias, so all experts are equally likely: the hit rate is what "
        "memory holds, and no way of choosing what to keep can do better. Ways follow each other "
        "within a round. The disk is probed before and after each with reads of random expert "
        f"slices of the same file, past the page cache: median {probe / 1e9:.2f} GB/s{while_asked} "
        "by the engine's way. It is a virtual disk: what its host keeps in memory cannot be told. "
        "*Disk GB/s* is over all of the timed seconds, arithmetic included. llama.cpp's default "
        "(repacked weights) copies all weights into memory of its own, which the limit forbids, "
        "so it runs with `--repack 0`; it times runs of eight tokens, and nobody counts its reads."
    )

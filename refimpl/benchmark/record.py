"""Results as records, with llama-bench's field names where they mean the same, and as text.

Fields of llama-bench: see its `test::get_fields`. Added: `engine`, `engine_version`, `kernels`
(hash of the sources of compiled code), `loop` (hash of the sources of the draft-and-verify loop,
where it ran), `simd`, `exact`, `memory_limit_bytes` (--memory),
`experts_held` (where not all are), `n_rows`, `mtp`, `simulated_acceptance`,
`synthetic_kv`, `samples_tokens`, `mtp_layer_bytes` (stored bytes of each MTP layer, its head
included), and the other attributes of `refimpl.benchmark.run.BenchResult`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from refimpl import decoding
from refimpl.benchmark.host import build_commit, cpu_name, version
from refimpl.benchmark.run import CHUNK, Bench, BenchResult
from refimpl.inventory import inventory

FORMATS = ("md", "csv", "json", "jsonl")
Record = Mapping[str, Any]


def record(bench: Bench, result: BenchResult) -> dict[str, Any]:
    """One result with everything that it depends on, ready for JSON."""
    test, settings = result.test, bench.settings
    return {
        **_build(),
        **_model(bench),
        **_arithmetic(bench),
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "n_rows": test.n_rows,
        "mtp": test.mtp or None,
        "loop": loop_sources() if test.mtp else None,
        "simulated_acceptance": list(settings.acceptance) if test.mtp else [],
        "synthetic_kv": bool(settings.synthetic_kv and test.n_depth),
        "test": test.label,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(result.started)),
        **_statistics(result),
        "samples_ns": list(result.samples_ns),
        "samples_ts": list(result.samples_ts),
        "samples_tokens": list(result.tokens),
        "steps": result.steps,
        "drafted": result.drafted,
        "accepted": result.accepted,
        "weight_bytes_per_step": result.weight_bytes_per_step,
        "kv_bytes_per_step": result.kv_bytes_per_step,
        "resident": result.resident,
        "turns": list(result.turns),
    }


@cache
def loop_sources() -> str:
    """Hash of the sources of the draft-and-verify loop, which decide what it drafts."""
    digest = hashlib.sha256()
    for path in sorted(Path(decoding.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build() -> dict[str, Any]:
    return {
        "build_commit": build_commit(),
        "cpu_info": cpu_name(),
        "backends": "CPU",
        "engine": "refimpl",
        "engine_version": version(),
    }


def _model(bench: Bench) -> dict[str, Any]:
    tensors = [bench.source.stored(t.key, t.layer) for t in inventory(bench.source.config)]
    sizes: dict[str, int] = {}
    for t in tensors:
        sizes[t.kind.name] = sizes.get(t.kind.name, 0) + t.stored_bytes
    mtp: dict[int, int] = {}
    for t in tensors:
        if t.spec.role == "mtp" and t.spec.layer is not None:
            mtp[t.spec.layer] = mtp.get(t.spec.layer, 0) + t.stored_bytes
    return {
        "model_filename": bench.path.name,
        "model_type": f"step35 {max(sizes, key=lambda k: sizes[k])}",
        "model_size": sum(sizes.values()),
        "model_n_params": sum(t.spec.elements for t in tensors if t.spec.is_parameter),
        "mtp_layer_bytes": [mtp[layer] for layer in sorted(mtp)],
    }


def _arithmetic(bench: Bench) -> dict[str, Any]:
    s = bench.settings
    if s.backend == "reference":
        return {"backend": "reference", "n_threads": s.threads, "type_k": "f32", "type_v": "f32",
                "exact": True, "simd": "numpy", "kernels": ""}  # fmt: skip
    from refimpl.engine.model import MICRO_BATCH
    from refimpl.engine.simd import choose_simd

    simd, residency = choose_simd(), getattr(bench.backend, "residency", None)
    kv = s.kv_type or ("f32" if s.exact else "f16")
    return {
        "backend": "engine",
        "n_batch": CHUNK,
        "n_ubatch": s.micro_batch or MICRO_BATCH,
        "n_threads": getattr(bench.backend, "threads", s.threads),
        "type_k": kv,
        "type_v": kv,
        "exact": s.exact,
        "memory_limit_bytes": s.memory_bytes,
        "experts_held": None if residency is None else residency.slots,
        "simd": simd.name,
        "kernels": simd.sources,
    }


def _statistics(result: BenchResult) -> dict[str, Any]:
    ns, ts = result.samples_ns, result.samples_ts
    return {
        "avg_ns": round(fmean(ns)),
        "stddev_ns": round(_stdev(ns)),
        "avg_ts": fmean(ts),
        "stddev_ts": _stdev(ts),
    }


def _stdev(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


class Printer:
    """Text of records in one of `FORMATS`, a piece at a time, so that results show as they come.

    `head`, one `item` for each record, `tail`; together they are the whole output.
    """

    def __init__(self, form: str) -> None:
        self._form = form
        self._first = True

    def head(self) -> str:
        """What comes before all records."""
        if self._form == "md":
            names = ("model", "size", "params", "backend", "threads", "test", "t/s")
            rule = [":---", "---:", "---:", ":---", "---:", "---:", "---:"]
            return _row(names) + "\n" + _row(rule)
        return "[" if self._form == "json" else ""

    def item(self, found: Record) -> str:
        """One record."""
        if self._form == "md":
            return _row(_cells(found))
        if self._form == "csv":
            return _csv(found, self._begin())
        if self._form == "jsonl":
            return json.dumps(found, allow_nan=False)
        comma = "" if self._begin() else ",\n"
        return comma + json.dumps(found, indent=2, allow_nan=False)

    def tail(self, records: Sequence[Record]) -> str:
        """What comes after all records."""
        if self._form == "md" and records:
            return "\n" + _notes(records)
        return "]" if self._form == "json" else ""

    def _begin(self) -> bool:
        first, self._first = self._first, False
        return first


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(r: Record) -> tuple[str, ...]:
    return (
        r["model_type"],
        f"{r['model_size'] / 2**30:.2f} GiB" if r["model_size"] >= 2**30
        else f"{r['model_size'] / 2**20:.2f} MiB",
        f"{r['model_n_params'] / 1e9:.2f} B" if r["model_n_params"] >= 1e9
        else f"{r['model_n_params'] / 1e6:.2f} M",
        r["backend"],
        "" if r["n_threads"] is None else str(r["n_threads"]),
        r["test"] + ("*" if r["synthetic_kv"] else "") + ("†" if r["simulated_acceptance"] else ""),
        f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
    )  # fmt: skip


def _notes(records: Sequence[Record]) -> str:
    lines = []
    if any(r["synthetic_kv"] for r in records):
        lines.append("* depth filled with random keys and values, not by a prefill")
    if rates := next((r["simulated_acceptance"] for r in records if r["simulated_acceptance"]), ()):
        lines.append(f"† accepted drafts are simulated: {', '.join(f'{p:g}' for p in rates)}")
    for r in records:
        if r["mtp"] and r["steps"]:
            lines.append(
                f"{r['test']}: {r['accepted'] / r['steps']:.2f} of {r['drafted'] / r['steps']:.2f} "
                "drafts accepted a step"
            )
    lines.append(f"build: {records[-1]['build_commit']}, kernels {records[-1]['simd']}")
    return "\n".join(lines)


def _csv(found: Record, header: bool) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(found)
    writer.writerow(_plain(v) for v in found.values())
    return out.getvalue().rstrip("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6f}" if math.isfinite(value) else ""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None else value

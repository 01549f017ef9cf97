"""The tidy rows of `bench run`: one for each configuration and engine, made of all its rounds."""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bench.importers.llama_bench import quant_of
from bench.importers.table import Stated
from bench.interleave import Round, best_probe, read_rounds, usable
from bench.runners.base import Measurement
from bench.runs import RunRecord
from hwmodel.cli_support import counted
from hwmodel.devices import LOCAL
from refimpl.errors import RefimplError

if TYPE_CHECKING:
    from bench.run import Files

SAYS = "model_says"  # column: what the file itself says it is, whatever its name
_NAME_CHARS = 60
_DROPPED = ("an answer without text", "the answer stopped midway")


def write_rows(files: Files, stated: Stated, model: Path | None = None) -> list[RunRecord]:
    """Make the CSV of all rounds beside it; returns its rows.

    Args:
        model: the file that was measured; its rows get what engines do not print: the parameters
            that a token uses, and what the file calls itself.

    Raises:
        RunFileError: the rounds cannot be read.
        OSError: the CSV cannot be written.
    """
    from bench.runs import write_runs
    from hwmodel.files import write_whole
    from refimpl.backends import model_path

    rows = rows_of(read_rounds(files.rounds), stated)
    if model is not None:
        path = Path(model_path(model))
        mine = (path.stem, stated.model)
        rows = [_described(r, path) if r.model in mine else r for r in rows]
    write_whole(files.out, write_runs(rows).encode())
    return rows


def _described(row: RunRecord, path: Path) -> RunRecord:
    """With what its file says; as it is where the file is of an architecture not known here."""
    active, name = _read(path)
    if active is None:
        return row
    extra = {**row.extra, SAYS: f"{name} {row.quant}".strip()} if name else row.extra
    return replace(row, active_params_b=active / 1e9, extra=extra)


@cache
def _read(path: Path) -> tuple[int | None, str]:
    """Parameters that one token uses, and the name that a GGUF file gives itself."""
    from hwmodel.weights_file import read_weights
    from refimpl.checkpoint.open import open_checkpoint

    try:
        active = read_weights(path)[0].active_parameters
        with contextlib.closing(open_checkpoint(path)) as source:
            name = str(source.metadata.get("general.name", ""))
            return active, "".join(c for c in name if c.isprintable())[:_NAME_CHARS]
    except RefimplError:
        return None, ""


def rows_of(rounds: Sequence[Round], stated: Stated) -> list[RunRecord]:
    """One row for each case and arm: medians over the rounds that can be judged."""
    best = best_probe(rounds)
    out = []
    for case in dict.fromkeys(r.case for r in rounds):
        mine = [r for r in rounds if r.case == case]
        for label in dict.fromkeys(k for r in mine for k in r.arms):
            found, kind = usable(mine, best, label)
            out.append(stated.apply(_row(case, label, found, kind)))
    return out


def _row(case: str, label: str, rounds: Sequence[Round], kind: str) -> RunRecord:
    arms = [r.arms[label] for r in rounds]
    last, speed = arms[-1], median(m.median_ts for m in arms)
    record, remarks = last.record, [counted(len(rounds), f"{kind} round")]
    day = time.strftime("%Y-%m-%d", time.gmtime(rounds[-1].started))
    low, high = min(m.median_ts for m in arms), max(m.median_ts for m in arms)
    extra = {
        "host": rounds[-1].host, "flags": last.flags,
        "host_read_bytes_per_s": f"{median(r.probe for r in rounds):.4g}",
        "tok_s_low": f"{low:.5g}", "tok_s_high": f"{high:.5g}",
        SAYS: str(record.get("model_type") or ""),
    }  # fmt: skip
    values: dict[str, Any] = {
        "id": re.sub(r"[^\w.@-]+", "-", f"{day}-{label}-{case}"),
        "total_params_b": _scaled(record.get("model_n_params"), 1e-9),
        "weights_gb": _scaled(record.get("model_size"), 1e-9),
        "device": _device(label), "n_devices": 1.0, "engine": last.engine,
        "engine_version": last.build, "source_date": day,
        "confidence": "measured by bench run", "sweep": f"{day}-{case}",
        "fit_ok": "yes" if kind == "quiet" else "no",
    }  # fmt: skip
    own = _served(record, arms, remarks, extra) if "ttft_s" in record else _from_file(record, speed)
    return RunRecord(**{**values, **own, "notes": "; ".join(remarks), "extra": extra})


def _device(label: str) -> str:
    """`local`, or nothing for an endpoint elsewhere: an address does not say what serves it."""
    if "://" not in label:
        return LOCAL
    host = urlsplit(label.split()[0]).hostname or ""
    own = host in ("localhost", "::1", platform.node().lower()) or host.startswith("127.")
    return LOCAL if own else ""


def _from_file(record: Mapping[str, Any], speed: float) -> dict[str, Any]:
    """Columns of an engine that read a file: llama-bench's fields."""
    name = str(record.get("model_filename", "")).removesuffix(".gguf")
    prompt = record.get("n_prompt") or None
    return {
        "model": name,
        "quant": quant_of(str(record.get("model_type", ""))) or _quant_in(name),
        "backend": "cpu",
        "mtp": str(record.get("mtp") or "none"),
        "kv_type": str(record.get("type_k") or ""),
        "batch_concurrency": 1.0,
        "prompt_tokens": _scaled(prompt),
        "context_depth": float(record.get("n_depth") or 0),
        "gen_tokens": _scaled(record.get("n_gen") or None),
        "micro_batch": _scaled(record.get("n_ubatch")),
        "prefill_tok_s": speed if prompt else None,
        "decode_tok_s": None if prompt else speed,
    }


def _served(
    record: Mapping[str, Any], arms: Sequence[Measurement], remarks: list[str],
    extra: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Columns of an endpoint: per user, with what every user had together in `extra`."""
    records = [m.record for m in arms]

    def middle(key: str) -> float | None:
        found = [r[key] for r in records if r.get(key) is not None]
        return median(found) if found else None

    whole, asked = (sum(r[k] for r in records) for k in ("complete", "requests"))
    errors = list(dict.fromkeys(e for r in records for e in r["errors"]))
    if whole < asked:
        remarks.append(f"incomplete: {asked - whole} of {asked} requests ({'; '.join(errors[:3])})")
    if short := sum(r["short_answers"] for r in records):
        remarks.append(f"{short} answers of fewer than two tokens left out")
    if record["concurrency"] > 1 and any(e.startswith(_DROPPED) for e in errors):
        remarks.append(
            "a server that drops an answer when the next is asked has one user, not more"
        )
    remarks.append(f"tokens counted by {record['tokens_counted_by']}")
    for key in ("tpot_s", "itl_median_s", "itl_p99_s", "aggregate_tok_s", "drafted", "accepted",
                "acceptance", "acceptance_length", "reasoning_tokens"):  # fmt: skip
        value = middle(key)
        extra[key] = "" if value is None else f"{value:.5g}"
    if told_by := record.get("acceptance_told_by"):
        remarks.append(f"acceptance as told by {told_by}")
    ttft = middle("ttft_s")
    name = str(record.get("model_filename") or record["model"]).removesuffix(".gguf")
    return {
        "model": name,
        "quant": _quant_in(name),
        "backend": "",
        "mtp": _drafts(middle("acceptance_length"), middle("drafts_a_step"), middle("acceptance")),
        "batch_concurrency": float(record["concurrency"]),
        "prompt_tokens": middle("n_prompt"),
        "context_depth": middle("n_prompt"),
        "gen_tokens": middle("n_gen"),
        "prefill_tok_s": middle("server_prefill_tok_s"),
        "decode_tok_s": 1.0 / t if (t := middle("tpot_s")) else None,
        "ttft_ms": None if ttft is None else 1e3 * ttft,
        **({"fit_ok": "no"} if whole < asked else {}),
    }


def _drafts(length: float | None, each: float | None, share: float | None) -> str:
    """Drafts a step and what was accepted of them, as the tidy column has it."""
    if length is None and share is None:
        return ""
    told = f"accept length {length:.2f}" if length is not None else f"accept rate {share:.2f}"
    return f"{each:.0f} drafts, {told}" if each else told


def _quant_in(name: str) -> str:
    """The quant that a file's name states in capitals or not, or empty."""
    return quant_of(re.sub(r"[-.]", " ", name).upper())


def _scaled(value: Any, factor: float = 1.0) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) * factor if known else None

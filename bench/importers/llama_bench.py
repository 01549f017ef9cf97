"""llama-bench: its tables in Markdown and CSV, its JSON and JSON lines.

Fields by their names in llama.cpp's `tools/llama-bench/llama-bench.cpp`: `n_prompt`, `n_gen` and
`n_depth` say what was timed, `avg_ts` is tokens/s, `model_size` bytes. `refimpl bench` writes the
same fields and adds its own (`refimpl/benchmark/record.py`): engine, drafts, rows of a step. A
figure of neither prefill nor decoding (`pg` of llama-bench, steps of several rows) is kept out of
both columns and named.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.importers.table import (
    Format,
    device_named_in,
    has_fields,
    json_rows,
    number,
    required,
    rest,
)
from bench.runs import RunRecord
from hwmodel.errors import RunFileError

_USED = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename",
    "model_type", "model_size", "model_n_params", "n_ubatch", "type_k", "type_v", "n_prompt",
    "n_gen", "n_depth", "test_time", "samples_ns", "samples_ts", "engine", "mtp",
)  # fmt: skip
_QUANT = re.compile(r"\b((?:I?Q\d\w*|B?F16|F32|MXFP4\w*|TQ\d_\d)(?: - \w+)?)")
_SIZES = {"Small": "S", "Medium": "M", "Large": "L"}
_TEST = re.compile(
    r"(?:pp(?P<pp>\d+))?\+?(?:tg(?P<tg>\d+))?(?: x(?P<rows>\d+) rows)?(?: mtp (?P<mtp>\w+))?"
    r"(?: @ d(?P<depth>\d+))?(?P<random>\*?)(?P<simulated>†?)"
)
_NOTHING: tuple[object, ...] = (None, "", False, "False", "false", [], "[]")
_REFIMPL_BACKENDS = ("engine", "reference")  # what the table of `refimpl bench` says there
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "K": 1e3, "M": 1e6, "B": 1e9}


def quant_of(model_type: str) -> str:
    """`Q4_K_S` of `step35 196B Q4_K - Small`; empty where nothing is named."""
    found = _QUANT.search(model_type)
    if found is None:
        return ""
    kind, _, size = found[1].partition(" - ")
    return f"{kind}_{_SIZES[size]}" if size in _SIZES else kind


def _no_column(prompt: float, generated: float, rows: str) -> str:
    """What a figure is if it is neither of prefill nor of decoding token by token."""
    if prompt and generated:
        return "a prompt and generated text together"
    return "" if rows in ("", "1") else f"steps of {rows} tokens, as in verification"


def _remarks(row: Mapping[str, Any]) -> list[str]:
    """What of a figure is not as in a real run."""
    found = {
        "simulated_acceptance": "simulated acceptance",
        "synthetic_kv": "random keys and values",
    }
    return [said for key, said in found.items() if row.get(key) not in _NOTHING]


def _record(row: Mapping[str, Any], index: int, source: str) -> RunRecord:
    where = f"{source}: row {index + 1}"
    required(row, ("n_prompt", "n_gen", "avg_ts"), where)
    prompt = number(row, "n_prompt", "prompt_tokens", where) or 0
    generated = number(row, "n_gen", "gen_tokens", where) or 0
    speed = number(row, "avg_ts", "decode_tok_s", where)
    other = _no_column(prompt, generated, str(row.get("n_rows") or ""))
    remarks = _remarks(row)
    kind = str(row.get("model_type", ""))
    gpu = str(row.get("gpu_info", ""))
    k, v = str(row.get("type_k", "")), str(row.get("type_v", ""))
    build = " ".join(str(row.get(f, "")) for f in ("build_commit", "build_number")).strip()
    return RunRecord(
        id=f"{_stem(source)}-{index + 1}",
        model=_model_name(str(row.get("model_filename", "")), kind),
        total_params_b=number(row, "model_n_params", "total_params_b", where, 1e-9),
        quant=quant_of(kind),
        weights_gb=number(row, "model_size", "weights_gb", where, 1e-9),
        device=device_named_in(gpu, str(row.get("cpu_info", ""))),
        n_devices=float(len(gpu.split(","))) if gpu else 1.0,
        engine=str(row.get("engine") or "llama.cpp"),
        engine_version=build,
        backend=str(row.get("backends", "")),
        mtp=str(row.get("mtp") or "none"),
        kv_type=k if k == v else f"{k}/{v}",
        batch_concurrency=1.0,
        prompt_tokens=prompt or None,
        context_depth=number(row, "n_depth", "context_depth", where) or 0.0,
        gen_tokens=generated or None,
        micro_batch=number(row, "n_ubatch", "micro_batch", where),
        prefill_tok_s=speed if prompt and not other else None,
        decode_tok_s=speed if generated and not other else None,
        notes="; ".join(remarks),
        source_date=str(row.get("test_time", ""))[:10],
        fit_ok="no" if other or "simulated acceptance" in remarks else "yes",
        sweep=_stem(source),
        extra=rest(row, _USED if other else (*_USED, "avg_ts"), "llama-bench"),
        problems=(f"{speed:g} tokens/s of {other}: no column takes it",) if other else (),
    )


def _model_name(filename: str, kind: str) -> str:
    """The file's name without folder, ending and quant; else the type that the tool printed."""
    from hwmodel import names

    stem = re.split(r"[\\/]", filename)[-1].removesuffix(".gguf")
    bare = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    for text in (bare, _QUANT.sub("", bare).strip("-_. ")):
        if text and names.canonical("model", text) is not None:
            return text
    return bare or _QUANT.sub("", kind).strip(" -")


def _stem(source: str) -> str:
    return re.split(r"[\\/]", source)[-1].rsplit(".", 1)[0] or "import"


def _records(rows: Iterable[Mapping[str, Any]], source: str) -> list[RunRecord]:
    return [_record(row, i, source) for i, row in enumerate(rows)]


def _read_json(text: str, source: str) -> list[RunRecord]:
    return _records(json_rows(text) or (), source)


def _is_json(text: str) -> bool:
    return has_fields(text, ("n_prompt", "n_gen"))


def _is_csv(text: str) -> bool:
    header = text.lstrip().partition("\n")[0]
    return all(f in header.split(",") for f in ("n_prompt", "n_gen"))


def _read_csv(text: str, source: str) -> list[RunRecord]:
    return _records(csv.DictReader(io.StringIO(text.lstrip())), source)


def _is_markdown(text: str) -> bool:
    header = next((_cells(x) for x in text.splitlines() if x.strip().startswith("|")), [])
    return "test" in header and "t/s" in header


def _cells(line: str) -> list[str]:
    return [c.strip() for c in line.strip().strip("|").split("|")]


def _read_markdown(text: str, source: str) -> list[RunRecord]:
    """A printed table: rounded figures, no samples, the processor or card not named."""
    lines = [x for x in text.splitlines() if x.strip().startswith("|")]
    header = _cells(lines[0])
    build = re.search(r"^build: ([\w.-]+)(?: \((\d+)\))?", text, re.MULTILINE)
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(lines[2:]):
        cells = dict(zip(header, _cells(line), strict=False))
        where = f"{source}: row {i + 1}"
        test = _TEST.fullmatch(cells.get("test", ""))
        if test is None or not (test["pp"] or test["tg"]):
            raise RunFileError(
                f"{where}: test is {cells.get('test', '')!r}, expected pp512 or tg128"
            )
        ours = cells.get("backend") in _REFIMPL_BACKENDS
        extra: dict[str, Any] = {k: cells[k] for k in ("ngl", "threads", "fa", "sm") if k in cells}
        rows.append(
            {
                **extra,
                "build_commit": build[1] if build else "",
                "build_number": build[2] or "" if build else "",
                "model_type": cells.get("model", ""),
                "model_size": _quantity(cells.get("size", "")),
                "model_n_params": _quantity(cells.get("params", "")),
                "backends": "CPU" if ours else cells.get("backend", ""),
                "engine": "refimpl" if ours else "",
                "type_k": cells.get("type_k", "f16"),
                "type_v": cells.get("type_v", "f16"),
                "n_ubatch": cells.get("n_ubatch", ""),
                "n_prompt": int(test["pp"] or 0),
                "n_gen": int(test["tg"] or 0),
                "n_depth": int(test["depth"] or 0),
                "n_rows": test["rows"] or "",
                "mtp": test["mtp"] or "",
                "synthetic_kv": test["random"],
                "simulated_acceptance": test["simulated"],
                "avg_ts": cells.get("t/s", "").partition("±")[0].strip(),
            }
        )
    return _records(rows, source)


def _quantity(text: str) -> float | str:
    value, _, unit = text.partition(" ")
    try:
        return float(value) * _UNITS[unit.strip()]
    except (ValueError, KeyError):
        return ""


FORMATS = (
    Format("llama-bench JSON or JSON lines", _is_json, _read_json),
    Format("llama-bench CSV", _is_csv, _read_csv),
    Format("llama-bench table", _is_markdown, _read_markdown),
)

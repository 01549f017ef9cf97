"""llama-bench: its tables in Markdown and CSV, its JSON and JSON lines.

Fields by their names in llama.cpp's `tools/llama-bench/llama-bench.cpp`: `n_prompt`, `n_gen` and
`n_depth` say what was timed, `avg_ts` is tokens/s, `model_size` bytes. A row that prefills and
generates (`pg`) mixes two figures and is left out with a note.
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
    "n_gen", "n_depth", "test_time", "avg_ts", "samples_ns", "samples_ts",
)  # fmt: skip
_QUANT = re.compile(r"\b((?:I?Q\d\w*|B?F16|F32|MXFP4\w*|TQ\d_\d)(?: - \w+)?)")
_SIZES = {"Small": "S", "Medium": "M", "Large": "L"}
_TEST = re.compile(r"(pp|tg)(\d+)(?: @ d(\d+))?$")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "K": 1e3, "M": 1e6, "B": 1e9}


def quant_of(model_type: str) -> str:
    """`Q4_K_S` of `step35 196B Q4_K - Small`; empty where nothing is named."""
    found = _QUANT.search(model_type)
    if found is None:
        return ""
    kind, _, size = found[1].partition(" - ")
    return f"{kind}_{_SIZES[size]}" if size in _SIZES else kind


def _record(row: Mapping[str, Any], index: int, source: str) -> RunRecord | None:
    where = f"{source}: row {index + 1}"
    required(row, ("n_prompt", "n_gen", "avg_ts"), where)
    prompt = number(row, "n_prompt", "prompt_tokens", where) or 0
    generated = number(row, "n_gen", "gen_tokens", where) or 0
    if prompt and generated:
        return None
    speed = number(row, "avg_ts", "decode_tok_s", where)
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
        engine="llama.cpp",
        engine_version=build,
        backend=str(row.get("backends", "")),
        mtp="none",
        kv_type=k if k == v else f"{k}/{v}",
        batch_concurrency=1.0,
        prompt_tokens=prompt or None,
        context_depth=number(row, "n_depth", "context_depth", where) or 0.0,
        gen_tokens=generated or None,
        micro_batch=number(row, "n_ubatch", "micro_batch", where),
        prefill_tok_s=speed if prompt else None,
        decode_tok_s=speed if generated else None,
        source_date=str(row.get("test_time", ""))[:10],
        fit_ok="yes",
        sweep=_stem(source),
        extra=rest(row, _USED, "llama-bench"),
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
    found = (_record(row, i, source) for i, row in enumerate(rows))
    return [r for r in found if r is not None]


def _read_json(text: str, source: str) -> list[RunRecord]:
    return _records(json_rows(text) or (), source)


def _is_json(text: str) -> bool:
    return has_fields(text, ("n_prompt", "n_gen", "avg_ts"))


def _is_csv(text: str) -> bool:
    header = text.lstrip().partition("\n")[0]
    return all(f in header.split(",") for f in ("n_prompt", "n_gen", "avg_ts"))


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
    build = re.search(r"^build: (\S+) \((\d+)\)", text, re.MULTILINE)
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(lines[2:]):
        cells = dict(zip(header, _cells(line), strict=False))
        where = f"{source}: row {i + 1}"
        test = _TEST.match(cells.get("test", ""))
        if test is None:
            if cells.get("test", "").startswith("pp"):
                continue  # prefill and generation in one figure
            raise RunFileError(
                f"{where}: test is {cells.get('test', '')!r}, expected pp512 or tg128"
            )
        kind, n, depth = test[1], int(test[2]), int(test[3] or 0)
        extra: dict[str, Any] = {k: cells[k] for k in ("ngl", "threads", "fa", "sm") if k in cells}
        rows.append(
            {
                **extra,
                "build_commit": build[1] if build else "",
                "build_number": build[2] if build else "",
                "model_type": cells.get("model", ""),
                "model_size": _quantity(cells.get("size", "")),
                "model_n_params": _quantity(cells.get("params", "")),
                "backends": cells.get("backend", ""),
                "type_k": cells.get("type_k", "f16"),
                "type_v": cells.get("type_v", "f16"),
                "n_ubatch": cells.get("n_ubatch", ""),
                "n_prompt": n if kind == "pp" else 0,
                "n_gen": n if kind == "tg" else 0,
                "n_depth": depth,
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

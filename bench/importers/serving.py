"""`vllm bench serve` (result JSON) and SGLang's `bench_serving` (JSON lines).

Both state means and medians over requests: `median_tpot_ms` is the time per output token of one
request, the first excluded, `median_ttft_ms` the time to its first token. Field names as in vLLM's
`vllm/benchmarks/serve.py` and SGLang's `python/sglang/bench_serving.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.importers.table import Format, has_fields, json_rows, number, required, rest
from bench.runs import RunRecord
from hwmodel.errors import RunFileError

_NEEDED = ("completed", "total_input_tokens", "total_output_tokens")
_USED = (
    "date", "backend", "endpoint_type", "model_id", "max_concurrency", "total_input_tokens",
    "total_output_tokens", "median_tpot_ms", "median_ttft_ms", "input_lens", "output_lens",
    "ttfts", "itls", "generated_texts", "errors", "start_times",
)  # fmt: skip
_ENGINES = {"vllm": "vLLM", "openai": "vLLM", "openai-chat": "vLLM", "sglang": "SGLang"}


def _records(rows: Iterable[Mapping[str, Any]], source: str, engine: str) -> list[RunRecord]:
    stem = re.split(r"[\\/]", source)[-1].rsplit(".", 1)[0] or "import"
    return [_record(row, i, source, stem, engine) for i, row in enumerate(rows)]


def _record(row: Mapping[str, Any], i: int, source: str, stem: str, engine: str) -> RunRecord:
    where = f"{source}: row {i + 1}"
    required(row, _NEEDED, where)
    if row.get("median_tpot_ms") is None and row.get("mean_tpot_ms") is None:
        raise RunFileError(f"{where}: no median_tpot_ms and no mean_tpot_ms")
    done, asked, given = (_count(row, key, where) for key in _NEEDED)
    if not done > 0:
        raise RunFileError(f"{where}: completed is {row['completed']!r}, no request was answered")
    tpot = "median_tpot_ms" if row.get("median_tpot_ms") is not None else "mean_tpot_ms"
    ttft = "median_ttft_ms" if row.get("median_ttft_ms") is not None else "mean_ttft_ms"
    ms = number(row, tpot, "ttft_ms", where)
    prompt, written = round(asked / done), round(given / done)
    accepted = row.get("accept_length") or row.get("spec_decode_acceptance_length")
    stated = str(row.get("backend") or row.get("endpoint_type") or "")
    return RunRecord(
        id=f"{stem}-{i + 1}",
        model=str(row.get("model_id") or row.get("model") or ""),
        engine=_ENGINES.get(stated, engine),
        mtp=f"accept length {accepted}" if accepted else "none",
        batch_concurrency=number(row, "max_concurrency", "batch_concurrency", where)
        or (done if str(row.get("request_rate")) in ("inf", "Infinity") else None),
        prompt_tokens=float(prompt),
        context_depth=float(prompt),
        gen_tokens=float(written),
        decode_tok_s=1000.0 / ms if ms else None,
        ttft_ms=number(row, ttft, "ttft_ms", where),
        source_date=_date(str(row.get("date", ""))),
        fit_ok="yes",
        sweep=stem,
        extra=rest(row, _USED, engine.lower()),
    )


def _count(row: Mapping[str, Any], key: str, where: str) -> float:
    """A whole number of requests or tokens.

    Raises:
        RunFileError: it is none.
    """
    value = row[key]
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise RunFileError(f"{where}: {key} is {value!r:.60}, expected a whole number")
    return float(value)


def _date(text: str) -> str:
    """vLLM writes `20260801-101500`."""
    found = re.match(r"(\d{4})-?(\d\d)-?(\d\d)", text)
    return "-".join(found.groups()) if found else ""


def _is_sglang(text: str) -> bool:
    return has_fields(text, (*_NEEDED, "median_e2e_latency_ms"))


def _is_vllm(text: str) -> bool:
    return has_fields(text, (*_NEEDED, "request_throughput"))


FORMATS = (
    Format(
        "SGLang bench_serving JSON lines",
        _is_sglang,
        lambda text, source: _records(json_rows(text) or (), source, "SGLang"),
    ),
    Format(
        "vllm bench serve JSON",
        _is_vllm,
        lambda text, source: _records(json_rows(text) or (), source, "vLLM"),
    ),
)

"""`vllm bench serve` (result JSON) and SGLang's `bench_serving` (JSON lines).

Both state means and medians over requests: `median_tpot_ms` is the time per output token of one
request, the first excluded, `median_ttft_ms` the time to its first token. Field names as in vLLM's
`vllm/benchmarks/serve.py` (to 0.32) and SGLang's `python/sglang/benchmark/serving.py` (to 0.5.23).

Either client drives any server: what it names as its backend says which, but for OpenAI's protocol
as such (`openai`, `openai-chat`), behind which any engine may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.importers.table import (
    Format,
    has_fields,
    is_number,
    json_rows,
    number,
    required,
    rest,
)
from bench.runs import RunRecord
from hwmodel import names
from hwmodel.errors import RunFileError

_NEEDED = ("completed", "total_input_tokens", "total_output_tokens")
_USED = (
    "date", "backend", "endpoint_type", "model_id", "max_concurrency", "total_input_tokens",
    "total_output_tokens", "median_tpot_ms", "median_ttft_ms", "input_lens", "output_lens",
    "ttfts", "itls", "generated_texts", "errors", "start_times", "failed",
)  # fmt: skip
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "trt": "TensorRT-LLM", "tensorrt": "TensorRT-LLM",
            "lmdeploy": "LMDeploy", "llamacpp": "llama.cpp", "llama.cpp": "llama.cpp"}  # fmt: skip


def _records(rows: Iterable[Mapping[str, Any]], source: str, engine: str) -> list[RunRecord]:
    stem = re.split(r"[\\/]", source)[-1].rsplit(".", 1)[0] or "import"
    found = [_record(row, i, source, stem, engine) for i, row in enumerate(rows)]
    if found and all(r.decode_tok_s is None and r.problems for r in found):
        raise RunFileError(f"{source}: row 1: {found[0].problems[0]}")
    return found


def _record(row: Mapping[str, Any], i: int, source: str, stem: str, engine: str) -> RunRecord:
    where = f"{source}: row {i + 1}"
    required(row, _NEEDED, where)
    done, asked, given = (_count(row, key, where) for key in _NEEDED)
    failed = _failed(row)
    ttft = "median_ttft_ms" if row.get("median_ttft_ms") is not None else "mean_ttft_ms"
    ms, remark = _tpot_ms(row, done, given, where) if done else (None, "")
    prompt, written = (round(n / done) if done else 0 for n in (asked, given))
    model = str(row.get("model_id") or row.get("model") or "")
    return RunRecord(
        id=f"{stem}-{i + 1}",
        model=model,
        quant=_quant_in(model),
        engine=_engine(row, engine),
        mtp=_drafts(row),
        batch_concurrency=_users(row, done, where),
        prompt_tokens=float(prompt) if done else None,
        context_depth=float(prompt) if done else None,
        gen_tokens=float(written) if done else None,
        decode_tok_s=1000.0 / ms if ms and done else None,
        ttft_ms=number(row, ttft, "ttft_ms", where) if done else None,
        notes="; ".join(filter(None, (remark, _failures(failed, done)))),
        source_date=_date(str(row.get("date", ""))),
        fit_ok="failed requests" if failed or not done else "yes",
        sweep=stem,
        problems=() if done else (f"completed is {row['completed']!r}, no request was answered",),
        extra=rest(row, _USED, engine.lower()),
    )


def _failed(row: Mapping[str, Any]) -> int:
    """Requests that failed: counted, or (SGLang, with details) those with a message."""
    if type(row.get("failed")) is int:
        return max(0, int(row["failed"]))
    errors = row.get("errors")
    return sum(map(bool, errors)) if isinstance(errors, list) else 0


def _failures(failed: int, done: float) -> str:
    return f"{failed} of {failed + round(done)} requests failed" if failed else ""


def _tpot_ms(
    row: Mapping[str, Any], done: float, tokens: float, where: str
) -> tuple[float | None, str]:
    """Time per output token, and a remark where it follows from the mean latency (older
    versions of SGLang write none) or where there is none, since answers had one token each.

    Raises:
        RunFileError: neither is there.
    """
    if tokens <= done:
        return None, "answers of one token, which have a time to the first token only"
    for key in ("median_tpot_ms", "mean_tpot_ms"):
        if row.get(key) is not None:
            return number(row, key, "ttft_ms", where), ""
    whole = number(row, "mean_e2e_latency_ms", "ttft_ms", where)
    first = number(row, "mean_ttft_ms", "ttft_ms", where)
    first = first or number(row, "median_ttft_ms", "ttft_ms", where)
    if whole is None or first is None or not tokens > done or not whole > first:
        raise RunFileError(f"{where}: no median_tpot_ms and no mean_tpot_ms")
    return (whole - first) / (tokens / done - 1), "time per token from the mean latency"


def _users(row: Mapping[str, Any], done: float, where: str) -> float | None:
    """Requests at the same time: the limit where they came as fast as it let them, else the mean
    that was seen, stated or by Little's law (requests a second times their latency)."""
    endless = str(row.get("request_rate")).lower() in ("inf", "infinity")
    limit = number(row, "max_concurrency", "batch_concurrency", where)
    if not done:
        return limit
    seen = row.get("concurrency")
    if not (is_number(seen) and seen > 0):
        latency = row.get("mean_e2e_latency_ms") or row.get("mean_e2el_ms") or 0
        seconds = row.get("duration") or 0
        known = all(is_number(v) and v > 0 for v in (latency, seconds))
        seen = done / seconds * latency / 1000 if known else None
    if endless and limit:
        return limit
    if seen is None:
        return limit or (done if endless else None)
    return max(1.0, round(float(min(seen, limit or done)), 1))


def _drafts(row: Mapping[str, Any]) -> str:
    """Most drafts a step, where vLLM's counters tell them, and tokens that a step gave."""
    accepted = row.get("accept_length") or row.get("spec_decode_acceptance_length")
    if not is_number(accepted) or not accepted > 0:
        return "none"
    told = f"accept length {accepted:.4g}"
    positions = row.get("spec_decode_per_position_acceptance_rates")
    if isinstance(positions, list) and 0 < len(positions) <= 64:
        return f"{len(positions)} drafts, {told}"  # ngram drafts fewer where it finds fewer
    tokens, steps = row.get("spec_decode_draft_tokens"), row.get("spec_decode_num_drafts")
    if type(tokens) is int and type(steps) is int and 0 < steps <= tokens <= 64 * steps:
        return f"{round(tokens / steps)} drafts, {told}"
    return told


def _engine(row: Mapping[str, Any], client: str) -> str:
    """The engine behind the endpoint; empty where the file does not tell."""
    stated = str(row.get("backend") or row.get("endpoint_type") or client).lower()
    if "spec_decode_num_drafts" in row:  # asked of vLLM's own counters
        return "vLLM"
    return _ENGINES.get(re.split(r"[-_]", stated)[0], "")


def _quant_in(model: str) -> str:
    """The type that a repository's name ends with (`...-FP8`), or empty."""
    ending = model.rpartition("-")[2]
    return ending if "-" in model and names.canonical("quant", ending) is not None else ""


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
    return has_fields(text, ("completed", "median_e2e_latency_ms"))  # vLLM: median_e2el_ms


def _is_vllm(text: str) -> bool:
    return has_fields(text, ("completed", "request_throughput"))


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

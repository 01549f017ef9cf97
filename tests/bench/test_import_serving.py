"""Runs of `vllm bench serve` and SGLang's bench_serving, read by field name.

Written by the tools themselves, of a tiny model with random weights (called step-mini as the
embedded one, which llama-server had) on a busy machine, since their format is the point; texts,
messages and lists of latencies shortened afterwards:

* `vllm-0.32-*.json`: vLLM 0.32.0 for processors, `vllm bench serve --dataset-name random
  --save-result` against its own server with ngram drafts: `-drafts` with `--max-concurrency 2`,
  then 1 and `--append-result`; `-some-fail` with `--save-detailed`, prompts partly beyond the
  context; `-rate` with `--backend openai-chat --request-rate 3 --save-detailed --goodput
  --metadata --percentile-metrics ttft,tpot,itl,e2el`. `-llama-server`: the same client against
  llama-server (build 0c1e570) with `--backend openai` (one token each), `openai-chat
  --save-detailed`, and prompts that are all too long.
* `sglang-0.5.23.jsonl`: SGLang 0.5.23, `python -m sglang.bench_serving --dataset-name sharegpt`:
  `--backend vllm --max-concurrency 2` against vLLM; `sglang-oai-chat --request-rate 4
  --output-details` and `sglang-oai --max-concurrency 2` against llama-server; `vllm-chat
  --output-details` with prompts partly beyond vLLM's context.

`vllm-serve.json` and `sglang-serving.jsonl` are written by hand after those tools' result fields.
What others published of files that the tools wrote:

* `vllm-serve-drafts.json`, `vllm-sweep.json` (two runs of a sweep, and one that failed as a whole):
  vLLM 0.25.1, fixtures of github.com/er0080/vllm-benchmarking (commits c066a05, 57cb02c, c7b7c1e);
* `sglang-serving-2025.jsonl`: SGLang of early 2025 (Llama 3.3 70B), three of the lines that
  github.com/datacrunch-research/h200-benchmarks has in sglang/outputs (commit c091ef5).
"""

import json
from pathlib import Path

import pytest

from bench.importers.read import Imported, import_runs
from bench.importers.table import Stated

DATA = Path(__file__).parent / "data"
FULL = Stated(model="step-3.5-flash", device="m4max", quant="Q4_0", n_devices=1)


def _import(name: str, stated: Stated = FULL) -> Imported:
    return import_runs(str(DATA / name), stated)


def test_vllm_speed_is_the_inverse_of_its_median_tpot() -> None:
    (run,) = _import("vllm-serve.json", Stated(device="h100", quant="FP8", n_devices=8)).records
    assert run.decode_tok_s == pytest.approx(1000 / 18.2) and run.ttft_ms == 228
    assert (run.prompt_tokens, run.gen_tokens, run.batch_concurrency) == (1024, 512, 8)
    assert run.model == "stepfun-ai/Step-3.5-Flash-FP8" and run.source_date == "2026-08-01"
    assert run.extra["vllm:p99_ttft_ms"] == "262.1"


def test_vllm_drafts_are_counted_and_their_acceptance_kept() -> None:
    """1260 verifications of 3780 drafts; 3.16 tokens each."""
    (run,) = _import("vllm-serve-drafts.json", Stated(device="h100")).records
    assert (run.drafts, run.mtp) == (3, "3 drafts, accept length 3.161")
    assert run.decode_tok_s == pytest.approx(1000 / 14.4168, rel=1e-4)
    assert (run.quant, run.batch_concurrency, run.gen_tokens) == ("FP8", 2, 498)
    told = "vllm:spec_decode_per_position_acceptance_rates"
    assert run.extra[told] == "0.85 0.716667 0.594444"
    assert run.extra["vllm:mean_itl_ms"].startswith("45.7")


def test_a_sweep_keeps_the_run_that_failed_and_says_so() -> None:
    found = _import("vllm-sweep.json", Stated(device="h100", quant="BF16"))
    first, second, failed = found.records
    assert first.decode_tok_s == pytest.approx(1000 / 8.32349, rel=1e-4)
    assert second.extra["vllm:max_num_seqs"] == "4" and second.fit_ok == "yes"
    assert failed.decode_tok_s is failed.ttft_ms is None and failed.fit_ok == "failed requests"
    assert failed.notes == "8 of 8 requests failed"
    assert [p for p in found.problems if "no request was answered" in p]


def test_sglang_keeps_one_record_a_line_and_its_acceptance() -> None:
    alone, crowd = _import("sglang-serving.jsonl").records
    assert alone.engine == "SGLang" and alone.mtp == "accept length 2.7"
    assert (alone.batch_concurrency, crowd.batch_concurrency) == (1, 16)
    assert crowd.decode_tok_s == pytest.approx(1000 / 17.9)


def test_sglang_lines_without_a_time_per_token_follow_from_the_mean_latency() -> None:
    """(7840.6 - 85.7) ms over 534.5 - 1 tokens; requests a second times latency are the users."""
    alone, chat, flood = _import("sglang-serving-2025.jsonl", Stated(device="h200")).records
    assert alone.decode_tok_s == pytest.approx(1000 * (160347 / 300 - 1) / (7840.616 - 85.745))
    assert alone.notes == "time per token from the mean latency"
    assert (alone.batch_concurrency, chat.batch_concurrency) == (7.9, 40.5)
    assert flood.batch_concurrency == 1974.6  # 3000 at once is not what the server worked on
    assert alone.engine == "SGLang" and alone.extra["sglang:median_itl_ms"].startswith("13.6")


def test_a_limit_that_is_not_reached_is_no_number_of_users(tmp_path: Path) -> None:
    """5 requests a second kept 11.8 of the 256 allowed busy."""
    row = {"completed": 1000, "total_input_tokens": 302118, "total_output_tokens": 195775,
           "request_rate": 5.0, "max_concurrency": 256, "concurrency": 11.780263,
           "request_throughput": 4.889, "median_e2e_latency_ms": 1537.9,
           "median_tpot_ms": 11.829}  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "request_rate": "inf"}) + "\n")
    assert [r.batch_concurrency for r in import_runs(str(path), FULL).records] == [11.8, 256]


def test_numbers_too_large_to_compute_with_say_nothing(tmp_path: Path) -> None:
    row = {"completed": 10, "total_input_tokens": 100, "total_output_tokens": 100,
           "request_throughput": 1, "mean_tpot_ms": 1, "duration": 1}  # fmt: skip
    path = tmp_path / "x.json"
    for key in ("accept_length", "concurrency", "mean_e2e_latency_ms"):
        path.write_text(json.dumps({**row, key: 10**400}))
        (run,) = import_runs(str(path), FULL).records
        assert (run.mtp, run.batch_concurrency) == ("none", None)


def test_files_that_vllm_wrote_here() -> None:
    """As many drafts as it is set to, though ngram found 2.5 a step; 2 of 6 prompts too long."""
    crowd, alone = _import("vllm-0.32-drafts.json", Stated(device="local")).records
    rows = [json.loads(x) for x in (DATA / "vllm-0.32-drafts.json").read_text().splitlines()]
    for run, row in zip((crowd, alone), rows, strict=True):
        assert run.decode_tok_s == pytest.approx(1000 / row["median_tpot_ms"])
        assert run.ttft_ms == row["median_ttft_ms"] and run.fit_ok == "yes"
        assert (run.engine, run.drafts, run.prompt_tokens, run.gen_tokens) == ("vLLM", 3, 64, 32)
        assert (
            row["spec_decode_draft_tokens"] == 2.5 * row["spec_decode_num_drafts"] or run is crowd
        )
    assert rows[1]["spec_decode_draft_tokens"] == 2.5 * rows[1]["spec_decode_num_drafts"]
    assert (crowd.batch_concurrency, alone.batch_concurrency) == (2, 1)
    assert (crowd.mtp, alone.extra["vllm:label"]) == ("3 drafts, accept length 3.392", "second")
    (failed,) = _import("vllm-0.32-some-fail.json").records
    assert (failed.notes, failed.fit_ok) == ("2 of 6 requests failed", "failed requests")
    assert failed.decode_tok_s == pytest.approx(222.9014, rel=1e-4)


def test_a_rate_of_requests_keeps_as_many_users_busy_as_were_seen() -> None:
    """Six requests in 2.15 s that took 0.91 s each; what --metadata added is kept."""
    (run,) = _import("vllm-0.32-rate.json").records
    assert run.batch_concurrency == round(6 / 2.1498514 * 0.9124174, 1) == 2.5
    assert run.extra["vllm:machine"] == "here" and run.extra["vllm:request_goodput"].startswith(
        "0."
    )


def test_openais_protocol_does_not_name_the_engine_behind_it() -> None:
    """`vllm bench serve` measured llama-server here."""
    found = _import("vllm-0.32-llama-server.json", Stated(device="local", quant="Q4_0"))
    assert {r.engine for r in found.records} == {""}
    assert found.problems[0] == ("3 runs: the file does not say the engine; --engine NAME adds it")
    told = _import("vllm-0.32-llama-server.json", Stated(engine="llama.cpp")).records
    assert {r.engine for r in told} == {"llama.cpp"}


def test_answers_of_one_token_have_no_speed_of_decoding() -> None:
    one, several, failed = _import("vllm-0.32-llama-server.json").records
    assert one.decode_tok_s is None and one.ttft_ms == pytest.approx(762.12447)
    assert (one.gen_tokens, one.fit_ok, one.problems) == (1, "yes", ())
    assert one.notes.startswith("answers of one token")
    assert several.decode_tok_s == pytest.approx(2.5815, rel=1e-4)
    assert (failed.decode_tok_s, failed.notes) == (None, "3 of 3 requests failed")


def test_lines_that_sglangs_client_wrote_here() -> None:
    """The engine is what --backend says; failures are told by --output-details only."""
    found = _import("sglang-0.5.23.jsonl", Stated(device="local", quant="Q4_0"))
    assert [r.engine for r in found.records] == ["vLLM", "SGLang", "SGLang", "vLLM"]
    assert [r.batch_concurrency for r in found.records] == [2, 5, 2, 4.1]
    assert [r.notes for r in found.records] == ["", "", "", "3 of 8 requests failed"]
    assert found.records[0].decode_tok_s == pytest.approx(1000 / 1.06088, rel=1e-4)
    assert found.problems == ("4 runs: the file does not say the model; --model NAME adds it",)

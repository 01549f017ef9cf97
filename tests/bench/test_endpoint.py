"""The streaming client against servers of known speed, and servers that misbehave."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.runners.base import RunnerError, RunnerTest
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Client
from bench.runners.texts import prompt

FIRST_S, EACH_S = 0.06, 0.01
TEST = RunnerTest(Path(""), n_prompt=100, n_gen=12)


class Server:
    """An endpoint that sends the first token after `first_s` and one every `each_s` from then on.

    It notes when it sent them, so that tests hold on a busy machine too.

    `script` may take the place of the stream: it writes to the handler itself.
    """

    def __init__(self) -> None:
        self.first_s, self.each_s = FIRST_S, EACH_S
        self.reasoning = 0
        self.usage: dict[str, Any] | None = {}
        self.timings: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.meta_info: dict[str, Any] = {}
        self.script: Callable[[Any], None] | None = None
        self.pages: dict[str, str] = {"/v1/models": '{"data": [{"id": "tiny", "owned_by": "me"}]}'}
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.sent: list[float] = []  # when the last answer's pieces were really sent
        self.together: threading.Barrier | None = None  # answers begin when so many are asked
        self.lock = threading.Lock()

    def answer(self, handler: Any, body: dict[str, Any]) -> None:
        with self.lock:
            self.bodies.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            scripted = self.script is not None and body["max_tokens"] > 2
            if not (scripted and self.script is http_error):
                handler.send_response(200)
                handler.end_headers()
            if scripted and self.script is not None:
                self.script(handler)
                return
            self.tokens(handler, body["max_tokens"])
            self.finish(handler, body)
        finally:
            with self.lock:
                self.now -= 1

    def tokens(self, handler: Any, count: int) -> None:
        began = time.perf_counter()
        if self.together is not None and count > 2:
            self.together.wait(30)
        due = began + self.first_s
        sent = []
        for i in range(count):
            time.sleep(max(0.0, due - time.perf_counter()))
            sent.append(time.perf_counter() - began)
            self.sent = sent
            name = "reasoning_content" if i < self.reasoning else "content"
            handler.event({"choices": [{"delta": {name: "x"}}]})
            due += self.each_s

    def finish(self, handler: Any, body: dict[str, Any]) -> None:
        count, asked = body["max_tokens"], len(body["messages"][0]["content"])
        last = {"delta": {}, "finish_reason": "length", "meta_info": self.meta_info}
        handler.event({"choices": [last], "timings": self.timings})
        if self.usage is not None:
            usage = {"prompt_tokens": asked // 4, "completion_tokens": count, **self.usage}
            handler.event({"choices": [], "usage": usage, "metrics": self.metrics})
        handler.raw(b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = made.pages.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write((page or "{}").encode())

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            with contextlib.suppress(OSError):  # the client went away
                made.answer(self, body)

        def raw(self, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()

        def event(self, value: dict[str, Any]) -> None:
            self.raw(b"data: " + json.dumps(value).encode() + b"\n\n")

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    made.url = f"http://127.0.0.1:{web.server_port}"  # type: ignore[attr-defined]
    yield made
    web.shutdown()
    web.server_close()


def runner(server: Server, timeout: float = 60.0, **more: Any) -> EndpointRunner:
    return EndpointRunner(Client(server.url, timeout_s=timeout), **more)  # type: ignore[attr-defined]


def test_times_are_those_of_the_pieces(server: Server) -> None:
    """None came before it was sent; how long after depends on the machine's load."""
    kept: list[dict[str, Any]] = []
    found = runner(server, requests=1, keep=kept.append).measure(TEST)
    record, came = found.record, kept[-1]["arrivals"]
    assert len(came) == 12 and all(a >= s for a, s in zip(came, server.sent, strict=True))
    assert (record["ttft_s"], record["tpot_s"]) == (came[0], (came[-1] - came[0]) / 11)
    assert found.samples_ts == (1 / record["tpot_s"],)
    assert found.samples_ns == (round(1e9 * came[-1]),)
    assert record["itl_median_s"] == median(b - a for a, b in pairwise(came))
    assert (record["complete"], record["n_gen"], record["errors"]) == (1, 12, [])
    assert record["tokens_counted_by"] == "server"


def test_a_slow_first_token_is_no_part_of_the_time_per_token(server: Server) -> None:
    server.first_s = 0.4
    found = runner(server, requests=1).measure(TEST)
    assert found.record["ttft_s"] >= server.sent[0] >= 0.4
    whole = found.samples_ns[0] / 1e9
    assert 11 * found.record["tpot_s"] == pytest.approx(whole - found.record["ttft_s"])


def test_tokens_that_come_several_at_a_time_are_counted_by_the_server(server: Server) -> None:
    server.usage = {"completion_tokens": 34}  # three in most of the 12 pieces, as with drafts
    kept: list[dict[str, Any]] = []
    found = runner(server, requests=1, keep=kept.append).measure(TEST).record
    came = kept[-1]["arrivals"]
    assert found["n_gen"] == 34
    assert 33 * found["tpot_s"] == pytest.approx(came[-1] - came[0])
    assert found["itl_median_s"] == median(b - a for a, b in pairwise(came))


@pytest.mark.parametrize("usage", [None, {"completion_tokens": -4}, {"completion_tokens": 10**9}])
def test_without_a_count_that_can_be_pieces_are_counted(
    server: Server, usage: dict[str, Any] | None
) -> None:
    server.usage = usage
    found = runner(server, requests=1).measure(TEST).record
    assert (found["n_gen"], found["tokens_counted_by"]) == (12, "pieces")


def test_reasoning_is_counted_and_is_the_first_token(server: Server) -> None:
    server.reasoning = 5
    server.usage = {"completion_tokens_details": {"reasoning_tokens": 5}}
    found = runner(server, requests=2).measure(TEST).record
    assert (found["reasoning_tokens"], found["reasoning_pieces"]) == (10, 10)
    assert found["ttft_s"] >= FIRST_S
    assert found["n_gen"] == 12


def test_acceptance_as_llama_server_reports_it(server: Server) -> None:
    server.timings = {"draft_n": 10, "draft_n_accepted": 7}
    found = runner(server, requests=2).measure(TEST).record
    assert (found["drafted"], found["accepted"], found["acceptance"]) == (20, 14, 0.7)


def _grow(server: Server, page: str, text: Callable[[int], str]) -> Callable[[Any], None]:
    """A page that has counted once more after each measured answer."""
    server.pages[page] = text(0)
    done: list[Any] = []

    def kept(request: dict[str, Any]) -> None:
        if request["kind"] == "measured":
            done.append(request)
            server.pages[page] = text(len(done))

    return kept


def test_acceptance_as_vllm_counts_it(server: Server) -> None:
    """Counters of two engines on one page, since the server began (docs.vllm.ai, metrics)."""
    server.pages["/v1/models"] = '{"data": [{"id": "tiny", "owned_by": "vllm"}]}'

    def counters(n: int) -> str:
        lines = ["# TYPE vllm:spec_decode_num_drafts_total counter"]
        for engine in (0, 1):
            for name, value in (("drafts", 50 + 10 * n), ("draft_tokens", 150 + 30 * n),
                                ("accepted_tokens", 90 + 21 * n)):  # fmt: skip
                lines.append(f'vllm:spec_decode_num_{name}_total{{engine="{engine}"}} {value}.0')
            for position, value in enumerate((40 + 9 * n, 30 + 7 * n, 20 + 5 * n)):
                lines.append(
                    f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="{engine}",'
                    f'position="{position}"}} {value}.0'
                )
        return "\n".join(lines)

    asked = runner(server, requests=1, keep=_grow(server, "/metrics", counters))
    measured = asked.measure(TEST)
    record = measured.record
    assert measured.engine == "vLLM"
    assert (record["drafted"], record["accepted"], record["acceptance"]) == (60, 42, 0.7)
    assert (record["drafts_a_step"], record["acceptance_length"]) == (3, 3.1)
    assert record["accepted_by_position"] == [0.9, 0.7, 0.5]


def test_acceptance_as_vllm_tells_it_in_each_answer(server: Server) -> None:
    """With --per-request-spec-decode-metrics; figures of the documentation's example."""
    told = {"num_spec_steps": 43, "num_accepted_draft_tokens": 10, "num_draft_tokens": 129}
    server.metrics = {"speculative_decoding": told}
    record = runner(server, requests=2).measure(TEST).record
    assert (record["drafted"], record["accepted"]) == (258, 20)
    assert record["acceptance_length"] == pytest.approx(1.2325581395348837)
    assert record["acceptance"] == pytest.approx(0.07751937984496124)
    assert (record["drafts_a_step"], record["acceptance_told_by"]) == (3, "each answer")


SGLANG = '{"data": [{"id": "tiny", "owned_by": "sglang"}]}'


def test_acceptance_as_sglang_counts_it(server: Server) -> None:
    """Every request's first token comes from its prompt; the others from verifications."""
    server.pages["/v1/models"] = SGLANG
    server.pages["/server_info"] = json.dumps(
        {"version": "0.5.6", "speculative_num_steps": 3, "speculative_num_draft_tokens": 4,
         "internal_states": [{"avg_spec_accept_length": 1.9}]}
    )  # fmt: skip

    def counters(n: int) -> str:
        return (
            f'sglang:spec_verify_calls_total{{model_name="tiny"}} {7 + 4 * n}.0\n'
            f'sglang:generation_tokens_total{{model_name="tiny"}} {90 + 11 * n}.0\n'
            f'sglang:num_requests_total{{model_name="tiny"}} {5 + n}.0\n'
            'sglang:spec_accept_length{model_name="tiny"} 9.0\n'
        )

    measured = runner(server, requests=2, keep=_grow(server, "/metrics", counters)).measure(TEST)
    record = measured.record
    assert (measured.engine, measured.build) == ("SGLang", "0.5.6")
    assert (record["drafted"], record["accepted"]) == (24, 12)  # 8 verifications gave 20 tokens
    assert record["acceptance_length"] == 2.5 and record["drafts_a_step"] == 3
    assert record["acceptance_told_by"] == "the server's counters"


@pytest.mark.parametrize("page", ["/server_info", "/get_server_info"])
def test_acceptance_of_a_sglang_that_tells_its_mean_only(server: Server, page: str) -> None:
    server.pages["/v1/models"] = SGLANG
    server.pages[page] = json.dumps(
        {"speculative_num_draft_tokens": 4, "internal_states": [
            {"avg_spec_accept_length": 2.2}, {"avg_spec_accept_length": 2.6}]}
    )  # fmt: skip
    record = runner(server, requests=1).measure(TEST).record
    assert record["acceptance_length"] == pytest.approx(2.4)
    assert record["acceptance"] == pytest.approx(1.4 / 3) and record["drafted"] is None
    assert "since it began" in record["acceptance_told_by"]


@pytest.mark.parametrize(
    "told",
    [
        {"spec_num_proposed_drafts": 30, "spec_num_correct_drafts": 21, "spec_verify_ct": 10},
        {"spec_draft_token_num": 30, "spec_accept_token_num": 21, "spec_verify_ct": 10},
    ],
)
def test_acceptance_that_sglang_puts_into_the_answer(server: Server, told: dict[str, int]) -> None:
    server.meta_info = told
    record = runner(server, requests=1).measure(TEST).record
    assert (record["drafted"], record["accepted"], record["acceptance_length"]) == (30, 21, 3.1)


def test_pages_of_nonsense_give_no_acceptance(server: Server) -> None:
    server.pages["/v1/models"] = SGLANG
    server.pages["/metrics"] = "sglang:spec_verify_calls_total 1e400\nsglang:x{ 3\n"
    server.pages["/server_info"] = '{"internal_states": "oops", "speculative_num_steps": true}'
    record = runner(server, requests=1).measure(TEST).record
    assert record["acceptance"] is record["acceptance_length"] is None


def test_so_many_requests_run_at_the_same_time(server: Server) -> None:
    server.together = threading.Barrier(4)
    found = runner(server, timeout=60.0, concurrency=4, requests=8).measure(TEST).record
    assert server.most == 4
    assert (found["requests"], found["complete"]) == (8, 8)
    most = 4 * 12 / (FIRST_S + 11 * EACH_S)
    assert 0 < found["aggregate_tok_s"] <= most


def test_prompts_are_real_text_none_twice_and_about_as_long_as_asked(server: Server) -> None:
    runner(server, requests=3).measure(TEST)
    texts = [b["messages"][0]["content"] for b in server.bodies]
    assert len({t[:60] for t in texts}) == len(texts) == 4  # the warm-up included
    assert all(len(t) // 4 == pytest.approx(100, rel=0.1) for t in texts[1:])
    assert "def " in prompt(1, 4000) and len(prompt(3, 500_000)) == pytest.approx(500_000, rel=0.01)
    assert all(b["stream"] for b in server.bodies)
    options = {k: v for k, v in server.bodies[-1].items() if k != "messages"}
    assert options == {"model": "tiny", "stream": True, "stream_options": {"include_usage": True},
                       "temperature": 0, "max_tokens": 12}  # fmt: skip


def drops(handler: Any) -> None:
    for _ in range(4):
        handler.event({"choices": [{"delta": {"content": "x"}}]})
        time.sleep(EACH_S)


def test_partial_answers_are_kept_and_marked(server: Server) -> None:
    server.script, kept = drops, []
    found = runner(server, requests=2, keep=kept.append).measure(TEST).record
    assert (found["complete"], found["n_gen"]) == (0, 4)
    assert found["errors"] == ["the answer stopped midway, after 4 pieces"] * 2
    measured = [r for r in kept if r["kind"] == "measured"]
    assert [len(r["arrivals"]) for r in measured] == [4, 4]
    assert all(r["error"] for r in measured)


def test_one_broken_answer_does_not_spoil_the_others(server: Server) -> None:
    turns = iter([False, True, False])

    def sometimes(handler: Any) -> None:
        if next(turns):
            drops(handler)
        else:
            body = server.bodies[-1]
            server.tokens(handler, 12)
            server.finish(handler, body)

    server.script = sometimes
    found = runner(server, requests=3).measure(TEST).record
    assert (found["complete"], found["requests"], found["n_gen"]) == (2, 3, 12)
    assert len(found["errors"]) == 1


def http_error(handler: Any) -> None:
    handler.send_response(503)
    handler.end_headers()
    handler.raw(b'{"error": {"message": "loading\\n the model"}}')


def nonsense(handler: Any) -> None:
    handler.raw(b"<html>hello</html>\n")


def no_json(handler: Any) -> None:
    handler.raw(b"data: {{{\n\n")


def a_list(handler: Any) -> None:
    handler.raw(b"data: [1, 2]\n\n")


def says_error(handler: Any) -> None:
    handler.event({"error": {"message": "out of memory"}})


def silent(handler: Any) -> None:
    time.sleep(0.6)


def empty(handler: Any) -> None:
    handler.raw(b"data: [DONE]\n\n")


def no_http(handler: Any) -> None:
    handler.event({"choices": [{"delta": "text"}]})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (http_error, "HTTP 503: loading the model"),
        (nonsense, "no stream of events: '<html>hello"),
        (no_json, r"no event of a completion: '\{\{\{'"),
        (a_list, r"no event of a completion: '\[1, 2\]'"),
        (says_error, "the server says: .*out of memory"),
        (silent, r"no answer within 0\.3 s"),
        (empty, "an answer without text"),
        (no_http, "no event of a completion"),
    ],
)
def test_a_server_that_misbehaves_gives_one_sentence(
    server: Server, script: Callable[[Any], None], message: str
) -> None:
    asked = runner(server, timeout=0.3 if script is silent else 30.0, requests=1)
    _ = asked.model
    server.script = script
    server.first_s = 0.0
    with pytest.raises(RunnerError, match=message) as caught:
        asked.measure(TEST)
    assert "\n" not in str(caught.value)


def test_endpoints_that_are_not_there(server: Server) -> None:
    with pytest.raises(RunnerError, match="cannot be reached"):
        EndpointRunner(Client("http://127.0.0.1:9", timeout_s=1)).measure(TEST)
    for url in ("ftp://x", "http://", "http://a b", "http://x:99999"):
        with pytest.raises(RunnerError, match="no endpoint, expected such as"):
            Client(url)
    server.pages = {}
    with pytest.raises(RunnerError, match="lists no model at /v1/models"):
        runner(server).measure(TEST)

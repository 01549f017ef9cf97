"""Servers that misbehave: whatever came is kept and marked, and the reason is one sentence."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoint_server import EACH_S, TEST, Server, known_speed, runner

from bench.runners.base import RunnerError
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Client


@pytest.fixture
def server() -> Iterator[Server]:
    with known_speed() as made:
        yield made


def drops(handler: Any) -> None:
    for _ in range(4):
        handler.event({"choices": [{"delta": {"content": "x"}}]})
        time.sleep(EACH_S)


def test_partial_answers_are_kept_and_marked(server: Server) -> None:
    server.script = drops
    kept: list[dict[str, Any]] = []
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


def test_an_error_that_is_null_is_none(server: Server) -> None:
    """Some servers and gateways write every field of their answers."""

    def writes_all(handler: Any) -> None:
        handler.event({"error": None, "choices": [{"delta": {"content": "x"}}]})
        server.tokens(handler, 11)
        server.finish(handler, server.bodies[-1])

    server.script = writes_all
    found = runner(server, requests=1).measure(TEST).record
    assert (found["complete"], found["n_gen"], found["errors"]) == (1, 12, [])


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
    handler.rfile.read(1)  # until the client has gone, however late


def impatient(server: Server) -> EndpointRunner:
    """What waits 0.3 s for measured answers, and long for pages and the warm-up: those come, but on
    a busy machine late."""
    client = Client(server.url, timeout_s=60.0)

    def waits(request: dict[str, Any]) -> None:
        client.timeout_s = 0.3 if request["kind"] == "warm-up" else 60.0

    return EndpointRunner(client, requests=1, keep=waits)


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
    asked = impatient(server) if script is silent else runner(server, requests=1)
    _ = asked.model
    server.script, server.own_status = script, script is http_error
    server.first_s = 0.0
    with pytest.raises(RunnerError, match=message) as caught:
        asked.measure(TEST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "header", "says"),
    [
        (401, ("X", "y"), "HTTP 401: who are you; --api-key-env NAME names the variable"),
        (308, ("Location", "http://b:1/v1"), "HTTP 308: .*sends on to http://b:1/v1, give that"),
    ],
)
def test_a_refusal_that_the_user_can_mend_says_how(
    server: Server, status: int, header: tuple[str, str], says: str
) -> None:
    def refuses(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header(*header)
        handler.end_headers()
        handler.raw(b'{"error": "who are you"}')

    server.script, server.own_status = refuses, True
    with pytest.raises(RunnerError, match=says):
        runner(server, requests=1).measure(TEST)
    if status == 401:
        with pytest.raises(RunnerError, match=r"who are you$"):
            EndpointRunner(Client(server.url, "key"), requests=1).measure(TEST)


def test_endpoints_that_are_not_there(server: Server) -> None:
    with pytest.raises(RunnerError, match="cannot be reached"):
        EndpointRunner(Client("http://127.0.0.1:9", timeout_s=1)).measure(TEST)
    for url in ("ftp://x", "http://", "http://a b", "http://x:99999"):
        with pytest.raises(RunnerError, match="no endpoint, expected such as"):
            Client(url)
    server.pages = {}
    with pytest.raises(RunnerError, match="lists no model at /v1/models"):
        runner(server).measure(TEST)


def test_a_server_that_ends_for_good_leaves_what_was_measured(server: Server) -> None:
    """Its version is not asked for afterwards, when nobody is there to answer."""
    server.pages["/version"] = '{"version": "1.2"}'

    def leave(request: dict[str, Any]) -> None:
        if request["kind"] == "measured":
            server.pages = {}
            server.leave()

    found = runner(server, requests=1, keep=leave).measure(TEST)
    assert (found.build, found.record["complete"]) == ("1.2", 1)


def test_a_llama_server_that_drafts_and_is_silent_gets_the_likely_reason(server: Server) -> None:
    """Its draft context has no pool of threads, and the target's goes on polling."""
    server.pages["/props"] = '{"build_info": "b1"}'
    server.pages["/slots"] = '[{"id": 0, "speculative": true}]'
    server.script = silent
    with pytest.raises(RunnerError, match=r"no answer within 0\.3 s; .* start it with --poll 0"):
        impatient(server).measure(TEST)
    server.pages["/slots"] = '{"error": "[["}'
    with pytest.raises(RunnerError, match=r"no answer within 0\.3 s$"):
        impatient(server).measure(TEST)

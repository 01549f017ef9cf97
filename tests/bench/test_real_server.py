"""The streaming client against the recorded bytes of a real server.

`streams/llama-cpp-python.json` was written by tests/golden/make_server_streams.py, which also runs
the client against that server itself. It is unlike the server of test_endpoint.py in what it does
not do: it counts nothing in a stream, leaves reasoning in the text, answers a prompt that is too
long with an empty stream, and breaks one answer off when the next is asked for.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from replayed_server import recorded, replay

from bench.runners.base import RunnerError, RunnerTest
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Answer, Client

STREAMS = recorded("llama-cpp-python")
TEST = RunnerTest(Path(""), n_prompt=100, n_gen=12)


@pytest.fixture
def replayed() -> Iterator[tuple[str, dict[str, str]]]:
    """An address, and which recorded answer it gives to streamed and to whole requests."""
    given = {"stream": "plain", "whole": "at once"}
    with replay(STREAMS, given) as url:
        yield url, given


def _ask(url: str) -> Answer:
    return Client(url, timeout_s=30).ask({"stream": True})


def test_the_server_is_known_by_its_description(replayed: tuple[str, dict[str, str]]) -> None:
    runner = EndpointRunner(Client(replayed[0]))
    assert (runner.engine, runner.version) == ("llama.cpp", "llama-cpp-python 0.3.36")
    assert runner.model == "step-mini-q4_0.gguf"


def test_an_answer_without_counts_is_counted_in_pieces(
    replayed: tuple[str, dict[str, str]],
) -> None:
    answer = _ask(replayed[0])
    assert (answer.tokens, answer.completion_tokens, answer.prompt_tokens) == (12, None, None)
    assert (answer.finish_reason, answer.error, answer.reasoning_pieces) == ("length", "", 0)


def test_its_prompts_are_counted_by_asking_without_a_stream(
    replayed: tuple[str, dict[str, str]],
) -> None:
    asked = EndpointRunner(Client(replayed[0]), requests=2)
    record = asked.measure(TEST).record
    assert record["prompt_counted"] and record["tokens_counted_by"] == "pieces"
    assert (record["complete"], record["n_gen"]) == (2, 12)
    assert record["acceptance"] is record["acceptance_length"] is None


def test_reasoning_that_stays_in_the_text_ends_with_its_tag(
    replayed: tuple[str, dict[str, str]],
) -> None:
    """The tag comes in several pieces."""
    replayed[1]["stream"] = "thinks"
    answer = _ask(replayed[0])
    pieces = [
        json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        for line in STREAMS["thinks"]["body"].splitlines()
        if line.startswith("data: {")
    ]
    before = next(n for n in range(len(pieces)) if "</think>" in "".join(pieces[:n]))
    assert answer.reasoning_pieces == sum(map(bool, pieces[:before])) > 1
    assert answer.reasoning_pieces < answer.tokens == sum(map(bool, pieces))


def test_an_answer_broken_off_for_the_next_is_not_complete(
    replayed: tuple[str, dict[str, str]],
) -> None:
    """It ends with [DONE] as if nothing were amiss, but without a reason to have finished."""
    assert "[DONE]" in STREAMS["dropped"]["body"]
    replayed[1]["stream"] = "dropped"
    answer = _ask(replayed[0])
    assert answer.error == f"the answer stopped midway, after {answer.tokens} pieces"


def test_a_prompt_that_is_too_long_is_told_though_the_stream_says_nothing(
    replayed: tuple[str, dict[str, str]],
) -> None:
    assert STREAMS["too long"]["body"] == ""
    replayed[1].update(stream="too long", whole="too long at once")
    with pytest.raises(RunnerError, match=r"HTTP 400: .*context length is 1024 tokens"):
        EndpointRunner(Client(replayed[0]), requests=1).measure(TEST)


def test_an_answer_nested_too_deeply_tells_nothing(
    replayed: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STREAMS, "deep", {"status": 200, "type": "", "body": "[" * 200_000})
    replayed[1]["whole"] = "deep"
    assert Client(replayed[0], timeout_s=30).at_once({}) == (None, "")

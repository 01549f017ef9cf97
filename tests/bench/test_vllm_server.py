"""The streaming client against the recorded bytes of a real vLLM (0.32.0, n-gram drafts).

`streams/vllm.json` was written by tests/golden/make_vllm_streams.py, which also runs the client
against that server itself. What documentation does not tell: the first event has a role and an
empty text, drafts come several tokens a piece, an engine that dies ends the stream with an error
and [DONE] under status 200, and reasoning that has not ended counts no tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from replayed_server import recorded, replay

from bench.runners.acceptance import acceptance, ask_server
from bench.runners.base import RunnerError, RunnerTest
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Answer, Client

STREAMS = recorded("vllm")
TEST = RunnerTest(Path(""), n_prompt=19, n_gen=24)


@pytest.fixture
def replayed() -> Iterator[tuple[str, dict[str, str]]]:
    given = {"stream": "plain", "whole": "too long", "/metrics": "metrics before"}
    with replay(STREAMS, given) as url:
        yield url, given


def _ask(url: str) -> Answer:
    return Client(url, timeout_s=30).ask({"stream": True})


def _pieces(name: str, field: str) -> list[str]:
    """The texts of a recorded stream that are not empty."""
    events = [json.loads(x[6:]) for x in STREAMS[name]["body"].split("\n\n") if "data: {" in x]
    deltas = [c["delta"] for e in events for c in e.get("choices", ())]
    return [d[field] for d in deltas if d.get(field)]


def test_the_server_names_itself(replayed: tuple[str, dict[str, str]]) -> None:
    runner = EndpointRunner(Client(replayed[0]))
    assert (runner.engine, runner.version, runner.model) == ("vLLM", "0.32.0", "tiny-llama")


def test_the_answer_is_counted_by_the_server_since_drafts_share_pieces(
    replayed: tuple[str, dict[str, str]],
) -> None:
    answer = _ask(replayed[0])
    assert len(answer.arrivals) == len(_pieces("plain", "content")) < 24
    assert (answer.tokens, answer.prompt_tokens, answer.completion_tokens) == (24, 19, 24)
    assert (answer.finish_reason, answer.error, answer.reasoning_pieces) == ("length", "", 0)


def test_its_counters_tell_the_acceptance_of_what_came_between(
    replayed: tuple[str, dict[str, str]],
) -> None:
    """7 steps with 17 drafts gave 24 tokens; the page has gauges of the same names' beginnings."""
    client = Client(replayed[0])
    before = ask_server(client, "vLLM")
    replayed[1]["/metrics"] = "metrics after"
    after = ask_server(client, "vLLM")
    assert before.count("vllm:spec_decode_num_drafts") == 0
    found = acceptance([], before, after)
    assert (found["drafted"], found["accepted"], found["acceptance"]) == (17, 17, 1.0)
    assert found["acceptance_length"] == pytest.approx(24 / 7)
    assert found["accepted_by_position"] == [1.0, 0.7143, 0.7143]
    assert found["acceptance_told_by"] == "the server's counters"


def test_it_tells_drafts_in_each_answer_where_it_is_asked_to(
    replayed: tuple[str, dict[str, str]],
) -> None:
    """Started with --per-request-spec-decode-metrics summary."""
    replayed[1]["stream"] = "thinks"
    record = EndpointRunner(Client(replayed[0]), requests=2).measure(TEST).record
    assert (record["drafted"], record["accepted"]) == (34, 34)
    assert record["acceptance_length"] == pytest.approx(24 / 7)
    assert record["acceptance_told_by"] == "each answer"


def test_reasoning_that_has_not_ended_is_counted_in_pieces(
    replayed: tuple[str, dict[str, str]],
) -> None:
    """Its usage says 0 reasoning tokens of an answer that is nothing else."""
    replayed[1]["stream"] = "thinks"
    assert '"reasoning_tokens":0' in STREAMS["thinks"]["body"]
    answer = _ask(replayed[0])
    assert answer.reasoning_pieces == len(_pieces("thinks", "reasoning")) > 5
    assert (answer.tokens, answer.reasoning_tokens) == (24, 0)
    record = EndpointRunner(Client(replayed[0]), requests=1).measure(TEST).record
    assert record["reasoning_tokens"] == answer.reasoning_pieces


def test_an_engine_that_dies_is_told_though_the_stream_ends_as_if_done(
    replayed: tuple[str, dict[str, str]],
) -> None:
    body = STREAMS["killed"]["body"]
    assert STREAMS["killed"]["status"] == 200 and body.rstrip().endswith("data: [DONE]")
    replayed[1]["stream"] = "killed"
    answer = _ask(replayed[0])
    assert len(answer.arrivals) == len(_pieces("killed", "content")) > 1
    assert answer.error == (
        "the server says: EngineCore encountered an issue. See stack trace (above) for the root "
        "cause."
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("too long", r"HTTP 400: This model's maximum context length is 1024 tokens\."),
        ("no such model", r"HTTP 404: The model `other` does not exist\. Valid aliases: tiny-"),
    ],
)
def test_refusals_are_told_in_its_own_words(
    replayed: tuple[str, dict[str, str]], answer: str, says: str
) -> None:
    replayed[1].update(stream=answer, whole=answer)
    with pytest.raises(RunnerError, match=says):
        EndpointRunner(Client(replayed[0]), requests=1).measure(TEST)

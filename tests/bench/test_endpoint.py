"""The streaming client against a server of known speed: times, counts, concurrency, prompts."""

import threading
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from endpoint_server import EACH_S, FIRST_S, TEST, Server, known_speed, runner

from bench.runners.texts import prompt


@pytest.fixture
def server() -> Iterator[Server]:
    with known_speed() as made:
        yield made


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


@pytest.mark.parametrize("usage", [{"completion_tokens_details": {"reasoning_tokens": 0}},
                                   {"reasoning_tokens": 0}])  # fmt: skip
def test_reasoning_that_has_not_ended_is_counted_too(server: Server, usage: dict[str, Any]) -> None:
    """vLLM counts none before its end mark; SGLang's count lies beside the others."""
    server.reasoning, server.usage = 12, usage
    found = runner(server, requests=2).measure(TEST).record
    assert (found["reasoning_tokens"], found["reasoning_pieces"]) == (24, 24)
    server.reasoning = 0
    assert runner(server, requests=2).measure(TEST).record["reasoning_tokens"] == 0


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

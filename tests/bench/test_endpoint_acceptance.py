"""What servers tell of their drafts, as each of them tells it (`bench.runners.acceptance`)."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoint_server import TEST, Server, known_speed, runner


@pytest.fixture
def server() -> Iterator[Server]:
    with known_speed() as made:
        yield made


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


def test_sglang_is_asked_for_drafts_in_a_stream(server: Server) -> None:
    """In an event without choices, where the request wants it (as of SGLang 0.5.23)."""
    server.pages["/v1/models"] = SGLANG
    server.sglext = {"spec_tokens_details": {"spec_accept_length": 3.1, "spec_verify_ct": 10,
                     "spec_num_correct_drafts": 21, "spec_num_proposed_drafts": 30}}  # fmt: skip
    record = runner(server, requests=2).measure(TEST).record
    assert (record["drafted"], record["accepted"], record["acceptance_length"]) == (60, 42, 3.1)
    assert record["acceptance_told_by"] == "each answer"
    assert all(b["return_spec_tokens_details"] is True for b in server.bodies)

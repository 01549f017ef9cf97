"""Whole jobs: which tokens are computed at which depth, and times that add up."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hwmodel.catalogue import load_model
from hwmodel.cli import main
from hwmodel.errors import RequestError, UnknownNameError
from hwmodel.plan import make_plan
from hwmodel.predict import predict
from hwmodel.request import make_request
from hwmodel.workload import (
    Profile,
    Turn,
    load_profile,
    parse_profile,
    profile_names,
    run_job,
    steps_of,
)

PLAN = make_plan(make_request("m4max", load_model("step-3.5-flash")))
TWO = Profile("two", "two", "", (Turn(100, 50, 20), Turn(30, 0, 10)))


def test_dropped_reasoning_makes_the_answer_be_read_again() -> None:
    first, second = steps_of(TWO)
    assert (first.cached, first.read, first.depth) == (0, 100, 100)
    assert (second.cached, second.read) == (100, 20 + 30)


def test_kept_reasoning_stays_in_the_cache() -> None:
    _, second = steps_of(dataclasses.replace(TWO, keep_reasoning=True))
    assert (second.cached, second.read) == (170, 30)


def test_without_prefix_reuse_every_turn_reads_the_whole_history() -> None:
    _, second = steps_of(dataclasses.replace(TWO, prefix_reuse=False))
    assert (second.cached, second.read) == (0, 150)


def test_a_restart_empties_the_history() -> None:
    turns = (Turn(100, 0, 10), Turn(40, 0, 5, restart=True))
    _, second = steps_of(Profile("r", "r", "", turns))
    assert (second.cached, second.read, second.depth) == (0, 40, 40)


def test_times_are_those_of_the_estimator() -> None:
    job = run_job(Profile("one", "one", "", (Turn(8192, 0, 0, wait_s=3.0),)), PLAN.chosen)
    alone = predict(PLAN.chosen.at(depth=0, prompt_tokens=8192, drafts=0), "prefill_tok_s")
    assert alone.value is not None
    assert job.seconds == pytest.approx(8192 / alone.value + 3.0)
    assert job.low_s < job.seconds < job.high_s


def test_phases_add_up_and_tokens_are_those_of_the_profile() -> None:
    job = run_job(TWO, PLAN.chosen)
    assert sum(p.seconds for p in job.phases) == pytest.approx(job.seconds)
    assert (job.tokens("prefill"), job.tokens("reasoning"), job.tokens("answer")) == (150, 50, 30)
    assert job.output_tokens == 80 and job.cached_tokens == 100 and job.peak_tokens == 170


def test_more_context_takes_longer() -> None:
    short, long = (
        run_job(Profile("p", "p", "", (Turn(n, 0, 500),)), PLAN.chosen) for n in (1000, 100_000)
    )
    written = [next(p.seconds for p in j.phases if p.name == "answer") for j in (short, long)]
    assert written[1] > 1.3 * written[0]


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_job_fits_the_context(name: str) -> None:
    profile = load_profile(name)
    assert profile.title and profile.about
    assert max(s.depth + s.reasoning + s.answer for s in steps_of(profile)) <= 262_144


def test_the_report_of_ten_thousand_words_is_that_long() -> None:
    assert load_profile("deep-research").turns[-1].answer_tokens == 13_500


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, r"expected \[\[turns\]\]"),
        ({"turns": [{"input_tokens": 5}]}, r"turns\[0\].answer_tokens is missing"),
        ({"turns": [{"input_tokens": -5, "answer_tokens": 1}]}, "is -5, expected 0 to"),
        (
            {"turns": [{"input_tokens": 5, "answer_tokens": 1, "x": 2}]},
            r"unknown key 'turns\[0\].x', expected",
        ),
        ({"turns": [{"input_tokens": 5.5, "answer_tokens": 1}]}, "is 5.5, expected a whole number"),
        (
            {"turns": [{"input_tokens": 5, "answer_tokens": 1}], "prefix_reuse": 3},
            "3, expected true",
        ),
        ({"turn": []}, "unknown key 'turn', expected turns, name"),
    ],
)
def test_a_bad_profile_is_one_sentence(raw: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_profile(raw, "own.toml")


def test_unknown_names_offer_the_shipped_ones() -> None:
    with pytest.raises(UnknownNameError, match="coding-agent"):
        load_profile("coding")


def test_a_file_of_ones_own_and_several_machines(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('title = "Mine"\n[[turns]]\ninput_tokens = 2000\nanswer_tokens = 100\n')
    text = CliRunner().invoke(main, ["workload", str(own), "--device", "m4max"])
    assert text.exit_code == 0 and text.output.startswith("Mine")
    args = ["workload", "chat", "--device", "m4max", "--device", "h100", "--json"]
    jobs = json.loads(CliRunner().invoke(main, args).output)
    assert [j["device"] for j in jobs] == ["m4max", "h100"]
    assert jobs[1]["usd"]["rented"] > 0 and jobs[0]["usd"]["rented"] is None


def test_a_job_longer_than_any_context_is_refused_by_its_file(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[[turns]]\ninput_tokens = 500000\nanswer_tokens = 3\n")
    run = CliRunner().invoke(main, ["workload", str(own), "--device", "m4max"])
    assert run.exit_code == 2
    assert "own.toml: its longest context is 500,003 tokens" in run.output


def test_the_vendors_service_is_named_for_the_models_it_serves_alone() -> None:
    args = ["workload", "chat", "--device", "m4max", "--json", "--model"]
    own, other = (
        json.loads(CliRunner().invoke(main, [*args, name]).output)[0]
        for name in ("step-3.5-flash", "qwen3-30b-a3b")
    )
    assert own["usd"]["api"] > 0 and own["model"] == "step-3.5-flash"
    assert other["usd"]["api"] is None and other["model"] == "qwen3-30b-a3b"


def test_a_job_without_a_machine_is_refused() -> None:
    run = CliRunner().invoke(main, ["workload", "chat"])
    assert run.exit_code == 2 and "--device is missing" in run.output


def test_the_list_of_jobs_is_json_too() -> None:
    listed = json.loads(CliRunner().invoke(main, ["workload", "--json"]).output)
    assert {"workload", "turns", "title"} == set(listed[0])
    assert "chat" in [job["workload"] for job in listed]

"""The statistics file that `--stats` takes in place of the built-in figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from hwmodel.errors import RequestError
from hwmodel.model import step_shape
from hwmodel.plan import make_plan
from hwmodel.plan_json import plan_json
from hwmodel.request import make_request
from hwmodel.statistics_file import read_stats

MODEL = step_shape()
WHOLE = {
    "acceptance_by_position": [0.9, 0.8, 0.7],
    "distinct_experts": {"1": 8, "2": 12.5, "3": 16, "4": 19},
    "expert_load": [[3, 1, 2]],
}


def written(content: Any, folder: Path) -> str:
    path = folder / "stats.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_acceptance_and_distinct_experts_are_read(tmp_path: Path) -> None:
    expected = ((0.9, 0.8, 0.7), (8, 12.5, 16, 19))
    assert read_stats(written(WHOLE, tmp_path), MODEL) == expected
    assert read_stats(written({"statistics": WHOLE}, tmp_path), MODEL) == expected


def test_either_may_be_missing(tmp_path: Path) -> None:
    only = {"mtp": {"acceptance": [0.5]}}
    assert read_stats(written(only, tmp_path), MODEL) == ((0.5,), None)
    only = {"distinct_experts": [8, 13]}  # type: ignore[dict-item]
    assert read_stats(written(only, tmp_path), MODEL) == (None, (8, 13))


def test_neighbours_that_share_experts_make_drafts_cheaper(tmp_path: Path) -> None:
    def gain(distinct: list[float]) -> tuple[float, float]:
        content = {"acceptance": [0.9, 0.8, 0.7], "distinct_experts": distinct}
        stats = written(content, tmp_path)
        found = make_plan(make_request("dgx-spark", MODEL, stats=stats))
        return found.drafts[3].gain, found.decode[0][1].value or 0.0

    same, apart = gain([8, 8, 8, 8]), gain([8, 16, 24, 32])
    assert same[0] > 1.1 * apart[0]
    assert same[1] == apart[1]  # one token alone reads what it always reads


def test_evenly_routed_counts_give_the_built_in_estimate(tmp_path: Path) -> None:
    even = [MODEL.distinct_experts(n) for n in (1, 2, 3, 4)]
    stats = written({"distinct_experts": even}, tmp_path)
    for users in (1, 16):
        given = make_plan(make_request("h100", MODEL, count=8, stats=stats, concurrency=users))
        plain = make_plan(make_request("h100", MODEL, count=8, concurrency=users))
        assert [o.gain for o in given.drafts] == pytest.approx([o.gain for o in plain.drafts])
        assert plan_json(given)["mtp"]["acceptance_source"] == "llama.cpp pull request 20981"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "holds no acceptance"),
        ({"x": 1}, "holds no acceptance"),
        ({"acceptance": []}, "something else than numbers from 0 to 1"),
        ({"acceptance": [1.5]}, "something else than numbers from 0 to 1"),
        ({"acceptance": [True]}, "something else"),
        ({"acceptance": ["0.9"]}, "something else"),
        ('{"acceptance": [NaN]}', "something else"),
        ({"distinct_experts": [4, 7]}, "counted on another model"),
        ({"distinct_experts": [8, 700]}, "something else than numbers from 1 to 288"),
        ({"distinct_experts": [8, 7]}, "fall with more tokens"),
        ("[" * 5000, "not JSON"),
        ('{"a":' * 500 + "1" + "}" * 500, "holds no acceptance"),
    ],
)
def test_statistics_that_cannot_be_used(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read_stats(written(content, tmp_path), MODEL)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.json: cannot be read"):
        read_stats(str(tmp_path / "none.json"), MODEL)

"""The local loop: what is predicted before it is measured, and how the two are compared."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.interleave import Round, append_round
from bench.loop_points import ENGINES, Point, cases, model_file, points
from bench.loop_predict import Host, cache_device, fit_host, predictions
from bench.loop_run import (
    COMPARISON,
    PREDICTIONS,
    PROBE,
    Measured,
    compare_loop,
    loop_errors,
    measured,
    write,
)
from bench.runners.base import Measurement
from hwmodel.devices import parse_device
from hwmodel.errors import RunFileError

RUNNER = CliRunner()
DEVICE = """schema = 1
name = "local"
class = "cpu"
unified = true
api = ["cpu"]
[memory]
total_bytes = { value = 24e9, source = "test", as_of = "2026-11" }
[bandwidth]
measured_bytes_per_s = { value = 80e9, source = "test", as_of = "2026-11" }
[flop]
measured_fp32_per_s = { value = 250e9, source = "test", as_of = "2026-11" }
"""


def run(*words: str) -> Result:
    result = RUNNER.invoke(main, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def device() -> Any:
    import tomllib

    return parse_device(tomllib.loads(DEVICE), "device")


def one_round(speeds: dict[str, float], probes: Sequence[float] = (), at: float = 1e9) -> Round:
    """A round whose arms gave `speeds`, with the memory's speed before, between and after."""
    order = list(speeds)
    probes = probes or [80e9] * (len(order) + 1)
    arms = {
        k: Measurement("refimpl", "b", "", (v,), (1,)) for k, v in speeds.items()
    }  # fmt: skip
    between = {k: (probes[i + 1],) for i, k in enumerate(order[:-1])}
    return Round("c", at, "host", (probes[0],), (probes[-1],), {}, arms, {}, between)


def test_points_cover_both_engines_types_depths_drafts_and_prompts() -> None:
    every = points()
    assert len({p.id for p in every}) == len(every)
    outside = [p for p in every if not p.probe]
    assert len(outside) > 1.5 * (len(every) - len(outside))
    for engine in ENGINES:
        mine = [p for p in outside if p.engine == engine]
        assert {"q4_0", "q4_k_s", "q8_0"} <= {p.type for p in mine if not p.is_embedded}
        assert {"q4_0", "q4_k_s", "q8_0"} == {p.type for p in mine if p.is_embedded}
        assert any(p.depth for p in mine) and any(p.prompt for p in mine)
    assert {p.drafts for p in outside if p.engine == "refimpl"} == {0, 1, 2, 3}
    assert all(p.anchor in {q.id for q in every if q.probe} for p in every)


def test_cases_take_the_engines_by_turns_and_begin_with_the_anchors() -> None:
    for case in cases(Path("models"), 2, probe=False):
        labels = [e.label for e in case.entries]
        assert labels[0].endswith("decode-d0") and len(labels) == len(set(labels))
        anchors = {p.anchor for p in points() if p.id in labels and p.model == case.model}
        assert anchors <= set(labels)
    seen = {e.label for c in cases(Path("models"), 2, probe=True) for e in c.entries}
    assert seen == {p.id for p in points() if p.probe}


@pytest.fixture(scope="module")
def host() -> Host:
    found = device()
    return Host(found, cache_device(found, 160e9, "test", "2026-11"), Path("nowhere"))


@pytest.fixture(scope="module")
def embedded() -> list[Point]:
    return [p for p in points() if p.model == "mini" and p.engine == "refimpl"]


def test_a_fit_to_the_probe_meets_it_and_carries_over(host: Host, embedded: list[Point]) -> None:
    """Truth: the model itself with other efficiencies. The probe's points are met within a few
    percent; the other ones follow within the target of the loop."""
    fast = dataclasses.replace(
        host.cache, quantities={k: dataclasses.replace(q, value=q.value * 2) if "bytes_per_s" in k
                                or "flop" in k else q for k, q in host.cache.quantities.items()},
    )  # fmt: skip
    truth = Host(host.device, fast, host.folder)
    from hwmodel.predict import predict

    speeds = {p.id: predict(truth.run(p), p.quantity).value or 0.0 for p in embedded}
    fits = fit_host(host, {p.id: speeds[p.id] for p in embedded if p.probe}, embedded)
    rows = predictions(host, fits, embedded, speeds)
    assert [r["id"] for r in rows] == [p.id for p in embedded]
    for r in rows:
        assert r["device"] == "local-cache" and r["low"] < r["predicted"] < r["high"]
        tolerance = 0.06 if r["probe"] else 0.15
        assert r["predicted"] == pytest.approx(speeds[r["id"]], rel=tolerance)
        assert (r["probe_measured"] is None) == (not r["probe"])
    json.dumps(rows, allow_nan=False)


def test_quiet_rounds_count_as_they_are() -> None:
    p = Point("refimpl", "q8_0", depth=4096)
    at_probe = {p.anchor: Measured(90.0, "quiet", 1)}
    found = measured([one_round({p.anchor: 80.0, p.id: 40.0})], [p], at_probe)
    assert found[p.id] == Measured(40.0, "quiet", 1)


def test_a_busy_round_counts_as_a_ratio_to_its_anchor() -> None:
    p = Point("refimpl", "q8_0", depth=4096)
    at_probe = {p.anchor: Measured(80.0, "quiet", 1)}
    quiet = one_round({"other": 80.0})
    busy = one_round({p.anchor: 50.0, p.id: 25.0}, [50e9, 50e9, 50e9])
    found = measured([quiet, busy], [p], at_probe)
    assert found[p.id] == Measured(pytest.approx(40.0), "anchored", 1)


def test_a_probe_that_was_busy_makes_every_point_a_ratio() -> None:
    p = Point("refimpl", "q8_0", depth=4096)
    at_probe = {p.anchor: Measured(60.0, "steady", 1)}
    found = measured([one_round({p.anchor: 80.0, p.id: 40.0})], [p], at_probe)
    assert found[p.id] == Measured(pytest.approx(30.0), "anchored", 1)


def written(folder: Path) -> list[Point]:
    """Predictions of 100 tok/s for three points, one of the probe."""
    known = [p for p in points() if p.engine == "refimpl" and p.model == "q8_0"][:3]
    row = {"engine": "refimpl", "model": "q8_0", "predicted": 100.0, "low": 80.0, "high": 125.0}
    rows = [
        {**row, "id": p.id, "probe": p.probe, "quantity": p.quantity, "prompt": p.prompt,
         "depth": p.depth, "drafts": 0, "probe_measured": 99.0 if p.probe else None}
        for p in known
    ]  # fmt: skip
    write(folder / PREDICTIONS, {"made": "2026-11-22T03:00:00Z", "commit": "abc", "host": "host",
                                 "rule": "r", "points": rows, "probe_basis":
                                 {p.id: ["quiet", 1] for p in known if p.probe}})  # fmt: skip
    return known


def test_nothing_that_was_listed_is_dropped(tmp_path: Path) -> None:
    known = written(tmp_path)
    outside = [p for p in known if not p.probe]
    rounds = [one_round({outside[0].anchor: 80.0, outside[0].id: 125.0})]
    found = compare_loop(tmp_path, rounds)
    assert [r["id"] for r in found["rows"]] == [p.id for p in known]
    errors = found["errors"]["refimpl"]
    assert (errors["listed"], errors["measured"]) == (len(outside), 1)
    assert errors["median"] == pytest.approx(0.2) and errors["in_band"] == 1.0
    assert found["rows"][-1]["basis"] == "not measured"
    assert loop_errors(found["rows"], "llama.cpp")["measured"] == 0


def test_compare_writes_text_values_and_picture(tmp_path: Path) -> None:
    known = written(tmp_path)
    outside = next(p for p in known if not p.probe)
    append_round(tmp_path / "rounds.jsonl", one_round({outside.anchor: 80.0, outside.id: 125.0}))
    result = run("loop", "compare", "--data", str(tmp_path))
    assert result.exit_code == 0 and outside.id in result.stdout
    assert json.loads((tmp_path / COMPARISON).read_text())["errors"]["refimpl"]["measured"] == 1
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "comparison.csv").read_text().splitlines()
    assert len(lines) == 1 + len(known) and lines[0].startswith("id,probe,engine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict",), "run bench loop probe"),
        (("compare",), "run bench loop predict"),
        (("measure",), "write them first: bench loop predict"),
        (("measure", "--probe", "--only", "q9"), "no points of a model 'q9'"),
        (("measure", "--probe", "--only", "q4_0 deep"), "no case 'q4_0 deep' in the probe"),
        (("probe", "--device-file", "none.toml"), "none.toml"),
    ],
)
def test_steps_out_of_order_get_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run("loop", *words, "--data", str(tmp_path / "none"))
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_predictions_need_every_point_of_the_probe(tmp_path: Path) -> None:
    write(tmp_path / PROBE, {"device": DEVICE, "cache_bytes_per_s": 1e11, "as_of": "2026-11",
                             "host": "host"})  # fmt: skip
    result = run("loop", "predict", "--data", str(tmp_path))
    assert result.exit_code == 2 and "probe points are not measured" in result.stderr
    (tmp_path / PREDICTIONS).write_text("[]")
    with pytest.raises(RunFileError, match="no JSON object"):
        compare_loop(tmp_path, [])


def test_the_embedded_model_needs_no_file_of_its_own() -> None:
    assert model_file("mini", Path("nowhere")).is_file()
    assert model_file("mini-q8_0", Path("x")) == Path("x/mini_q8_0.gguf")

"""The fit file: written and read back, damaged files refused, the nearest run found."""

import json
import math
from pathlib import Path

import pytest

from hwmodel.fit import (
    distance,
    engines_measured,
    from_json,
    load_fit,
    nearest_run,
    prior_spread,
    to_json,
    unmeasured,
)
from refimpl.errors import InputError


def test_round_trip() -> None:
    fit = load_fit()
    again = from_json(json.loads(json.dumps(to_json(fit))))
    assert again.effects == fit.effects
    assert again.band == fit.band
    assert again.runs == fit.runs
    assert to_json(again) == to_json(fit)


def test_the_shipped_fit_reaches_what_it_promises() -> None:
    """Leaving whole sweeps out, and whole devices out; every refit never saw those rows."""
    decode = load_fit().errors["decode_tok_s"]
    prefill = load_fit().errors["prefill_tok_s"]
    assert decode["leave_sweep_out"]["median"] <= 0.10
    assert decode["leave_sweep_out"]["p90"] <= 0.30
    assert prefill["leave_sweep_out"]["median"] <= 0.20
    assert decode["leave_device_out"]["median"] <= 0.20
    assert decode["leave_sweep_out"]["median"] < 0.6 * decode["baseline"]["median"]


def test_the_shipped_fit_names_its_runs() -> None:
    fit = load_fit()
    assert len(fit.runs) > 400
    assert all(r.measured > 0 and r.held_out > 0 and r.low < r.high for r in fit.runs)
    inside = [r.low <= r.measured <= r.high for r in fit.runs]
    assert 0.80 <= sum(inside) / len(inside) <= 0.95


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "effects": {"a/all": 1}, "covariance": [], "sigma": {}, "band": {}}',
        '{"schema": 1, "effects": {"a/all": "x"}, "covariance": ["1"], "sigma": {}, "band": {}}',
        '{"schema": 1, "effects": {"a/all": NaN}, "covariance": ["1"], "sigma": {}, "band": {}}',
        "[" * 100_000,
    ],
)
def test_damaged_files_get_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fit.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_fit(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("sigma", "decode_tok_s"), math.inf),
        (("band", "decode_tok_s"), 10**400),
        (("errors",), None),
        (("errors", "decode_tok_s"), "x"),
        (("errors", "decode_tok_s", "leave_sweep_out"), None),
        (("errors", "decode_tok_s", "leave_sweep_out", "median"), "x"),
        (("errors", "decode_tok_s", "leave_sweep_out", "median"), math.nan),
        (("errors", "decode_tok_s", "leave_sweep_out"), {"n": 3}),
        (("runs", 0, "measured"), 0),
        (("runs", 0, "held_out"), "40"),
        (("runs", 0, "config"), []),
        (("runs", 0, "config", "depth"), "deep"),
    ],
)
def test_a_value_that_cannot_be_computed_with_gets_one_sentence(
    where: tuple[str | int, ...], value: object
) -> None:
    data = json.loads(json.dumps(to_json(load_fit())))
    at = data
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises(InputError, match=r"^mine: .*fit") as caught:
        from_json(data, "mine")
    assert "\n" not in str(caught.value)


def test_a_missing_file_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_fit(tmp_path / "none.json")


def test_nearest_run_prefers_model_and_device_to_depth() -> None:
    fit = load_fit()
    config = next(r.config for r in fit.runs if r.id == "S004" and r.quantity == "decode_tok_s")
    assert distance(config, config) == 0
    near = nearest_run(fit, {**config, "depth": 15000}, "decode_tok_s")
    assert near is not None and "m4max" in near.description and near.held_out


def test_levels_close_to_the_run_are_trusted_less_than_general_ones() -> None:
    assert prior_spread("weights/class=apple") > prior_spread("weights/device=m4max")


def test_what_was_measured_of_a_model_in_other_engines_alone_is_said() -> None:
    fit = load_fit()
    only = engines_measured(fit, "deepseek-v4-flash")
    assert set(only) == {"ds4"} and only["ds4"] > 20
    said = unmeasured(fit, {"model": "deepseek-v4-flash", "engine": "llama.cpp"})
    assert said.startswith("no measured run of deepseek-v4-flash in llama.cpp; all are of ds4")
    assert unmeasured(fit, {"model": "deepseek-v4-flash", "engine": "ds4"}) == ""
    assert unmeasured(fit, {"model": "glm-5", "engine": "vllm"}) == (
        "no measured run of glm-5 in vllm"
    )

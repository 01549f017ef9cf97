"""Probed devices: efficiencies are shares of what was measured, not of a datasheet's peak."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from hwmodel.devices import Device, load_device, read_device
from hwmodel.engines import load_engine
from hwmodel.fit import Fit, load_fit
from hwmodel.model import step_shape
from hwmodel.predict import predict
from hwmodel.probed import as_file, fit_for, other_host, own_path, read, shipped_path
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, RunConfig, Workload

PROBED = """schema = 1
name = "{name}"
class = "cpu"
unified = true
api = ["cpu"]
[memory]
total_bytes = {{ value = 256e9, source = "test", as_of = "2026-11" }}
[bandwidth]
{key} = {{ value = 90e9, source = "test", as_of = "2026-11" }}
[flop]
measured_fp32_per_s = {{ value = 250e9, source = "test", as_of = "2026-11" }}
measured_int8_per_s = {{ value = 1600e9, source = "test", as_of = "2026-11" }}
"""


def device(folder: Path, name: str = "local", key: str = "measured_bytes_per_s") -> Device:
    path = folder / f"{name}.toml"
    path.write_text(PROBED.format(name=name, key=key))
    return read_device(path)


def a_run(found: Device, engine: str = "llama.cpp", quant: str = "Q4_0", **work: int) -> RunConfig:
    return RunConfig(
        model=step_shape(), quant=load_quant(quant), devices=(DeviceCount(found),),
        engine=EngineChoice(load_engine(engine), "cpu", date="2026-11"),
        workload=Workload(**work),  # type: ignore[arg-type]
    )  # fmt: skip


def decode(run: RunConfig, fit: Fit | None = None) -> float:
    found = predict(run, "decode_tok_s", fit).value
    assert found is not None
    return found


def test_devices_with_a_peak_keep_the_published_fit(tmp_path: Path) -> None:
    for found in (load_device("m4max"), device(tmp_path, key="peak_bytes_per_s")):
        assert fit_for(a_run(found)) is load_fit()


@pytest.mark.parametrize("engine", ["refimpl", "llama.cpp"])
def test_the_same_speed_as_a_peak_is_reached_less(tmp_path: Path, engine: str) -> None:
    """Losses of the memory itself are in a measured speed already."""
    measured = a_run(device(tmp_path), engine)
    peak = a_run(device(tmp_path, "box", key="peak_bytes_per_s"), engine)
    assert decode(measured) > 1.2 * decode(peak)
    prefill = predict(a_run(device(tmp_path), engine, prompt_tokens=512), "prefill_tok_s")
    before = predict(
        a_run(device(tmp_path), engine, prompt_tokens=512), "prefill_tok_s", load_fit()
    )
    assert prefill.value and before.value and prefill.value > 2 * before.value


def test_the_shipped_shares_are_better_than_the_published_fit_also_without_the_file() -> None:
    """Errors of points whose file the refit never saw; far from the few percent inside the fit."""
    engines = read(shipped_path())["engines"]
    assert set(engines) == {"refimpl", "llama.cpp"}
    for entry in engines.values():
        for e in entry["errors"].values():
            assert e["fit"]["median"] < 0.06
            assert e["leave_sweep_out"]["median"] < 0.8 * e["published"]["median"]
            assert e["leave_sweep_out"]["median"] < 0.35
        inside = [r["low"] <= r["measured"] <= r["high"] for r in entry["runs"]]
        assert sum(inside) >= 0.9 * len(inside)


def test_borrowed_shares_are_called_so_and_have_a_wider_band(tmp_path: Path) -> None:
    borrowed = predict(a_run(device(tmp_path)))
    assert borrowed.status == "extrapolated" and "on one other host" in borrowed.reason
    entry = read(shipped_path())
    path = own_path(device(tmp_path))
    assert path == tmp_path / "local.fit.json"
    path.write_text(json.dumps(entry))
    own = predict(a_run(device(tmp_path)))
    assert own.status == "calibrated" and own.value == pytest.approx(borrowed.value)
    for a, b in ((own, borrowed),):
        assert a.low and b.low and a.high and b.high
        assert math.log(b.high / b.low) > 1.05 * math.log(a.high / a.low)


def test_the_name_of_the_device_does_not_matter(tmp_path: Path) -> None:
    assert decode(a_run(device(tmp_path, "my-box"))) == pytest.approx(
        decode(a_run(device(tmp_path, "local")))
    )


def test_an_engine_that_nobody_measured_on_a_probed_device_is_extrapolated(tmp_path: Path) -> None:
    found = predict(a_run(device(tmp_path), "ktransformers"))
    assert found.status == "extrapolated"
    assert fit_for(a_run(device(tmp_path), "ktransformers")).borrowed.startswith("no run of ktran")


def test_other_hosts_are_as_far_apart_as_published_devices() -> None:
    errors = {"decode_tok_s": {"leave_sweep_out": {"median": 0.06},
                               "leave_device_out": {"median": 0.10}}}  # fmt: skip
    fit = dataclasses.replace(load_fit(), errors=errors)
    assert other_host(fit, "decode_tok_s") == pytest.approx(0.08 / 0.6745)
    assert other_host(fit, "prefill_tok_s") == 0.0
    assert 0.1 < other_host(load_fit(), "decode_tok_s") < 0.4


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "engines": []}'])
def test_a_damaged_file_declines_with_a_sentence(tmp_path: Path, text: str) -> None:
    found = device(tmp_path)
    (tmp_path / "local.fit.json").write_text(text)
    estimate = predict(a_run(found))
    assert estimate.status == "declined" and "local.fit.json" in estimate.reason
    assert "bench loop fit" in estimate.reason and "\n" not in estimate.reason


def test_a_file_is_read_as_it_was_written() -> None:
    entry = read(shipped_path())
    from hwmodel.fit import from_json

    fits = {k: from_json(v) for k, v in entry["engines"].items()}
    assert as_file(fits, entry["host"], entry["as_of"])["engines"].keys() == fits.keys()

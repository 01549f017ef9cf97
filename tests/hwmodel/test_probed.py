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
from hwmodel.predict import physical_limit, predict
from hwmodel.probed import (
    as_file,
    cache_note,
    fit_for,
    in_cache,
    other_host,
    own_path,
    read,
    renamed,
    shipped_path,
)
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, RunConfig, Workload
from hwmodel.weights_file import read_weights
from refimpl.backends import model_path

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


CACHE = """cache_bytes_per_s = {{ value = {speed}, source = "test", as_of = "2026-11" }}
[cpu]
cache_bytes = {{ value = {size}, source = "test", as_of = "2026-11" }}
"""


def with_cache(folder: Path, size: float, name: str = "local", speed: float = 200e9) -> Device:
    """The host with a last cache of so many bytes, read at 200 GB/s."""
    path = folder / f"{name}.toml"
    text = PROBED.format(name=name, key="measured_bytes_per_s")
    path.write_text(text.replace("[flop]", CACHE.format(size=size, speed=speed) + "[flop]"))
    return read_device(path)


def a_small_run(found: Device, engine: str = "llama.cpp", depth: int = 0) -> RunConfig:
    """The embedded model, whose trunk is 11 MB."""
    model, quant = read_weights(model_path("mini"))
    return dataclasses.replace(a_run(found, engine, depth=depth), model=model, quant=quant)


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


@pytest.mark.parametrize("name", ["local", "my-box"])
def test_a_model_that_stays_in_the_cache_is_read_from_there(tmp_path: Path, name: str) -> None:
    """With the effects of the host's cache, whatever the host is called."""
    host = with_cache(tmp_path, 32e6, name)
    run = in_cache(a_small_run(host))
    assert (run.devices[0].device.name, in_cache(run)) == (f"{name}-cache", run)
    assert run.devices[0].device.bandwidth_bytes_per_s == 200e9
    assert f"weights/device={name}-cache" in fit_for(run).effects
    found, streamed = predict(a_small_run(host)), predict(a_small_run(device(tmp_path, name)))
    assert found.value and streamed.value and found.value > 1.2 * streamed.value
    assert found.value == pytest.approx(decode(run))
    said = "the model stays in the processor's last cache (11 of 32 MB), which is read at 200 GB/s"
    assert said in found.provenance and not any("cache" in p for p in streamed.provenance)
    assert physical_limit(a_small_run(host), "decode_tok_s") > 1.8 * physical_limit(
        a_small_run(device(tmp_path, name)), "decode_tok_s"
    )


def test_the_measured_speed_of_the_embedded_model_is_within_the_band(tmp_path: Path) -> None:
    """Of the host whose runs the shipped shares were fitted to: 168 GB/s of its cache."""
    for engine, entry in read(shipped_path())["engines"].items():
        (point,) = [r for r in entry["runs"] if r["id"] == f"{engine}/mini/decode-d0"]
        found = predict(a_small_run(with_cache(tmp_path, 32e6), engine))
        assert found.low and found.high and found.low < point["measured"] < found.high


def test_what_does_not_fit_in_the_cache_streams_from_memory(tmp_path: Path) -> None:
    """Weights and KV cache may fill nine tenths of a cache that is faster than memory; devices in
    a row share none."""
    cases = [
        a_small_run(with_cache(tmp_path, 12e6)),
        a_small_run(with_cache(tmp_path, 16e6), depth=8192),
        a_run(with_cache(tmp_path, 32e6)),
        a_small_run(with_cache(tmp_path, 32e6, speed=80e9)),
        a_small_run(with_cache(tmp_path, 32e6, speed=0)),
        a_small_run(device(tmp_path)),
        a_small_run(load_device("m4max")),
    ]
    for run in cases:
        assert in_cache(run) is run and not cache_note(run)
    assert in_cache(a_small_run(with_cache(tmp_path, 16e6))).devices[0].device.name == "local-cache"
    two = dataclasses.replace(cases[0], devices=(DeviceCount(with_cache(tmp_path, 32e6), 2),))
    assert in_cache(two) is two


def test_a_fit_under_another_name_keeps_host_and_cache_apart() -> None:
    fit = dataclasses.replace(
        load_fit(), effects={"kv/device=local": 1.0, "kv/device=local-cache": 2.0, "kv/all": 3.0}
    )
    assert renamed(fit, "box").effects == {
        "kv/device=box": 1.0, "kv/device=box-cache": 2.0, "kv/all": 3.0,
    }  # fmt: skip

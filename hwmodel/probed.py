"""Efficiencies on probed devices: shares of what a probe measured, not of a datasheet's peak.

Published runs are of devices whose peak is known, and their efficiencies say how much of it an
engine reaches. A device file of `bench probe` states what memory and arithmetic gave when they were
measured, which no engine falls short of in the same way; those efficiencies would count the losses
twice. For such devices an engine's effects come from a host that was probed and measured alike:

* the device's own, in `NAME.fit.json` beside its file, which `bench loop fit` writes; else
* `fits/probed.json`, of the host of `reports/loop-3`. How far another host may be from it nobody
  has measured; the band grows by what published runs of a device are further off when no run of
  that device was in the fit.

An engine that neither has is predicted with the published fit, and the estimate says so.

A model that stays in the processor's last cache does not stream from memory: where the probe has
measured how fast that cache is read, such a run is one of a second device, `NAME-cache`, with
effects of its own (`reports/loop-3` measured the embedded model so).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodel.fit import Fit, from_json, load_fit, prior_spread, read_json, to_json
from hwmodel.run import RunConfig
from refimpl.errors import InputError

if TYPE_CHECKING:
    from hwmodel.devices import Device
    from hwmodel.memory import Ledger
    from hwmodel.quantity import Quantity

SCHEMA = 1
NAME = "local"  # what the devices of the files are called
CACHE = "-cache"  # and what ends the name of their last cache
RESIDENT = 0.9  # of the cache: what a model and its KV cache may fill to stay there
_MEDIAN = 0.6745  # of |x| for a normal x of spread 1


def shipped_path() -> Path:
    """The efficiencies that ship with the project."""
    return Path(__file__).parent / "fits" / "probed.json"


def own_path(device: Device) -> Path | None:
    """Where a device's own efficiencies lie: beside its file."""
    path = Path(device.file)
    return path.with_suffix(".fit.json") if path.suffix == ".toml" else None


def fit_for(run: RunConfig) -> Fit:
    """The fit that a run is predicted with.

    Raises:
        InputError: a fit file is damaged.
    """
    from hwmodel.devices import Device

    probed = [d.device for d in run.devices if isinstance(d.device, Device)]
    if not probed or not all(d.peak_is_unknown for d in probed):
        return load_fit()
    device, engine = probed[0], run.engine.engine.name
    own, name = own_path(device), device.name
    if _is_cache(device):
        name = name.removesuffix(CACHE)
    for path in (own, shipped_path()):
        if path is not None and path.is_file():
            found = _fit(path, path.stat().st_mtime_ns, engine, name, path == own)
            if found is not None:
                return found
    return dataclasses.replace(
        load_fit(), borrowed=f"no run of {engine} on a probed device: a measured speed is taken "
        "for a datasheet's peak"
    )  # fmt: skip


def in_cache(run: RunConfig) -> RunConfig:
    """The run on the cache of its probed device where all that it reads stays there, else the run.

    Weights (MTP layers if it drafts) and the KV cache at its depth count, on one device that
    states what its last cache holds and that it is read faster than memory.
    """
    from hwmodel.device_file import CACHE_SIZE, CACHE_SPEED
    from hwmodel.devices import Device
    from hwmodel.memory import ledger
    from hwmodel.run import DeviceCount

    device = run.devices[0].device if run.device_count == 1 else None
    if not isinstance(device, Device) or not device.peak_is_unknown or _is_cache(device):
        return run
    size, speed = device.get(CACHE_SIZE), device.get(CACHE_SPEED)
    if size is None or speed is None or speed.value <= device.bandwidth_bytes_per_s:
        return run
    m = ledger(run, max(1, (run.workload.depth or 0) + run.workload.prompt_tokens))
    if m.host_bytes or m.disk_bytes or _read_bytes(m) > RESIDENT * size.value:
        return run
    return dataclasses.replace(run, devices=(DeviceCount(cache_device(device, speed)),))


def cache_device(device: Device, speed: Quantity) -> Device:
    """A host with the bandwidth of its last cache, for models that stay in it.

    Args:
        speed: bytes/s that are read of an array that lies there.
    """
    from hwmodel.device_file import CACHE_SPEED, MEASURED, PEAK

    quantities = {k: q for k, q in device.quantities.items() if k != PEAK}
    quantities |= {MEASURED: speed, CACHE_SPEED: speed}
    return dataclasses.replace(device, name=device.name + CACHE, quantities=quantities)


def cache_note(run: RunConfig) -> str:
    """What a run on a cache reads, and how fast; empty for other runs."""
    from hwmodel.device_file import CACHE_SIZE
    from hwmodel.devices import Device
    from hwmodel.memory import ledger

    device = run.devices[0].device if run.devices else None
    if not isinstance(device, Device) or not _is_cache(device):
        return ""
    m, size = ledger(run, max(1, run.workload.depth or 0)), device.get(CACHE_SIZE)
    of = "" if size is None else f" of {size.value / 1e6:.0f}"
    return (
        f"the model stays in the processor's last cache ({_read_bytes(m) / 1e6:.0f}{of} MB), which "
        f"is read at {device.bandwidth_bytes_per_s / 1e9:.0f} GB/s"
    )


def _read_bytes(m: Ledger) -> float:
    return m.weights_bytes + m.kv_bytes + m.mtp_bytes


def _is_cache(device: Device) -> bool:
    from hwmodel.device_file import CACHE_SPEED, MEASURED

    speed = device.get(CACHE_SPEED)
    return speed is not None and speed == device.get(MEASURED) and device.name.endswith(CACHE)


@lru_cache(maxsize=16)
def _fit(path: Path, changed: int, engine: str, device: str, own: bool) -> Fit | None:
    """An engine's fit in a file for a device of this name, None where the file has none."""
    data = read(path)
    entry = data["engines"].get(engine)
    if entry is None:
        return None
    shipped = load_fit()
    found = merged(renamed(from_json(entry, str(path)), device), shipped)
    if own:
        return found
    sigma = {q: math.hypot(s, other_host(shipped, q)) for q, s in found.sigma.items()}
    said = f"shares of the probed speed as {engine} reached them on one other host, {data['host']}"
    return dataclasses.replace(found, sigma=sigma, borrowed=said)


def read(path: Path) -> dict[str, Any]:
    """A file of efficiencies, checked as far as its frame.

    Raises:
        InputError: it is too large, not JSON, or of another form.
    """
    data = read_json(path, "bench loop fit")
    known = isinstance(data, dict) and data.get("schema") == SCHEMA
    if not known or not isinstance(data.get("engines"), dict) or "host" not in data:
        raise InputError(f"{path}: not written by bench loop fit with schema {SCHEMA}")
    return dict(data)


def as_file(fits: Mapping[str, Fit], host: str, as_of: str) -> dict[str, Any]:
    """The JSON of a file: the effects that the host's runs speak of, by engine."""
    return {
        "schema": SCHEMA,
        "host": host,
        "as_of": as_of,
        "engines": {engine: to_json(fit) for engine, fit in fits.items()},
    }


def renamed(fit: Fit, device: str) -> Fit:
    """A fit whose effects of the device `local`, and of its cache, are those of another name."""
    endings = {f"/device={NAME}{x}": f"/device={device}{x}" for x in ("", CACHE)}
    effects = {}
    for name, effect in fit.effects.items():
        head, slash, tail = name.rpartition("/")
        effects[head + endings.get(slash + tail, slash + tail)] = effect
    errors = {
        q: {**e, "by_device": {device: {"leave_sweep_out": e["leave_sweep_out"]}}}
        if "leave_sweep_out" in e
        else e
        for q, e in fit.errors.items()
    }
    return dataclasses.replace(fit, effects=effects, errors=errors)


def merged(local: Fit, shipped: Fit) -> Fit:
    """The local effects, and the shipped ones that local runs say nothing about (at the spread
    that they had before any run)."""
    names = [*local.effects, *(n for n in shipped.effects if n not in local.effects)]
    rows = list(local.covariance)
    rows += [(0.0,) * i + (prior_spread(names[i]) ** 2,) for i in range(len(rows), len(names))]
    return dataclasses.replace(
        local,
        effects={n: local.effects.get(n, shipped.effect(n)) for n in names},
        covariance=tuple(rows),
    )


def other_host(shipped: Fit, quantity: str) -> float:
    """Spread (natural logarithm) between devices of a class: what the published fit's error grows
    by where the device of a run is left out of it."""
    errors = shipped.errors.get(quantity, {})
    alone, apart = (
        float(errors.get(k, {}).get("median", 0.0)) for k in ("leave_sweep_out", "leave_device_out")
    )
    return math.sqrt(max(0.0, apart**2 - alone**2)) / _MEDIAN

"""The files of the local loop: rounds measured, predictions written, and one beside the other.

Order matters and the version history shows it: `probe.json` and the probe's rounds, then
`predictions.json`, then the rounds of everything outside the probe, then `comparison.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.calibrate import errors_of
from bench.interleave import Round, best_probe, usable
from bench.loop_points import ENGINES, Point, points
from hwmodel.errors import RunFileError

if TYPE_CHECKING:
    from bench.loop_predict import Host

PROBE, PREDICTIONS, COMPARISON = "probe.json", "predictions.json", "comparison.json"
RULE = (
    "Measured is the median tokens/s of a point over its quiet rounds (the memory probes beside "
    "it agree within 10 % and reach 90 % of the best one seen on the host), where its engine's "
    "anchor was quiet in the probe as well. Otherwise it counts as a ratio: over the anchor of "
    "the same round, times what the anchor gave in the probe, for that is what the predictions "
    "start from. A point may be measured again until it has quiet rounds; the probes alone decide "
    "whether it has. Every point that the predictions list is judged; none is dropped."
)


@dataclass(frozen=True)
class Measured:
    """A point's speed in tokens/s: `basis` is quiet, steady, unsteady or anchored; `rounds` behind
    it."""

    tok_s: float
    basis: str
    rounds: int


def measured(
    rounds: Sequence[Round], wanted: Sequence[Point], at_probe: Mapping[str, Measured] | None = None
) -> dict[str, Measured]:
    """Speeds of points by id; those that no round has are left out.

    Args:
        at_probe: what the anchors gave in the probe, for `RULE`; without it the figures are those
            of the rounds, quiet where there are quiet ones.
    """
    best = best_probe(rounds)
    found: dict[str, Measured] = {}
    for p in wanted:
        own, kind = usable(rounds, best, p.id)
        if not own:
            continue
        anchor = (at_probe or {}).get(p.anchor)
        beside, _ = usable(rounds, best, p.id, p.anchor)
        if anchor and beside and not (kind == anchor.basis == "quiet"):
            ratio = median(r.arms[p.id].median_ts / r.arms[p.anchor].median_ts for r in beside)
            found[p.id] = Measured(ratio * anchor.tok_s, "anchored", len(beside))
        else:
            value = median(r.arms[p.id].median_ts for r in own)
            found[p.id] = Measured(value, kind, len(own))
    return found


def write_probe(folder: Path, device_file: Path, threads: int) -> dict[str, Any]:
    """Measure the last cache and keep it with the device file's text in `probe.json`.

    Raises:
        DeviceFileError: the device file is missing or not valid.
    """
    from bench.probe import CACHE_BYTES, cache_speeds
    from hwmodel.devices import read_device
    from refimpl.benchmark.host import cpu_name, machine_state

    read_device(device_file)
    found = {
        "as_of": time.strftime("%Y-%m-%d", time.gmtime()),
        "host": f"{cpu_name()}, {threads} threads",
        "threads": threads,
        "cache_bytes_per_s": median(cache_speeds(threads)),
        "cache_probe_bytes": CACHE_BYTES,
        "device": device_file.read_text(encoding="utf-8"),
        "state": machine_state(),
    }
    write(folder / PROBE, found)
    return found


def probed_bandwidth(folder: Path) -> float:
    """The read bandwidth in `probe.json`, bytes/s.

    Raises:
        RunFileError, DeviceFileError: the file is missing or not valid.
    """
    return host_of(folder, Path())[0].device.bandwidth_bytes_per_s


def host_of(folder: Path, models: Path) -> tuple[Host, dict[str, Any]]:
    """The host that `probe.json` describes, and that file.

    Raises:
        RunFileError, DeviceFileError: the file is missing or not valid.
    """
    import tomllib

    from bench.loop_predict import Host, cache_device
    from hwmodel.devices import parse_device

    probe = read(folder / PROBE, "bench loop probe")
    path = folder / PROBE
    try:
        device = parse_device(tomllib.loads(str(probe["device"])), path)
        cache = cache_device(
            device, float(probe["cache_bytes_per_s"]), "bench loop probe", str(probe["as_of"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path}: not written by bench loop probe ({error!r})") from None
    return Host(device, cache, models), probe


def write_predictions(folder: Path, models: Path, rounds: Sequence[Round]) -> dict[str, Any]:
    """Fit this host to the probe's rounds, predict every point and write `predictions.json`.

    Raises:
        RunFileError: the probe or some of its rounds are missing.
    """
    from bench.loop_predict import RESIDUAL, WIDE, fit_host, predictions
    from hwmodel.fit import load_fit
    from refimpl.benchmark.host import build_commit

    host, probe = host_of(folder, models)
    every = points()
    seen = [p for p in every if p.probe]
    at_probe = measured([r for r in rounds if r.case.startswith("probe ")], seen)
    missing = [p.id for p in seen if p.id not in at_probe]
    if missing:
        raise RunFileError(
            f"{folder}: {len(missing)} probe points are not measured, {missing[0]} first; "
            "run bench loop measure --probe"
        )
    tok_s = {k: m.tok_s for k, m in at_probe.items()}
    fits = fit_host(host, tok_s, every)
    shipped = load_fit()
    made = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": build_commit(),
        "host": probe["host"],
        "device": host.device.name,
        "bandwidth_bytes_per_s": host.device.bandwidth_bytes_per_s,
        "cache_bytes_per_s": host.cache.bandwidth_bytes_per_s,
        "rule": RULE,
        "how": "parts, bytes and operations of the cost model; effects of the shipped fit "
        f"(of {shipped.as_of}, {len(shipped.runs)} figures), moved by the probe points of this "
        "host alone",
        "spreads": {"wide": WIDE, "residual": RESIDUAL},
        "probe_points": [p.id for p in seen],
        "outside_the_probe": [p.id for p in every if not p.probe],
        "probe_basis": {k: [m.basis, m.rounds] for k, m in at_probe.items()},
        "points": predictions(host, fits, every, tok_s),
        "moves": {
            engine: {
                n: round(v - shipped.effect(n), 4)
                for n, v in fit.effects.items()
                if abs(v - shipped.effect(n)) > 5e-4
            }
            for engine, fit in fits.items()
        },
    }
    write(folder / PREDICTIONS, made)
    return made


def compare_loop(folder: Path, rounds: Sequence[Round]) -> dict[str, Any]:
    """Predictions as written beside what was measured, with errors of points outside the probe.

    Raises:
        RunFileError: there are no predictions, or nothing outside the probe was measured.
    """
    made = read(folder / PREDICTIONS, "bench loop predict")
    every = {p.id: p for p in points()}
    try:
        listed = [dict(r) for r in made["points"]]
        known = [every[str(r["id"])] for r in listed if str(r["id"]) in every]
        seen = {
            str(r["id"]): Measured(float(r["probe_measured"]), *made["probe_basis"][r["id"]])
            for r in listed
            if r["probe"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RunFileError(
            f"{folder / PREDICTIONS}: not written by bench loop predict ({error!r})"
        ) from None
    outside = [p for p in known if p.id not in seen]  # as the predictions list them
    found = {**measured(rounds, outside, seen), **seen}
    rows = []
    for r in listed:
        m = found.get(str(r["id"]))
        tok_s = m.tok_s if m else None
        rows.append({
            **{k: r[k] for k in ("id", "probe", "engine", "model", "quantity", "prompt", "depth",
                                 "drafts", "predicted", "low", "high")},
            "measured": tok_s,
            "basis": m.basis if m else "not measured",
            "rounds": m.rounds if m else 0,
            "ratio": r["predicted"] / tok_s if tok_s else None,
        })  # fmt: skip
    if not any(r["ratio"] and not r["probe"] for r in rows):
        raise RunFileError(f"{folder}: nothing outside the probe is measured: bench loop measure")
    return {
        "predictions_made": made["made"], "predictions_commit": made["commit"],
        "host": made["host"], "rule": made["rule"],
        "first_measured": _first(rounds, outside),
        "errors": {e: loop_errors(rows, e) for e in ENGINES}, "rows": rows,
    }  # fmt: skip


def _first(rounds: Sequence[Round], wanted: Sequence[Point]) -> str:
    ids = {p.id for p in wanted}
    began = min((r.started for r in rounds if ids & set(r.arms)), default=0.0)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))


def loop_errors(rows: Sequence[Mapping[str, Any]], engine: str) -> dict[str, Any]:
    """Errors of an engine's points outside the probe: over all and by kind, the share inside the
    bands, and how many were listed and measured."""
    listed = [r for r in rows if r["engine"] == engine and not r["probe"]]
    own = [r for r in listed if r["ratio"]]
    kinds: dict[str, list[float]] = {}
    for r in own:
        kinds.setdefault(kind_of(r), []).append(r["ratio"])
    inside = [r["low"] <= r["measured"] <= r["high"] for r in own]
    worst = max(own, key=lambda r: abs(r["ratio"] - 1), default=None)
    return {
        "listed": len(listed),
        "measured": len(own),
        **errors_of(r["ratio"] for r in own),
        "worst_point": worst["id"] if worst else "",
        "in_band": sum(inside) / len(inside) if inside else None,
        "by_kind": {k: errors_of(v) for k, v in kinds.items()},
    }


def kind_of(row: Mapping[str, Any]) -> str:
    """What a point asks: `slice decode`, `embedded prefill`, `slice drafts`, ..."""
    where = "embedded" if str(row["model"]).startswith("mini") else "slice"
    if row["prompt"]:
        return f"{where} prefill"
    return f"{where} drafts" if row["drafts"] else f"{where} decode"


def read(path: Path, command: str) -> dict[str, Any]:
    """A JSON object of the loop's folder.

    Raises:
        RunFileError: it is missing or no JSON object; `command` writes it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read ({error.strerror}); run {command}") from None
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"{path}: not JSON ({error}); run {command}") from None
    if not isinstance(found, dict):
        raise RunFileError(f"{path}: holds no JSON object; run {command}")
    return found


def write(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    from hwmodel.files import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, (text + "\n").encode())

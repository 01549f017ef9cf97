"""A probe as a device file: what `--device local` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.probe import HostProbe
from hwmodel.local import told_by_system

SOURCE = "bench probe"


def device_table(found: HostProbe) -> dict[str, Any]:
    """The device as a table: what the system tells of memory and cores, and what was measured.

    What was not measured stays out; peaks stay out, since no datasheet is known here.
    """
    table = told_by_system()
    day = time.strftime("%Y-%m-%d", time.gmtime(found.started))
    for section in ("bandwidth", "flop", "disk"):
        table.pop(section, None)
    if found.cache_bytes:
        note = "all last-level caches together"
        table["cpu"]["cache_bytes"] = {
            "value": float(found.cache_bytes), "source": "operating system", "as_of": day,
            "note": note,
        }  # fmt: skip
    table["sources"] = {SOURCE: f"measured by bench probe, {build()}"}
    table["notes"] = notes(found, day)
    for f in found.figures:
        *sections, key = f.key.split(".")
        at = table
        for name in sections:
            at = at.setdefault(name, {})
        low, high = f.quartiles
        note = f"{f.note}; median and quartiles of {len(f.samples)} samples"
        at[key] = {"value": f.value, "low": low, "high": high, "source": SOURCE, "as_of": day,
                   "note": note}  # fmt: skip
    return table


def notes(found: HostProbe, day: str) -> str:
    """How the figures came about, one sentence; plans print it."""
    best = found.figure("bandwidth.measured_bytes_per_s")
    assert best is not None
    low, high = (v / 1e9 for v in best.quartiles)
    text = (
        f"measured by bench probe on {day}: memory is read at {best.value / 1e9:.1f} GB/s "
        f"({low:.1f} to {high:.1f}) by {found.threads} threads; speeds count as shares of that, "
        "since no datasheet's peak is known"
    )
    return text + ("; the machine was busy: " + "; ".join(found.doubts) if found.doubts else "")


def build() -> str:
    """Version and commit of this program."""
    from refimpl.benchmark.host import build_commit, version

    commit = build_commit()
    return version() if commit == version() else f"{version()} ({commit})"


def toml_text(table: Mapping[str, Any]) -> str:
    """A device's table as TOML: plain keys, then one section a paragraph."""
    out = [f"{k} = {_value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for name, section in table.items():
        if isinstance(section, dict):
            out += _section(name, section)
    return "\n".join(out) + "\n"


def _section(name: str, section: Mapping[str, Any]) -> list[str]:
    plain = {k: v for k, v in section.items() if not _is_section(v)}
    lines = ["", f"[{name}]"] if plain else []
    lines += [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for key, inner in section.items():
        if _is_section(inner):
            lines += _section(f"{name}.{_key(key)}", inner)
    return lines


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) and "value" not in value


def _key(text: str) -> str:
    return text if text.replace("_", "").isalnum() and text.isascii() else json.dumps(text)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 or value != int(value) else f"{value:.6e}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value.replace("\x7f", "?"))
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    return "[" + ", ".join(_value(v) for v in value) + "]"


def write_device(found: HostProbe, path: Path) -> None:
    """Write the file, after reading its text as a plan would.

    Raises:
        DeviceFileError: the figures make no device (a fault of the probe).
        OSError: it cannot be written.
    """
    import tomllib

    from hwmodel.devices import parse_device
    from hwmodel.files import write_whole

    text = toml_text(device_table(found))
    parse_device(tomllib.loads(text), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())

"""The device `local`: this host, as far as it tells about itself without being measured.

Memory and processor come from the operating system. Bandwidth and arithmetic are not something a
system states: they are estimated from the core count and marked unverified, unless `bench probe`
has measured them into `local.toml` in the user's device folder, which then is the device.
"""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwmodel.devices import Device

_BYTES_PER_S_PER_CORE = 8e9  # what one core can keep in flight; capped by two channels of DDR4
_BYTES_PER_S_CAP = 51.2e9
_FLOP_PER_S_PER_CORE = 32 * 3e9  # 8 lanes, two fused multiply-adds a cycle, 3 GHz


def local_device() -> Device:
    """This host as a device: the probe's file where there is one, else what the system tells.

    Raises:
        DeviceFileError: the probe's file is not valid.
    """
    from hwmodel.devices import parse_device, read_device, user_folder

    probed = user_folder() / "local.toml"
    if probed.is_file():
        return read_device(probed)
    return parse_device(told_by_system(), "this host")


def told_by_system() -> dict[str, Any]:
    """What the operating system tells of this host, and guesses (unverified) of its speeds."""
    import psutil

    today = date.today().isoformat()
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    bandwidth = min(_BYTES_PER_S_CAP, cores * _BYTES_PER_S_PER_CORE)

    def told(value: float, note: str = "") -> dict[str, object]:
        return {"value": value, "source": "operating system", "as_of": today, "note": note}

    def guessed(value: float, note: str) -> dict[str, object]:
        return {"value": value, "source": "unverified", "as_of": today, "note": note}

    measure = "guessed from the core count; 'bench probe' measures it"
    total = _limit_bytes(float(memory.total))
    return {
        "schema": 1,
        "name": "local",
        "title": f"this host: {cpu_name()}, {total / 1e9:.0f} GB",
        "class": "cpu",
        "unified": True,
        "max_per_host": 1,
        "api": ["cpu"],
        "memory": {
            "total_bytes": told(total),
            "reserve_bytes": told(
                max(0.0, min(total, total - min(total, float(memory.available)))),
                "in use by other processes",
            ),
        },
        "bandwidth": {"peak_bytes_per_s": guessed(bandwidth, measure)},
        "flop": {"fp32_per_s": guessed(cores * _FLOP_PER_S_PER_CORE, measure)},
        "disk": {"read_bytes_per_s": guessed(1e9, "a plain solid-state disk")},
        "cpu": {"threads": told(float(os.cpu_count() or 1)), "cores": told(float(cores))},
    }


def _limit_bytes(total: float) -> float:
    """The host's memory, or the smaller limit of the container this process runs in."""
    try:
        stated = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, float(stated)) if stated.isdigit() else total
    except (OSError, ValueError):
        return total


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if line.lower().startswith("model name"):
                        return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine() or "unknown processor"

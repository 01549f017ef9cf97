"""The form of a device file: its sections and keys, and what every number must satisfy."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwmodel import names
from hwmodel.errors import DeviceFileError
from hwmodel.files import STDIN, read_short
from hwmodel.quantity import Quantity, read_quantity

# class -> the backends of a file that states none, first choice first
DEFAULT_API: dict[str, tuple[str, ...]] = {
    "apple": ("metal", "cpu"),
    "nvidia-datacenter": ("cuda", "vulkan"),
    "nvidia-consumer": ("cuda", "vulkan"),
    "nvidia-unified": ("cuda", "cpu"),
    "amd-instinct": ("rocm", "vulkan"),
    "amd-apu": ("vulkan", "rocm", "cpu"),
    "amd-consumer": ("rocm", "vulkan"),
    "intel": ("sycl", "vulkan"),
    "cpu": ("cpu",),
}
DEVICE_CLASSES = tuple(DEFAULT_API)
DTYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")
# section -> the quantities it may hold
QUANTITIES: dict[str, tuple[str, ...]] = {
    "memory": ("total_bytes", "reserve_bytes", "usable_bytes", "raised_usable_bytes"),
    "bandwidth": ("peak_bytes_per_s", "measured_bytes_per_s", "cache_bytes_per_s"),
    "flop": tuple(f"{m}{d}_per_s" for m in ("", "measured_") for d in DTYPES),
    "overhead": ("launch_s", "barrier_s"),
    "links": ("host_bytes_per_s", "device_bytes_per_s", "network_bytes_per_s"),
    "disk": tuple(f"{w}{r}read_bytes_per_s" for w in ("", "warm_") for r in ("", "random_")),
    "price": ("buy_usd", "rent_usd_per_h"),
    "power": ("limit_w",),
    "cpu": ("threads", "cores", "cache_bytes"),
}
TEXTS: dict[str, tuple[str, ...]] = {
    "memory": ("raise_how",),
    "links": ("host_kind", "device_kind", "network_kind"),
}
_TOP = {"schema", "name", "title", "class", "unified", "max_per_host", "api", "notes", "sources"}
BY_THREADS = "by_threads"
PEAK, MEASURED = "bandwidth.peak_bytes_per_s", "bandwidth.measured_bytes_per_s"
# of the processor's last cache: read speed of what lies in it, and its size
CACHE_SPEED, CACHE_SIZE = "bandwidth.cache_bytes_per_s", "cpu.cache_bytes"


def file_name(path: Path | str) -> str:
    """What a file is called in messages."""
    return "standard input" if str(path) == STDIN else str(path)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file (`-` for standard input) as a table.

    Raises:
        DeviceFileError: the file is missing, too large to be one of ours, or not TOML.
    """
    file = file_name(path)
    try:
        found = read_short(path, 1 << 20)
        if found is None:
            raise DeviceFileError(f"{file}: larger than 1 MiB, expected a short TOML file")
        return tomllib.loads(found.decode("utf-8"))
    except OSError as error:
        raise DeviceFileError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DeviceFileError(f"{file}: not a TOML file ({error})") from error


def by_threads(
    table: Any, dotted: str, sources: Mapping[str, str], file: Path | str
) -> dict[str, Quantity]:
    """The quantities of a table by number of threads, each under `dotted` and the number.

    Raises:
        DeviceFileError: no table, a key that is no number, or what `read_quantity` refuses.
    """
    if not isinstance(table, dict):
        raise DeviceFileError(f"{file}: '{dotted}' is {table!r}, expected a table")
    found = {}
    for count, entry in table.items():
        if not (count.isascii() and count.isdigit() and 1 <= int(count[:7]) <= 100_000):
            raise DeviceFileError(f"{file}: '{dotted}.{count}': expected a number of threads")
        found[f"{dotted}.{count}"] = read_quantity(file, f"{dotted}.{count}", entry, sources)
    return found


def read_sources(raw: Mapping[str, Any], file: Path | str) -> Mapping[str, str]:
    """The `[sources]` table of a device or engine file, source by short name.

    Raises:
        DeviceFileError: it is no table of texts.
    """
    sources = raw.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(v, str) for v in sources.values()):
        raise DeviceFileError(f"{file}: 'sources' must be a table of texts")
    return sources


def check_top(raw: Mapping[str, Any], file: Path | str) -> None:
    """What stands above the sections: names, class, backends.

    Raises:
        DeviceFileError: see `hwmodel.devices.load_device`.
    """
    extra = sorted(set(raw) - _TOP - set(QUANTITIES))
    if extra:
        raise DeviceFileError(f"{file}: unknown key '{extra[0]}'")
    if raw.get("schema") != 1:
        raise DeviceFileError(f"{file}: 'schema' {_found(raw, 'schema')}, expected 1")
    if not isinstance(raw.get("name"), str) or not raw["name"].strip():
        raise DeviceFileError(f"{file}: 'name' {_found(raw, 'name')}, expected a short text")
    if raw.get("class") not in DEVICE_CLASSES:
        raise DeviceFileError(
            f"{file}: 'class' {_found(raw, 'class')}, expected one of {', '.join(DEVICE_CLASSES)}"
        )
    count = raw.get("max_per_host", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise DeviceFileError(f"{file}: 'max_per_host' is {count!r}, expected 1 to 1024")
    if not isinstance(raw.get("unified", False), bool):
        raise DeviceFileError(f"{file}: 'unified' is {raw['unified']!r}, expected true or false")
    api = raw.get("api", [])
    if not isinstance(api, list) or not all(isinstance(a, str) for a in api):
        raise DeviceFileError(f"{file}: 'api' is {api!r}, expected a list of backends")
    for backend in api:
        if names.canonical("backend", backend) is None:
            near = names.suggest("backend", backend)
            raise DeviceFileError(
                f"{file}: unknown backend {backend!r} in 'api', expected such as {', '.join(near)}"
            )


def _found(raw: Mapping[str, Any], key: str) -> str:
    return f"is {raw[key]!r:.60}" if key in raw else "is missing"


def check_quantities(
    quantities: Mapping[str, Quantity], texts: Mapping[str, str], file: Path | str
) -> None:
    """What is required, and that sizes are bytes and speeds bytes per second.

    Raises:
        DeviceFileError: see `hwmodel.devices.load_device`.
    """
    bandwidth = MEASURED if MEASURED in quantities and PEAK not in quantities else PEAK
    for key in ("memory.total_bytes", bandwidth):
        found = quantities.get(key)
        if found is None or found.value <= 0:
            raise DeviceFileError(f"{file}: '{key}' is missing or 0; state it")
    total = quantities["memory.total_bytes"].value
    if not 1e8 <= total <= 1e15:
        raise DeviceFileError(
            f"{file}: 'memory.total_bytes' is {total:.4g}, expected bytes (1e8 to 1e15)"
        )
    wide = quantities[bandwidth].value
    if not 1e8 <= wide <= 1e15:
        raise DeviceFileError(
            f"{file}: '{bandwidth}' is {wide:.4g}, expected bytes/s (1e8 to 1e15)"
        )
    for key in ("reserve_bytes", "usable_bytes", "raised_usable_bytes"):
        found = quantities.get(f"memory.{key}")
        if found is not None and found.value > total:
            raise DeviceFileError(f"{file}: 'memory.{key}' is more than 'memory.total_bytes'")
    if "memory.raised_usable_bytes" in quantities and not texts.get("memory.raise_how"):
        raise DeviceFileError(f"{file}: 'memory.raised_usable_bytes' needs 'memory.raise_how'")

"""Devices: what memory, bandwidth, arithmetic and links a machine has, each number with a source.

One TOML file per device in `hwmodel/devices/`, the same form for a hand-written datasheet and for
`bench probe`. A user's own files are found by path, or by name in the folder that the environment
variable `HWMODEL_DEVICES` names (default `~/.config/hwmodel/devices`). The form::

    schema = 1
    name = "my-box"
    title = "My box"
    class = "nvidia-consumer"
    unified = false            # true: processor and GPU share one memory
    max_per_host = 2           # how many one machine can hold
    api = ["cuda", "vulkan"]   # backends that can run on it

    [sources]
    vendor = "https://example.com/datasheet"

    [memory]
    total_bytes = { value = 25757220864, source = "vendor", as_of = "2026-03" }
    reserve_bytes = { ... }        # display, driver, operating system: never usable
    raised_usable_bytes = { ... }  # what a documented setting makes usable
    raise_how = "sudo sysctl iogpu.wired_limit_mb=122880"

    [bandwidth]
    peak_bytes_per_s = { ... }     # datasheet
    measured_bytes_per_s = { ... } # somebody's measurement; never merged with the peak
    cache_bytes_per_s = { ... }    # of what lies in a processor's last cache, cpu.cache_bytes large
    [bandwidth.by_threads]         # measured by so many threads
    2 = { ... }

    [flop]                         # dense peaks
    bf16_per_s = { ... }
    int8_per_s = { ... }           # what llama.cpp multiplies with on NVIDIA, whatever is stored
    measured_fp32_per_s = { ... }  # what a matrix product of this type reached

    [overhead]
    launch_s = { ... }             # of starting all threads
    barrier_s = { ... }            # of waiting for all of them

    [links]
    host_bytes_per_s = { ... }     # to the processor's memory, per direction
    device_bytes_per_s = { ... }   # to a like device in the same machine, per direction
    device_kind = "NVLink"
    network_bytes_per_s = { ... }  # to a like device in the next machine, per direction

    [disk]
    read_bytes_per_s = { ... }     # in order, from the disk itself
    random_read_bytes_per_s = { ... }  # one expert's matrix here and there
    warm_read_bytes_per_s = { ... }    # in order, from the system's memory
    warm_random_read_bytes_per_s = { ... }

    [price]
    buy_usd = { ... }
    rent_usd_per_h = { ... }

    [power]
    limit_w = { ... }              # most it draws; a machine's own where it is one

    [cpu]
    threads = { ... }
    cache_bytes = { ... }          # all last-level caches together

A device whose peak bandwidth nobody states (a virtual machine, say) may state the measured one
alone; `bench probe` writes such a file for this host, each number with the quartiles of its samples
(`low`, `high`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hwmodel import names
from hwmodel.device_file import (
    BY_THREADS,
    DEFAULT_API,
    DTYPES,
    MEASURED,
    PEAK,
    QUANTITIES,
    TEXTS,
    by_threads,
    check_quantities,
    check_top,
    file_name,
    read_sources,
    read_toml,
)
from hwmodel.errors import DeviceFileError, UnknownNameError
from hwmodel.files import STDIN
from hwmodel.quantity import Quantity, read_quantity

LOCAL = "local"


@dataclass(frozen=True)
class Device:
    """One device; every number is a `Quantity` under `section.key`, plain SI by the accessors.

    Attributes:
        name: canonical name, lower case.
        title: what people call it.
        device_class: one of `DEVICE_CLASSES`; efficiencies are learned and reported by it.
        unified: processor and GPU share one memory.
        max_per_host: how many of it one machine holds (1: more of them means a network).
        api: backends that run on it, first choice first.
        quantities: every number with its source, by dotted key such as `memory.total_bytes`.
        texts: how to raise a limit, kinds of link.
        file: where it was read.
    """

    name: str
    title: str
    device_class: str
    unified: bool
    max_per_host: int
    api: tuple[str, ...]
    quantities: Mapping[str, Quantity]
    texts: Mapping[str, str]
    notes: str
    file: str

    def get(self, key: str) -> Quantity | None:
        """The quantity under a dotted key, None where the file does not state it."""
        return self.quantities.get(key)

    def _value(self, key: str) -> float | None:
        found = self.quantities.get(key)
        return None if found is None else found.value

    @property
    def memory_bytes(self) -> float:
        """All memory the device shows to its system."""
        return self.quantities["memory.total_bytes"].value

    @property
    def reserve_bytes(self) -> float:
        """Memory that display, driver or operating system keep."""
        return self._value("memory.reserve_bytes") or 0.0

    @property
    def usable_bytes(self) -> float:
        """What one process can have as the machine comes: a stated limit, else total − reserve."""
        stated = self._value("memory.usable_bytes")
        return self.memory_bytes - self.reserve_bytes if stated is None else stated

    @property
    def raised_usable_bytes(self) -> float | None:
        """What a documented setting makes usable, None where there is no such setting."""
        return self._value("memory.raised_usable_bytes")

    @property
    def raise_how(self) -> str:
        """The setting that gives `raised_usable_bytes`, as one types it."""
        return self.texts.get("memory.raise_how", "")

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Datasheet memory bandwidth; where no datasheet states one, the measured bandwidth."""
        return self.quantities[MEASURED if self.peak_is_unknown else PEAK].value

    @property
    def peak_is_unknown(self) -> bool:
        """True where only measured figures are known, as for most virtual machines."""
        return PEAK not in self.quantities

    @property
    def measured_bandwidth_bytes_per_s(self) -> float | None:
        """A measured read bandwidth, None where nobody published one."""
        return self._value(MEASURED)

    @property
    def bandwidth_by_threads(self) -> Mapping[int, float]:
        """Measured read bandwidth by number of threads, bytes/s; empty where nobody measured."""
        head = f"bandwidth.{BY_THREADS}."
        found = {k: q.value for k, q in self.quantities.items() if k.startswith(head)}
        return {int(k.removeprefix(head)): v for k, v in found.items()}

    @cached_property
    def flop_per_s(self) -> Mapping[str, float]:
        """Dense peaks by type, of `DTYPES` those that the file states; where it states no peak at
        all, what was measured."""
        has_peak = any(f"flop.{d}_per_s" in self.quantities for d in DTYPES)
        measured = "" if has_peak else "measured_"
        found = {d: self._value(f"flop.{measured}{d}_per_s") for d in DTYPES}
        return {d: value for d, value in found.items() if value is not None}

    @property
    def host_link_bytes_per_s(self) -> float | None:
        """Link to the processor's memory per direction (None: unified or unknown)."""
        return self._value("links.host_bytes_per_s")

    @property
    def link_bytes_per_s(self) -> float | None:
        """Link to the next like device per direction: in the same machine, or, for a device that
        is alone in its machine, over the network."""
        key = "network" if self.max_per_host == 1 else "device"
        return self._value(f"links.{key}_bytes_per_s")

    @property
    def link_kind(self) -> str:
        """Kind of that link: NVLink, PCIe, xGMI, RoCE, Thunderbolt or empty."""
        key = "network" if self.max_per_host == 1 else "device"
        return self.texts.get(f"links.{key}_kind", "")

    @property
    def network_bytes_per_s(self) -> float | None:
        """Link to a like device in another machine per direction."""
        return self._value("links.network_bytes_per_s")

    @property
    def network_kind(self) -> str:
        """Kind of that link."""
        return self.texts.get("links.network_kind", "")

    @property
    def disk_bytes_per_s(self) -> float | None:
        """Sequential read speed of the machine's disk."""
        return self._value("disk.read_bytes_per_s")

    @property
    def price_usd(self) -> float | None:
        """Price of one, new where it is sold new."""
        return self._value("price.buy_usd")

    @property
    def rent_usd_per_h(self) -> float | None:
        """Price of renting one for an hour."""
        return self._value("price.rent_usd_per_h")

    @property
    def limit_w(self) -> float | None:
        """Most power that one draws."""
        return self._value("power.limit_w")

    @property
    def is_cpu(self) -> bool:
        """True for processors without a GPU."""
        return self.device_class == "cpu"

    def unverified(self) -> tuple[str, ...]:
        """Dotted keys of the numbers nobody has checked, sorted."""
        return tuple(sorted(k for k, q in self.quantities.items() if not q.is_verified))


def user_folder() -> Path:
    """Where a user's own device files are looked for; below the working folder where the user has
    no home, as in containers that give a bare number."""
    if stated := os.environ.get("HWMODEL_DEVICES"):
        return Path(stated)
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    return home / ".config" / "hwmodel" / "devices"


def _shipped_folder() -> Path:
    return Path(__file__).parent / "devices"


def device_names() -> tuple[str, ...]:
    """Names of all shipped devices and of the user's own, sorted, `local` last."""
    found = {p.stem for folder in (_shipped_folder(), user_folder()) for p in folder.glob("*.toml")}
    return (*sorted(found), LOCAL)


def is_own(text: str) -> bool:
    """Whether a name means the user's own device file, by its path or by its name."""
    name = text.strip()
    return name.endswith(".toml") or name.lower() in {p.stem for p in user_folder().glob("*.toml")}


def load_device(name_or_path: str | Path) -> Device:
    """A device by name (any alias, any case), by the path of its file (`-`: standard input), or
    this host (`local`).

    Raises:
        UnknownNameError: no such name; the nearest ones are offered.
        DeviceFileError: the file is missing, is not TOML, lacks a source or a required number.
    """
    text = str(name_or_path).strip()
    if text.endswith(".toml") or os.sep in text or text == STDIN:
        return read_device(Path(text))
    if text.lower() == LOCAL:
        from hwmodel.local import local_device

        return local_device()
    own = user_folder() / f"{text.lower()}.toml"
    if own.is_file():
        return read_device(own)
    name = names.canonical("device", text)
    if name is None:
        raise UnknownNameError("device", text, names.suggest("device", text, device_names()))
    return _shipped(name.id)


@lru_cache(maxsize=64)
def _shipped(name: str) -> Device:
    return read_device(_shipped_folder() / f"{name}.toml")


def read_device(path: Path) -> Device:
    """One device file, checked.

    Raises:
        DeviceFileError: see `load_device`.
    """
    return parse_device(read_toml(path), file_name(path))


def parse_device(raw: Mapping[str, Any], file: Path | str) -> Device:
    """A device from its TOML table, checked.

    Raises:
        DeviceFileError: see `load_device`.
    """
    check_top(raw, file)
    sources = read_sources(raw, file)
    quantities: dict[str, Quantity] = {}
    texts: dict[str, str] = {}
    for section in QUANTITIES:
        table = raw.get(section, {})
        if not isinstance(table, dict):
            raise DeviceFileError(f"{file}: '{section}' is {table!r}, expected a table")
        for key, entry in table.items():
            dotted = f"{section}.{key}"
            if key in TEXTS.get(section, ()):
                texts[dotted] = str(entry)
            elif key in QUANTITIES[section]:
                quantities[dotted] = read_quantity(file, dotted, entry, sources)
            elif dotted == f"bandwidth.{BY_THREADS}":
                quantities |= by_threads(entry, dotted, sources, file)
            else:
                known = ", ".join(QUANTITIES[section] + TEXTS.get(section, ()))
                raise DeviceFileError(f"{file}: unknown key '{dotted}', expected one of {known}")
    check_quantities(quantities, texts, file)
    return Device(
        name=str(raw["name"]).lower(),
        title=str(raw.get("title", raw["name"])),
        device_class=raw["class"],
        unified=bool(raw.get("unified", False)),
        max_per_host=int(raw.get("max_per_host", 1)),
        api=tuple(raw.get("api") or DEFAULT_API[raw["class"]]),
        quantities=quantities,
        texts=texts,
        notes=str(raw.get("notes", "")),
        file=str(file),
    )

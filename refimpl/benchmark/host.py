"""What machine and what build a figure was made with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any


@cache
def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        found = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if found:
            return found
    return platform.processor() or platform.machine()


@cache
def version() -> str:
    """Version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("step-flash-reference")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def build_commit() -> str:
    """Commit of the working tree that this code runs from, '+' behind it if files differ from
    it; the package's version where it runs from no working tree."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    if not _output([*git, "ls-files", here.name]):
        return version()
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ":/refimpl"])
    return (commit + ("+" if changed else "")) if commit else version()


def machine_state() -> dict[str, Any]:
    """Load and memory at this moment: load averages, memory in bytes, clock in MHz if known."""
    import os

    import psutil

    memory = psutil.virtual_memory()
    state: dict[str, Any] = {
        "memory_available_bytes": memory.available,
        "memory_total_bytes": memory.total,
    }
    if hasattr(os, "getloadavg"):
        state["load_average"] = [round(x, 2) for x in os.getloadavg()]
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    if frequency is not None and frequency.current:
        state["clock_mhz"] = round(frequency.current)
    return state


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

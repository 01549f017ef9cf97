"""`hwmodel devices` and `hwmodel engines`: what is known about machines and engines."""

from __future__ import annotations

from typing import Any

import click

from hwmodel.cli_support import CommandGroup, print_json, table
from hwmodel.devices import Device, device_names, load_device
from hwmodel.engines import Engine, engine_names, load_engine
from hwmodel.quantity import Quantity


@click.group(cls=CommandGroup)
def devices() -> None:
    """Devices: list them, show one with its sources, check a file of your own.

    \b
    Example:
      hwmodel devices show dgx-spark
    """


@devices.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_devices(as_json: bool) -> None:
    """All devices by name.

    \b
    Example:
      hwmodel devices list
    """
    found = [load_device(name) for name in device_names() if name != "local"]
    if as_json:
        print_json([device_json(d) for d in found])
        return
    rows = [
        [
            d.name,
            f"{d.usable_bytes / 1e9:.1f}",
            f"{d.raised_usable_bytes / 1e9:.1f}" if d.raised_usable_bytes else "",
            f"{d.bandwidth_bytes_per_s / 1e9:,.0f}",
            f"{d.price_usd:,.0f}" if d.price_usd else "",
            d.device_class,
            d.title,
        ]
        for d in found
    ]
    header = ["name", "usable GB", "raised GB", "peak GB/s", "USD", "class", "title"]
    click.echo(table(header, rows))


@devices.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def show_device(name: str, as_json: bool) -> None:
    """One device: every number with its source.

    \b
    Example:
      hwmodel devices show m4max
    """
    device = load_device(name)
    if as_json:
        print_json(device_json(device))
        return
    click.echo(f"{device.title} ({device.name}, {device.device_class}, {', '.join(device.api)})")
    if device.raise_how:
        click.echo(f"raise the limit: {device.raise_how}")
    if device.notes:
        click.echo(device.notes)
    click.echo(_quantities(device.quantities))


@devices.command("check")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def check_device(file: str, as_json: bool) -> None:
    """Check a device file: a number without a source is refused.

    \b
    Example:
      hwmodel devices check my-box.toml
    """
    device = load_device(file)
    if as_json:
        print_json({"name": device.name, "ok": True, "unverified": list(device.unverified())})
        return
    doubts = device.unverified()
    tail = f"; unverified: {', '.join(doubts)}" if doubts else ""
    click.echo(f"{device.name}: {len(device.quantities)} numbers, each with a source{tail}")


@click.group(cls=CommandGroup)
def engines() -> None:
    """Engines: list them, show one with its sources and flags.

    \b
    Example:
      hwmodel engines show llama.cpp
    """


@engines.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_engines(as_json: bool) -> None:
    """All engines by name.

    \b
    Example:
      hwmodel engines list
    """
    found = [load_engine(name) for name in engine_names()]
    if as_json:
        print_json([engine_json(e) for e in found])
        return
    rows = [
        [
            e.name,
            ", ".join(e.backends),
            ", ".join(e.splits),
            str(e.max_drafts),
            e.sliding_cache,
            "yes" if e.in_plan else "",
            e.version,
        ]
        for e in found
    ]
    header = ["name", "backends", "splits", "drafts", "sliding KV", "in plans", "version"]
    click.echo(table(header, rows))


@engines.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def show_engine(name: str, as_json: bool) -> None:
    """One engine: numbers with their sources, and how its flags are spelled.

    \b
    Example:
      hwmodel engines show vllm
    """
    engine = load_engine(name)
    if as_json:
        print_json(engine_json(engine))
        return
    click.echo(f"{engine.title} {engine.version} ({', '.join(engine.backends)})")
    click.echo(f"loads: {', '.join(engine.quants) or 'not stated'}")
    click.echo(f"KV types: {', '.join(engine.kv_types)}; sliding layers: {engine.sliding_cache}")
    if engine.unsupported:
        click.echo(f"does not support: {', '.join(engine.unsupported)}")
    if engine.fp8_without_rate:
        click.echo(f"FP8 needs FP8 arithmetic on: {', '.join(engine.fp8_without_rate)}")
    if engine.notes:
        click.echo(engine.notes)
    click.echo(_quantities(engine.quantities))
    if engine.flags:
        click.echo(table(["setting", "flag"], [[k, v] for k, v in engine.flags.items()]))


def _quantities(found: Any) -> str:
    rows = [[k, _plain(q.value), _quartiles(q), q.as_of, _origin(q)]
            for k, q in sorted(found.items())]  # fmt: skip
    header = ["number", "value", "quartiles", "as of", "source"]
    if not any(row[2] for row in rows):
        header, rows = [h for h in header if h != "quartiles"], [r[:2] + r[3:] for r in rows]
    return table(header, rows)


def _quartiles(q: Quantity) -> str:
    return "" if q.low is None or q.high is None else f"{_plain(q.low)} to {_plain(q.high)}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and value < 1e7 else f"{value:.6g}"


def _origin(q: Quantity) -> str:
    return f"{q.source} ({q.note})" if q.note else q.source


def _quantity_json(q: Quantity) -> dict[str, Any]:
    found = {"value": q.value, "source": q.source, "as_of": q.as_of, "note": q.note}
    return found if q.low is None else {**found, "low": q.low, "high": q.high}


def device_json(d: Device) -> dict[str, Any]:
    """A device as plain values."""
    return {
        "name": d.name,
        "title": d.title,
        "class": d.device_class,
        "unified": d.unified,
        "max_per_host": d.max_per_host,
        "api": list(d.api),
        "memory_bytes": d.memory_bytes,
        "usable_bytes": d.usable_bytes,
        "raised_usable_bytes": d.raised_usable_bytes,
        "raise_how": d.raise_how or None,
        "notes": d.notes,
        "quantities": {k: _quantity_json(q) for k, q in sorted(d.quantities.items())},
        "texts": dict(d.texts),
    }


def engine_json(e: Engine) -> dict[str, Any]:
    """An engine as plain values."""
    return {
        "name": e.name,
        "title": e.title,
        "version": e.version,
        "date": e.date,
        "backends": list(e.backends),
        "quants": list(e.quants),
        "published": list(e.published),
        "kv_types": list(e.kv_types),
        "sliding_cache": e.sliding_cache,
        "splits": list(e.splits),
        "host_experts": e.host_experts,
        "ssd_streaming": e.ssd_streaming,
        "max_drafts": e.max_drafts,
        "in_plan": e.in_plan,
        "unsupported": list(e.unsupported),
        "fp8_without_rate": list(e.fp8_without_rate),
        "notes": e.notes,
        "quantities": {k: _quantity_json(q) for k, q in sorted(e.quantities.items())},
        "flags": dict(e.flags),
    }

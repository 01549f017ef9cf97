"""What `refimpl generate` says and asks about the engine: options, notes, statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from refimpl.cli_support import note, progress_bar

if TYPE_CHECKING:
    from refimpl.backends import OpenModel
    from refimpl.decoding.generation import Generation

_COMPILE_S = 10
"""Seconds that compiling takes on a two-core server; for the announcement only."""


memory_option = click.option(
    "--memory",
    type=float,
    metavar="GB",
    help="What the engine may use; of a larger model, experts are read from disk when they are "
    "chosen. [default: what is free]",
)
"""For every command that runs a model on the engine; `memory_bytes` reads it."""


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `generate` that only the engine has."""
    for option in (
        click.option(
            "--simulate-acceptance",
            metavar="P1,P2,P3",
            help="For benchmarks: the i-th draft stands with chance Pi; the text means nothing.",
        ),
        click.option(
            "--stats",
            is_flag=True,
            help="Bytes per token, GB/s and share of this machine's read limit, experts found "
            "in memory, what this process's memory is taken by, and whether prefill uses AMX.",
        ),
        memory_option,
        click.option(
            "--kv-type",
            type=click.Choice(["f16", "f32", "q8_0"]),
            help="How the engine keeps keys and values. [default: f16, with --exact f32]",
        ),
        click.option(
            "--exact", is_flag=True, help="Engine: no int8 activations, f32 keys and values."
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def opened_model(given: dict[str, Any]) -> Iterator[OpenModel]:
    """The model that the options ask for; what takes long is announced.

    Raises:
        InputError: options that contradict each other, or those of `open_model`.
    """
    from refimpl.backends import EngineOptions, open_model
    from refimpl.errors import InputError

    if given["simulate_acceptance"] is not None:
        _rates(given["simulate_acceptance"])
    memory = memory_bytes(given["memory"])

    told = False
    with progress_bar("reading the file") as move:

        def reading(done: int, total: int) -> None:
            nonlocal told
            if not told:
                note(f"reading {total / 1e9:.1f} GB into memory")
                told = True
            move(done, total)

        options = EngineOptions(
            given["exact"], given["kv_type"], announce_compiling, reading, memory
        )
        choice = given["model"], given["backend"], given["dtype"], given["threads"], options
        with open_model(*choice, mtp_model=given["mtp_model"]) as model:
            if model.name != "engine" and given["stats"]:
                raise InputError("--stats measures the engine; the reference is not made for speed")
            note_residency(model.backend)
            yield model


def announce_compiling() -> None:
    """What `EngineOptions.on_compile` says on every command that runs the engine."""
    note(f"compiling kernels for this CPU, once: about {_COMPILE_S} s")


def memory_bytes(size: float | None) -> int | None:
    """Bytes of --memory.

    Raises:
        InputError: no size.
    """
    from refimpl.errors import InputError

    if size is None:
        return None
    if not 0 < size < float("inf"):
        raise InputError(f"--memory is {size:g}, expected GB above 0, such as 16")
    return int(1e9 * size)


def note_residency(backend: Any) -> None:
    """Say what of a model larger than memory is held, now or when a cache makes it so."""
    program = getattr(backend, "program", None)
    if program is not None and program.amx.failed:
        note(f"note: prefill without AMX: {program.amx.reason}")
    if getattr(backend, "residency", None) is not None:
        _note_held(backend.residency, "the model is")
    elif hasattr(backend, "on_residency"):
        what = "the model with its context is"
        backend.on_residency = lambda: _note_held(backend.residency, what)


def _note_held(residency: Any, what_is: str) -> None:
    held, size = residency.slots, residency.slots * residency.slot_bytes
    note(
        f"note: {what_is} larger than the memory it may use: {held} of "
        f"{residency.experts} experts ({_bytes(size)}) are held, others are read when chosen"
    )


def measured(model: OpenModel, given: dict[str, Any]) -> OpenModel:
    """The same model, with what --stats and --simulate-acceptance put around its backend."""
    import dataclasses

    backend: Any = model.backend
    if given["stats"]:
        from refimpl.engine.stats import Meter

        backend = Meter(backend.source, backend)
        given["meter"] = backend
    if given["simulate_acceptance"] is not None:
        from refimpl.benchmark.simulated import SimulatedAcceptance

        rates = _rates(given["simulate_acceptance"])
        note(f"note: drafts stand at simulated rates {given['simulate_acceptance']}: for timing")
        backend = SimulatedAcceptance(backend, rates)
    return dataclasses.replace(model, backend=backend)


def _rates(text: str) -> tuple[float, ...]:
    """Chances of acceptance from 'P1,P2,P3'."""
    from refimpl.decoding.kv import SPECULATIVE_ROWS
    from refimpl.errors import InputError

    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not 1 <= len(rates) <= SPECULATIVE_ROWS or not all(0 <= p <= 1 for p in rates):
        raise InputError(
            f"--simulate-acceptance is {text!r}, expected 1 to {SPECULATIVE_ROWS} chances from "
            "0 to 1, such as .88,.77,.69"
        )
    return rates


def about(model: OpenModel, made: Generation, given: dict[str, Any]) -> dict[str, Any]:
    """The JSON fields that say what ran the model and how; the same is noted on stderr."""
    fields: dict[str, Any] = {"backend": model.name, "dtype": given["dtype"] or "float32"}
    if model.name == "engine":
        fields["dtype"] = None  # its arithmetic is described below
        fields["engine"] = described = _describe(model)
        note(
            f"backend: engine ({described['simd']}, {described['threads']} threads, "
            f"{described['activations']} activations, {described['kv_type']} KV)"
        )
    if given["simulate_acceptance"] is not None:
        fields["simulated_acceptance"] = list(_rates(given["simulate_acceptance"]))
    meter = given.get("meter")
    if meter is not None:
        note(f"stats: AMX in prefill: {fields['engine']['amx']}")
        fields["stats"] = stats = meter.report(made.timings.decoded_tokens)
        _print_stats(stats)
    return fields


def _describe(model: OpenModel) -> dict[str, Any]:
    backend: Any = model.backend
    described: dict[str, Any] = backend.description
    return described


def _print_stats(stats: dict[str, Any] | None) -> None:
    if stats is None:
        note("stats: nothing was decoded")
        return
    each = stats["weight_bytes_per_token"] + stats["kv_bytes_per_token"]
    note(
        f"stats: {_bytes(each)} read per token ({_bytes(stats['expert_bytes_per_token'])} of "
        f"experts, {_bytes(stats['kv_bytes_per_token'])} of KV), "
        f"{stats['bytes_per_s'] / 1e9:.1f} GB/s, {100 * stats['share_of_read_limit']:.0f} % of the "
        f"{stats['read_limit_bytes_per_s'] / 1e9:.1f} GB/s that memory gives these threads"
    )
    parts = []
    if stats["expert_hit_rate"] is not None:
        parts.append(f"{100 * stats['expert_hit_rate']:.1f} % of expert bytes were in memory")
    if stats["file_bytes_in_memory"] is not None:
        share = stats["file_bytes_in_memory"] / stats["file_bytes"]
        parts.append(f"{100 * share:.0f} % of the file's {_bytes(stats['file_bytes'])} are now")
    if parts:
        note(f"stats: {', '.join(parts)}")
    if (memory := stats["resident"]) is not None:
        note(
            f"stats: {_bytes(memory['total_bytes'])} of memory: {_bytes(memory['model_bytes'])} "
            f"of the model, {_bytes(memory['cache_bytes'])} of KV, "
            f"{_bytes(memory['activation_bytes'])} of activations, "
            f"{_bytes(memory['other_bytes'])} of interpreter, libraries and all else"
        )
    if stats["disk_bytes_per_s"] is not None:
        limit = stats["disk_limit_bytes_per_s"]
        note(
            f"stats: {_bytes(stats['disk_bytes_per_token'])} of experts read from disk per token, "
            f"{stats['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{100 * stats['disk_bytes_per_s'] / limit:.0f} % of the {limit / 1e9:.2f} GB/s that "
            "the disk gives for such reads"
        )


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

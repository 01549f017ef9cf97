"""The report on the CPU engine: one command turns raw rounds into text, tables and pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.engine_cases import (
    DEPTHS,
    EMBEDDED,
    ENGINE,
    KV_TYPES,
    LLAMA_DEPTHS,
    MTP_TYPES,
    TYPES,
    depth_case,
)
from bench.engine_figures import Figures, Row, rows_of
from bench.engine_run import ROUNDS_FILE, all_rounds
from bench.interleave import Ratio, Round, quiet_rounds
from bench.markdown import markdown
from hwmodel.errors import RunFileError

_CAPTIONS = {
    "by-type": "Decode and prefill by type, and the share of the read bandwidth that decoding "
    "uses; bars are medians, whiskers their interval over rounds.",
    "depth": "Decoding against context depth; refimpl's depths are filled with random keys and "
    "values, llama.cpp's by a prefill.",
    "threads": "Decoding against threads.",
    "drafts": "The draft-and-verify loop over the same loop without drafts; the generations "
    "of all depths take turns in one process.",
    "micro-batch": "Prefill against the number of rows that run through the model at once.",
}
_VARIANT_CASES = ("variants-decode", "variants-prefill")
_VARIANTS = (
    "All of them on the Q4_K_S slice; the comparisons above take the better one of default and "
    "no-repack for each type and test."
)
_ROUGH_UNITS = {"x": ("{:.2f}", 1.0), "%": ("{:.0f} %", 100.0), "MB": ("{:.0f} MB", 1.0)}


def write_report(data: Path, out: Path) -> tuple[list[dict[str, str]], list[Path]]:
    """Write the report `out` and its pictures into `data`; returns the target table and the
    files written.

    Raises:
        RunFileError: there are no rounds, or they cannot be read.
        OSError: a file cannot be written.
    """
    from bench import start_up
    from bench.engine_plots import figures_of
    from bench.residency import read_samples
    from bench.residency_report import FILE, section
    from hwmodel.files import write_whole
    from hwmodel.plots import save

    rounds = all_rounds(data)
    if not rounds:
        raise RunFileError(
            f"{data / ROUNDS_FILE}: no rounds; measure some first: bench engine measure"
        )
    figures = Figures(rounds)
    written: list[Path] = []
    for name, figure in figures_of(figures, source(rounds)).items():
        written += save(figure, data, name)
    samples = data / "samples.csv"
    write_whole(samples, samples_csv(figures).encode())
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = [p for p in written if p.suffix == ".png"]
    text = report_text(figures, os.path.relpath(data, out.parent), [p.stem for p in pictures])
    beside = start_up.section(start_up.read_record(data / start_up.FILE))
    for paragraph in beside + section(read_samples(data / FILE)):
        text += f"\n{paragraph}\n"
    write_whole(out, text.encode())
    return [row_json(row) for row in rows_of(figures)], [*written, samples, out]


def source(rounds: Sequence[Round]) -> str:
    """Where and when the rounds were measured, on one line."""
    newest = max(rounds, key=lambda r: r.started)
    builds = {m.build for m in newest.arms.values() if m.engine == "refimpl"}
    day = time.strftime("%Y-%m-%d", time.gmtime(newest.started))
    shown = f", refimpl {sorted(builds)[0].split()[0]}" if builds else ""
    return f"{newest.host}{shown}, {day}"


def row_json(row: Row) -> dict[str, str]:
    """A row of the target table as text."""
    return {
        "what": row.what,
        "measured": show(row.figure, row.unit),
        "at least": _demand(row, row.at_least),
        "aim": _demand(row, row.aim),
        "verdict": row.verdict,
        "from": row.basis,
    }


def show(value: Ratio | None, unit: str) -> str:
    """A figure with its interval."""
    if value is None:
        return "-"
    form, factor = _ROUGH_UNITS[unit]
    text = form.format(value.value * factor)
    if unit == "MB" or value.rounds < 2:
        return text
    low, high = (form.format(v * factor).removesuffix(" %") for v in (value.low, value.high))
    return f"{text} ({low} to {high})"


def _demand(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    form, factor = _ROUGH_UNITS[row.unit]
    return ("at most " if row.lower_is_better else "") + form.format(value * factor)


def report_text(f: Figures, folder: str, pictures: Iterable[str]) -> str:
    """The whole report as Markdown; `folder` leads from it to the pictures."""
    rows = [row_json(r) for r in rows_of(f)]
    parts = [
        "# The CPU engine, measured",
        _introduction(f),
        "## Demands and what was reached",
        _reading(f),
        markdown(rows[0].keys(), [tuple(r.values()) for r in rows]),
        _amx(f),
        "## Speeds",
        markdown(*_speeds(f)),
    ]
    for name in pictures:
        parts += [f"![{_CAPTIONS[name]}]({folder}/{name}.png)", f"*{_CAPTIONS[name]}*"]
    parts += (
        ["## Depth", markdown(*_depths(f))]
        if any(f.newest(depth_case(kv)) for kv in KV_TYPES)
        else []
    )
    if any(f.newest(name) for name in _VARIANT_CASES):
        parts += ["## Variants of llama.cpp", _VARIANTS, markdown(*_variants(f))]
    parts += ["## Verification of drafts", markdown(*_verification(f)), _mtp_share(f)]
    parts += ["## Rounds", _method(folder), markdown(*_rounds(f))]
    return "\n\n".join(parts) + "\n"


def _introduction(f: Figures) -> str:
    state = f.rounds[-1].state
    memory = state.get("memory_total_bytes", 0) / 1e9
    best = ", ".join(f"{v / 1e9:.1f} GB/s ({k})" for k, v in f.best.items())
    return (
        f"Machine: {f.rounds[-1].host}, {memory:.0f} GB of memory. Best read bandwidth probed: "
        f"{best}. Models: five layers of the published shape at its true widths (one dense, four "
        "MoE with 64 experts each of which 8 are selected; vocabulary 16,384), random weights, "
        "one type each, and the embedded model. Bytes of a step are those that the engine counted "
        "while it was timed: every tensor once, and each selected expert once."
    )


def _reading(f: Figures) -> str:
    return (
        "Figures are medians over rounds, their interval in brackets. Ratios are between engines "
        "in the same round; llama.cpp is its fastest variant for that type and test. *Short* "
        "means that the demand is not met."
    )


def _amx(f: Figures) -> str:
    if any(r.state.get("amx") for r in f.rounds):
        return (
            "This processor has AMX. The prefill rows hold for it; llama.cpp was measured with "
            "AMX, and without where such a build was given."
        )
    return (
        "This processor has no AMX, so the demand on prefill with AMX (1.5x) cannot be judged "
        "here, and llama.cpp built without AMX is the same as its default build."
    )


def _speeds(f: Figures) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Tokens/s of every arm of the cases against llama.cpp."""
    names = [f"{what}-{kind}" for what in ("decode", "prefill") for kind in TYPES]
    names += ["decode-mini"]
    rows: list[tuple[str, ...]] = []
    for name in names:
        best = f.best_llama(name)
        for label in dict.fromkeys(k for r in f.newest(name) for k in r.arms):
            value = f.speed(name, label)
            share = f.share(name, label) if name.startswith("decode") else None
            note = "best of llama.cpp" if label == best else ""
            rows.append((name, label, _plain(value, 1), show(share, "%"), note))
    return ("case", "engine", "tokens/s", "share of read bandwidth", ""), rows


def _plain(value: Ratio | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value.value:,.{digits}f}"
    if value.rounds < 2:
        return text
    return f"{text} ({value.low:,.{digits}f} to {value.high:,.{digits}f})"


def _depths(f: Figures) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for depth in sorted({*DEPTHS, *LLAMA_DEPTHS}):
        cells = [f"{depth:,}"]
        for kv in KV_TYPES:
            case, label = depth_case(kv), f"{ENGINE} d{depth}"
            speed = f.speed(case, label)
            resident = f.per_round(case, label, lambda _, m: _cache_megabytes(m.record))
            cells += [_plain(speed, 1), _plain(resident, 0)]
        over = f.ratio("depth-llama", f"{ENGINE} d{depth}", f"llama.cpp default d{depth}")
        rows.append((*cells, show(over, "x")))
    header = ("depth, tokens", "f16 KV: tokens/s", "cache, MB", "q8_0 KV: tokens/s", "cache, MB",
              "over llama.cpp, f16")  # fmt: skip
    return header, rows


def _cache_megabytes(record: dict[str, Any]) -> float | None:
    resident = record.get("resident")
    return resident["cache_bytes"] / 1e6 if resident else None


def _variants(f: Figures) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    names = dict.fromkeys(k for name in _VARIANT_CASES for r in f.newest(name) for k in r.arms)
    rows: list[tuple[str, ...]] = []
    for label in names:
        speeds = [f.speed(n, label) for n in _VARIANT_CASES]
        rows.append((label, *(_plain(s, 1) for s in speeds)))
    return ("variant", "decode, tokens/s", "prefill of 512, tokens/s"), rows


def _verification(f: Figures) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for kind in (*TYPES, EMBEDDED):
        name = f"verify-{kind}"
        for count in range(1, 5):
            label = f"{count} rows"
            ms = f.per_round(name, label, lambda _, m, n=count: 1e3 * n / m.median_ts)  # type: ignore[misc]
            if ms is None:
                continue
            size = f.step_bytes(name, label) or 0.0
            scaled, _ = f.verification(kind, count)
            rows.append((kind, str(count), _plain(ms, 2), f"{size / 1e6:,.1f}",
                         show(f.share(name, label), "%"), show(scaled, "x")))  # fmt: skip
    header = ("model", "tokens in a step", "time of the step, ms", "bytes, MB",
              "share of read bandwidth", "time over that of one token scaled by bytes")  # fmt: skip
    return header, rows


def _mtp_share(f: Figures) -> str:
    """What one draft reads beside a plain step: measured models, and the published one."""
    from hwmodel.catalogue import find_model
    from hwmodel.operations import draft_bytes, step_counts
    from hwmodel.quant import load_quant

    shares = []
    for name in (*(f"{kind}-mtp3" for kind in MTP_TYPES), EMBEDDED):
        found = f.mtp_share(name)
        if found is not None:
            shares.append(f"{found[0] / 1e6:,.1f} MB or {100 * found[1]:.0f} % on {name}")
    model, quant = find_model("step-3.5-flash"), load_quant("q4_k_s")
    layer = draft_bytes(model, quant, 1)
    whole = sum(step_counts(model, quant, depth=0, rows=1).weight_bytes.values())
    shares.append(
        f"{layer / 1e6:,.0f} MB or {100 * layer / whole:.1f} % in the published model at "
        f"{quant.name}, counted from its tensors"
    )
    return (
        "To make one draft, an MTP layer and its head are read. That is, beside the bytes of a "
        f"step without drafts: {'; '.join(shares)}."
    )


def _method(folder: str) -> str:
    return (
        "A round runs every engine of a case once, each in a process of its own and after a "
        "warm-up, with a probe of the read bandwidth before and after each. A round, an engine in "
        "it, or two that are compared are quiet if the probes beside them agree within 10 % and "
        "all reach 90 % of the best one seen, and other programs used no more than a fifth of a "
        "core before the round (older rounds do not say); steady if the probes agree. Figures are "
        "of quiet rounds; "
        "where there is none, of steady ones; ratios between engines, where there is none of "
        "these either, of unsteady ones. Other users of the same memory, outside of this machine "
        "where it is a virtual one, make it slow for a while, and so, probably, does its host by "
        "putting two virtual processors where they share a path to memory: with `--patience` every "
        "engine waits until the probe reaches 90 % of the best; the processors are put to sleep "
        "for a second after a bad probe and else kept awake by loops of the lowest priority. "
        "Rounds of older kernels are kept but not counted. "
        f"Every sample: [{ROUNDS_FILE}]({folder}/{ROUNDS_FILE}), as a "
        f"table [samples.csv]({folder}/samples.csv). Made by `bench engine measure` and "
        "`bench engine report`."
    )


def _rounds(f: Figures) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for name in f.cases():
        newest = f.newest(name)
        quiet = len(quiet_rounds(newest, f.best))
        steady = sum(r.is_steady() for r in newest) - quiet
        builds = dict.fromkeys(
            f"{m.engine} {m.build}".strip() for r in newest for m in r.arms.values()
        )
        failed = dict.fromkeys(f"{k}: {v}" for r in newest for k, v in r.failed.items())
        probes = sorted(p / 1e9 for r in newest for p in r.probes())
        rows.append((
            name, str(quiet), str(steady), str(len(newest) - quiet - steady),
            f"{probes[0]:.1f} to {probes[-1]:.1f}",
            "; ".join([*builds, *failed]),
        ))  # fmt: skip
    return ("case", "quiet", "steady", "unsteady", "probe, GB/s", "builds"), rows


def samples_csv(f: Figures) -> str:
    """Every sample of every round as CSV, one a line."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ("case", "started", "verdict", "kernels", "probe_before_bytes_per_s",
         "probe_after_bytes_per_s", "arm", "engine", "build",
         "flags", "sample", "tokens_per_s", "seconds")
    )  # fmt: skip
    for r in f.rounds:
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(r.started))
        for label, m in r.arms.items():
            beside = r.probes(label)
            quiet = r.is_quiet(f.best[r.host], label)
            verdict = "quiet" if quiet else "steady" if r.is_steady(label) else "unsteady"
            pairs = zip(m.samples_ts, m.samples_ns, strict=True)
            for number, (speed, ns) in enumerate(pairs, 1):
                writer.writerow(
                    (r.case, began, verdict, r.kernels, f"{beside[0]:.0f}",
                     f"{beside[-1]:.0f}", label, m.engine,
                     m.build, m.flags, number, f"{speed:.4f}", f"{ns / 1e9:.6f}")
                )  # fmt: skip
    return out.getvalue()

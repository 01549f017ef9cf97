"""The tidy run record: one measured configuration a row, read from CSV and checked.

A row states a configuration (model, quant, device, engine, ...), what was measured in it, and where
that is published. Reading never stops at a bad row: its unusable cells become None, and one line
says what was found, in which row, and what was expected. Units: `weights_gb` decimal GB, speeds in
tokens/s, `ttft_ms` milliseconds, `*_params_b` billions of parameters, depths in tokens. A number
may carry the unit of its column, or one that converts (GiB, s, K tokens); any other is reported.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

from hwmodel import names
from hwmodel.errors import RunFileError

MAX_FILE_BYTES = 1 << 28
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
TEXT_COLUMNS = (
    "id", "model", "quant", "device", "interconnect", "engine", "engine_version", "backend",
    "offload", "mtp", "kv_type", "notes", "source_url", "source_date", "confidence",
    "decode_scope", "fit_ok", "sweep",
)  # fmt: skip
# column -> (unit, lowest, highest): beyond these no published figure lies, by orders of magnitude
NUMBER_COLUMNS: dict[str, tuple[str, float, float]] = {
    "total_params_b": ("B", 1e-3, 1e5),
    "active_params_b": ("B", 1e-3, 1e5),
    "weights_gb": ("GB", 1e-3, 1e5),
    "n_devices": ("", 1, 1e5),
    "batch_concurrency": ("", 1, 1e6),
    "prompt_tokens": ("tokens", 0, 1e8),
    "context_depth": ("tokens", 0, 1e8),
    "gen_tokens": ("tokens", 0, 1e8),
    "micro_batch": ("tokens", 1, 1e7),
    "prefill_tok_s": ("tok/s", 1e-3, 1e8),
    "decode_tok_s": ("tok/s", 1e-3, 1e8),
    "ttft_ms": ("ms", 1e-3, 1e9),
}
MEASURED_COLUMNS = ("decode_tok_s", "prefill_tok_s", "ttft_ms")
SCOPES = ("per_user", "aggregate")

# what a unit written after a number multiplies it with, by the column's own unit
_UNITS: dict[str, dict[str, float]] = {
    "B": {"b": 1.0, "bn": 1.0, "billion": 1.0, "m": 1e-3, "t": 1e3},
    "GB": {"gb": 1.0, "gib": 2**30 / 1e9, "mb": 1e-3, "mib": 2**20 / 1e9, "tb": 1e3},
    "tokens": {"tokens": 1.0, "tok": 1.0, "k": 1024.0, "ki": 1024.0},
    "tok/s": {"tok/s": 1.0, "t/s": 1.0, "tokens/s": 1.0, "tps": 1.0, "tokens/sec": 1.0},
    "ms": {"ms": 1.0, "s": 1e3, "sec": 1e3},
    "": {"x": 1.0},
}
_HEADER_ALIASES = {
    "concurrency": "batch_concurrency", "batch": "batch_concurrency", "batchsize":
    "batch_concurrency", "depth": "context_depth", "ctx": "context_depth", "contextlength":
    "context_depth", "gpus": "n_devices", "devices": "n_devices", "ndevice": "n_devices",
    "quantization": "quant", "quanttype": "quant", "hardware": "device", "gpu": "device",
    "version": "engine_version", "build": "engine_version", "drafts": "mtp", "kvcachetype":
    "kv_type", "kvtype": "kv_type", "kv": "kv_type", "ubatch": "micro_batch", "source":
    "source_url", "url": "source_url", "date": "source_date", "scope": "decode_scope",
    "paramsb": "total_params_b", "activeb": "active_params_b", "totalb": "total_params_b",
    "prompt": "prompt_tokens", "generated": "gen_tokens", "weightsgb": "weights_gb",
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One row; None or an empty text where the source does not say.

    `extra` keeps columns that this record does not know, `problems` what could not be used, each
    one sentence. `line` is the line of the file, from 1.
    """

    id: str
    model: str = ""
    total_params_b: float | None = None
    active_params_b: float | None = None
    quant: str = ""
    weights_gb: float | None = None
    device: str = ""
    n_devices: float | None = None
    interconnect: str = ""
    engine: str = ""
    engine_version: str = ""
    backend: str = ""
    offload: str = ""
    mtp: str = ""
    kv_type: str = ""
    batch_concurrency: float | None = None
    prompt_tokens: float | None = None
    context_depth: float | None = None
    gen_tokens: float | None = None
    micro_batch: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    ttft_ms: float | None = None
    notes: str = ""
    source_url: str = ""
    source_date: str = ""
    confidence: str = ""
    decode_scope: str = "per_user"
    fit_ok: str = ""
    sweep: str = ""
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)
    problems: tuple[str, ...] = ()
    line: int = 0

    @property
    def drafts(self) -> int | None:
        """Draft tokens per step (`2`, `MTP-2`, `EAGLE 3`, `n=1`): 0 for none, None where only
        "some" is known (`yes`, `1+`, `>=3`)."""
        text = self.mtp.strip().lower()
        if text in ("", "-", "none", "0", "off", "no", "false") or _NO_DRAFTS.match(text):
            return 0
        stated = _DRAFTS.search(_ACCEPTED.sub(" ", text))
        return int(stated[1]) if stated else None

    @property
    def date(self) -> str:
        """ISO date of the source, or as much of it as is known (`2026-02`), or empty."""
        found = re.search(r"\b20\d\d(?:-\d\d(?:-\d\d)?)?", self.source_date)
        return found[0] if found else ""

    @cached_property
    def backend_id(self) -> str:
        """Canonical backend: its own column, else what engine and version spell, else empty."""
        for text in (self.backend, self.engine_version):
            found = names.canonical("backend", text) if text.strip() else None
            if found is not None:
                return found.id
        engine = names.canonical("engine", self.engine)
        return engine.backend if engine is not None else ""

    @property
    def may_fit(self) -> bool:
        """True where the row may enter a fit or an error statistic for some quantity."""
        return any(self.may_fit_quantity(q) for q in ("decode_tok_s", "prefill_tok_s"))

    def may_fit_quantity(self, quantity: str) -> bool:
        """True where the row may enter a fit of `decode_tok_s` or `prefill_tok_s`."""
        only = {"decode_tok_s": "decode_only", "prefill_tok_s": "prefill_only"}
        return self.fit_ok.lower() in ("yes", only.get(quantity, "yes"))

    def row(self) -> dict[str, str]:
        """The record as cells of the tidy CSV (empty for None), unknown columns last."""
        cells: dict[str, str] = {}
        for f in fields(self):
            if f.name in ("extra", "problems", "line"):
                continue
            value = getattr(self, f.name)
            cells[f.name] = "" if value is None else _cell(value)
        return {**cells, **self.extra}


def _cell(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def read_runs(path: Path | str) -> tuple[list[RunRecord], list[str]]:
    """All rows of a CSV file (`-` for standard input) and one line for each thing wrong.

    A row without a usable measured figure, without a device or without a model stays in the list
    with its problems, so that a comparison can decline it by name.

    Raises:
        RunFileError: no such file, not text, too large, empty, or without the columns `model`,
            `device` and one of the measured ones.
    """
    return parse_runs(read_text(path), "standard input" if str(path) == "-" else str(path))


def parse_runs(text: str, source: str = "input") -> tuple[list[RunRecord], list[str]]:
    """`read_runs` for a text that is already in memory; `source` is named in messages.

    Raises:
        RunFileError: see `read_runs`.
    """
    rows = _table(text, source)
    header = _columns(rows[0][1], source)
    records: list[RunRecord] = []
    seen: set[str] = set()
    for line, cells in rows[1:]:
        if not any(c.strip() for c in cells):
            continue
        record = _record(header, cells, line, seen)
        seen.add(record.id)
        records.append(record)
    problems = [f"line {r.line} ({r.id}): {p}" for r in records for p in r.problems]
    return records, problems


def write_runs(records: Iterable[RunRecord]) -> str:
    """The records as tidy CSV text, with every unknown column that any of them carries."""
    rows = [r.row() for r in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or [*TEXT_COLUMNS], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def published_runs_path() -> Path:
    """The shipped file of published runs."""
    return Path(__file__).parent / "data" / "published_runs.csv"


def read_text(path: Path | str) -> str:
    """A text file, or standard input for `-`; UTF-8, or UTF-16 with its mark (as PowerShell
    redirects output).

    Raises:
        RunFileError: no such file, no text, or too large.
    """
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_FILE_BYTES:
        raise RunFileError(
            f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, expected a CSV of runs"
        )
    try:
        return raw.decode("utf-16" if raw[:2] in _UTF16_MARKS else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path}: not UTF-8 text, expected runs as CSV or JSON") from error


def _table(text: str, source: str) -> list[tuple[int, list[str]]]:
    if "\0" in text:
        raise RunFileError(f"{source}: contains zero bytes, expected a CSV of runs")
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if rows or any(c.strip() for c in cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise RunFileError(f"{source}: line {reader.line_num}: not CSV ({error})") from error
    if not rows:
        raise RunFileError(f"{source}: is empty, expected a header and one run a line")
    return rows


def _columns(header: list[str], source: str) -> list[str]:
    known = {names.key(c): c for c in (*TEXT_COLUMNS, *NUMBER_COLUMNS)}
    columns: list[str] = []
    for position, cell in enumerate(header):
        text = cell.strip()
        short = names.key(text)
        name = known.get(short) or _HEADER_ALIASES.get(short, "")
        quantity = names.canonical("quantity", text)
        if not name and quantity is not None and quantity.id in NUMBER_COLUMNS:
            name = quantity.id
        name = name or text or f"column {position + 1}"
        if name in columns:
            raise RunFileError(f"{source}: the column '{name}' occurs twice (as {text!r})")
        columns.append(name)
    for needed in ("model", "device"):
        if needed not in columns:
            found = ", ".join(columns[:8])
            raise RunFileError(f"{source}: no column '{needed}' (found: {found})")
    if not any(c in columns for c in MEASURED_COLUMNS):
        raise RunFileError(f"{source}: no measured column, expected {', '.join(MEASURED_COLUMNS)}")
    return columns


def _record(header: list[str], cells: list[str], line: int, seen: set[str]) -> RunRecord:
    problems: list[str] = []
    values: dict[str, object] = {}
    extra: dict[str, str] = {}
    if len(cells) > len(header):
        problems.append(f"{len(cells)} cells, expected {len(header)}; a comma outside quotes?")
    for name, cell in zip(header, cells, strict=False):
        text = cell.strip()
        if name in NUMBER_COLUMNS:
            value, problem = parse_number(text, name)
            values[name] = value
            if problem:
                problems.append(problem)
        elif name in TEXT_COLUMNS:
            values[name] = text
        else:
            extra[name] = text
    identity = str(values.pop("id", "")) or f"line {line}"
    if identity in seen:
        problems.append(f"the id '{identity}' occurs twice")
        identity = f"{identity} (line {line})"
    scope = str(values.pop("decode_scope", "")).lower() or "per_user"
    scope = "per_user" if names.key(scope) == "peruser" else scope
    if scope not in SCOPES:
        problems.append(f"decode_scope is {scope!r}, expected {' or '.join(SCOPES)}")
        scope = "per_user"
    if "fit_ok" not in header:  # a file that marks no rows has none to leave out
        values["fit_ok"] = "yes"
    problems += _missing(values)
    if values.get("n_devices") is None:
        values["n_devices"] = names.device_count(str(values.get("device", "")))
    return RunRecord(
        id=identity, decode_scope=scope, extra=extra, problems=tuple(problems), line=line,
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def _missing(values: Mapping[str, object]) -> list[str]:
    found = [f"no {name}" for name in ("model", "device") if not values.get(name)]
    if all(values.get(name) is None for name in MEASURED_COLUMNS):
        found.append(
            "nothing measured: " + ", ".join(MEASURED_COLUMNS) + " are all unusable or empty"
        )
    if not values.get("quant") and values.get("weights_gb") is None:
        found.append("neither quant nor weights_gb: the size of the weights is not known")
    return found


# a small number that is neither a bound (>=1, 1+) nor part of a version or of a length
_DRAFTS = re.compile(r"(?<![\d.<>])(?<![<>]=)(?<!>= )(\d{1,2})(?![\d.+]| or more)")
_NO_DRAFTS = re.compile(r"(no|without|not)\b|n/a")
_ACCEPTED = re.compile(
    r"(accept\w*|al)( len\w*| rate)?[ =:]*\d[\d.]*\s*%?|\d[\d.]*\s*%|eagle-?[23]"
)
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*)?")


def parse_number(text: str, column: str) -> tuple[float | None, str]:
    """A cell of a number column in the column's unit, and what is wrong with it (or empty)."""
    unit, low, high = NUMBER_COLUMNS[column]
    if not text or text.lower() in ("-", "n/a", "na", "none", "null", "unknown", "?"):
        return None, ""
    expected = f"a number of {unit}" if unit else "a number"
    bare = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    match = _NUMBER.fullmatch(bare)
    if match is None:
        return None, f"{column} is {text!r}, expected {expected}"
    value = float(match[1])
    if match[2]:
        factor = _UNITS[unit].get(match[2].strip().lower())
        if factor is None:
            return None, f"{column} is {text!r}: the unit is not understood, expected {expected}"
        value *= factor
    if not math.isfinite(value) or not low <= value <= high:
        return None, f"{column} is {text!r}, expected {expected} from {low:g} to {high:g}"
    return value, ""

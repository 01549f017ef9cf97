"""A file of any known format to run records, recognised by its content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from bench.compare import speed_text
from bench.importers import llama_batched_bench, llama_bench, serving
from bench.importers.table import Format, Stated, json_rows
from bench.resolve import resolve
from bench.runs import MEASURED_COLUMNS, RunRecord, parse_runs, read_text
from hwmodel.errors import RunFileError
from hwmodel.predict import physical_limit
from refimpl.errors import RefimplError


def _is_tidy(text: str) -> bool:
    header = text.lstrip("\ufeff \n").partition("\n")[0].lower()
    return "model" in header and "device" in header and any(c in header for c in MEASURED_COLUMNS)


def _read_tidy(text: str, source: str) -> list[RunRecord]:
    return parse_runs(text, source)[0]


FORMATS: tuple[Format, ...] = (
    *llama_bench.FORMATS,
    *llama_batched_bench.FORMATS,
    *serving.FORMATS,
    Format("the tidy CSV of `bench run`", _is_tidy, _read_tidy),
)


@dataclass(frozen=True)
class Imported:
    """Records of one file, the format that was recognised, and what is wrong or missing."""

    format: str
    records: tuple[RunRecord, ...]
    problems: tuple[str, ...]


def import_runs(path: str, stated: Stated) -> Imported:
    """Read a file (`-` for standard input) and complete it with what the user states.

    Raises:
        RunFileError: it cannot be read, is of no known format, or a field is missing or absurd.
    """
    source = "standard input" if path == "-" else path
    text = read_text(path)
    kind = next((f for f in FORMATS if f.matches(text)), None)
    if kind is None:
        known = "; ".join(f.title for f in FORMATS)
        raise RunFileError(f"{source}: {_seen(text)}, expected one of: {known}")
    records = tuple(stated.apply(r) for r in kind.read(text, source))
    if not any(getattr(r, c) is not None for r in records for c in MEASURED_COLUMNS):
        why = "".join(f" ({p})" for p in _gathered(records)[:1])
        raise RunFileError(f"{source}: {kind.title}, but without a run that can be used{why}")
    return Imported(kind.title, records, tuple(_gathered(records)))


def _gathered(records: Sequence[RunRecord]) -> list[str]:
    """What is wrong, each thing once, with the runs that it concerns."""
    runs: dict[str, list[str]] = {}
    for r in records:
        for problem in _problems(r):
            runs.setdefault(problem, []).append(r.id)
    return [
        f"{ids[0] if len(ids) == 1 else f'{len(ids)} runs'}: {problem}"
        for problem, ids in runs.items()
    ]


def _seen(text: str) -> str:
    """What an unknown file looks like."""
    rows = json_rows(text)
    if rows is not None:
        fields = ", ".join(list(rows[0])[:6])
        return f"JSON with the fields {fields}" if fields else "JSON without fields"
    first = text.strip().partition("\n")[0][:60]
    return _broken(text) or (f"begins with {first!r}" if first else "is empty")


def _broken(text: str) -> str:
    """Where JSON or JSON lines stop being such, empty for other texts."""
    if not text.lstrip().startswith(("{", "[")):
        return ""
    lines = text.splitlines()
    begins = 0 if _error(lines[0]) is None else None  # whole objects line by line
    for i, line in enumerate(lines[1:] if begins == 0 else (), start=2):
        if line.strip() and (error := _error(line)) is not None:
            return f"line {i} is no JSON ({error.msg})"
    error = _error(text)
    if error is None:
        return ""
    return f"is JSON that breaks at line {error.lineno}, column {error.colno} ({error.msg})"


def _error(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    except (ValueError, RecursionError):
        pass
    return None


_MISSING = {
    "model": "--model NAME", "device": "--device NAME", "engine": "--engine NAME",
    "quant": "--quant TYPE",
}  # fmt: skip


def _problems(record: RunRecord) -> list[str]:
    found = [
        f"the file does not say the {column}; {option} adds it"
        for column, option in _MISSING.items()
        if not getattr(record, column) and not (column == "quant" and record.weights_gb)
    ]
    found += record.problems
    return found or _declined(record) + _impossible(record)


def _declined(record: RunRecord) -> list[str]:
    """Why no prediction can be made for a run, or what it would guess, which its comparison would
    say only later."""
    try:
        guessed = resolve(record).unknown
    except RefimplError as error:
        return [f"kept, but a comparison will decline it: {error}"]
    return [f"a comparison will guess: {'; '.join(guessed)}"] if guessed else []


def _impossible(record: RunRecord) -> list[str]:
    """Figures beyond what the device's memory and arithmetic allow, with the limit."""
    found = []
    for quantity in ("decode_tok_s", "prefill_tok_s"):
        measured = getattr(record, quantity)
        if measured is None:
            continue
        try:
            limit = physical_limit(resolve(record, quantity), quantity)
        except RefimplError:
            continue
        users = record.batch_concurrency or 1.0
        if quantity == "decode_tok_s" and record.decode_scope == "aggregate":
            limit *= users
        if measured > limit:
            found.append(
                f"{quantity} is {speed_text(measured)}, more than the {speed_text(limit)} that "
                f"the bandwidth and arithmetic of {record.device} allow; kept, flagged when "
                "compared"
            )
    return found


def added(old: Sequence[RunRecord], new: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of `new` that are not among `old` under whatever id: the same file imported again."""
    known = [_unnamed(r) for r in old]
    return [r for r in new if _unnamed(r) not in known]


def _unnamed(record: RunRecord) -> dict[str, str]:
    cells = {k: v for k, v in record.row().items() if k != "id" and v != ""}
    return {k.casefold(): v for k, v in cells.items()}


def renumbered(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records with ids that occur once, the later ones numbered."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    found = []
    for r in records:
        seen[r.id] = seen.get(r.id, 0) + 1
        found.append(r if seen[r.id] == 1 else replace(r, id=f"{r.id} ({seen[r.id]})"))
    return found

"""The run record: what a CSV says is kept, what it cannot say is reported line by line."""

import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.runs import (
    MEASURED_COLUMNS,
    RunRecord,
    parse_number,
    parse_runs,
    published_runs_path,
    read_runs,
    write_runs,
)
from hwmodel.errors import RunFileError

HEADER = "id,model,quant,device,engine,decode_tok_s,prefill_tok_s,weights_gb,context_depth"
GOOD = "A1,Step-3.5-Flash,Q4_K_S,m4max,llama.cpp,48.2,400,111.5,2048"


def one(line: str, header: str = HEADER):  # type: ignore[no-untyped-def]
    records, problems = parse_runs(f"{header}\n{line}\n")
    assert len(records) == 1
    return records[0], problems


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ("none", 0), ("no MTP", 0), ("-", 0), ("3", 3), ("MTP-2", 2), ("EAGLE, n=3", 3),
        ("3 (EAGLE, accept len 3.12)", 3), ("1 draft, 87%", 1), ("draft 2, acceptance 0.8", 2),
        ("yes", None), ("1+", None), (">=3 (EAGLE)", None), ("unknown>=1", None),
    ],
)  # fmt: skip
def test_drafts_are_read_from_what_people_write(text: str, drafts: int | None) -> None:
    assert RunRecord("x", mtp=text).drafts == drafts


def test_a_file_without_fit_ok_is_judged_whole_and_one_with_it_row_by_row() -> None:
    assert one(GOOD)[0].may_fit
    assert one(f"{GOOD},Yes", f"{HEADER},fit_ok")[0].may_fit
    assert not one(f"{GOOD},", f"{HEADER},fit_ok")[0].may_fit
    assert not one(f"{GOOD},no (warm-up)", f"{HEADER},fit_ok")[0].may_fit


def test_the_published_runs_read_without_a_problem() -> None:
    records, problems = read_runs(published_runs_path())
    assert problems == []
    assert len(records) == 421
    assert sum(r.may_fit_quantity("decode_tok_s") for r in records) == 326 + 5
    assert sum(r.may_fit_quantity("prefill_tok_s") for r in records) == 326 + 8
    assert len({r.id for r in records}) == 421
    assert all(r.source_url and r.sweep for r in records)


def test_what_a_record_derives() -> None:
    records, _ = read_runs(published_runs_path())
    by_id = {r.id: r for r in records}
    assert by_id["S068"].backend_id == "metal"
    assert by_id["S068"].drafts == 0
    assert by_id["S068"].date == "2026-02"
    assert by_id["S025"].backend_id == "cuda"
    assert by_id["S025"].date == "2026-08-02"
    assert not by_id["S026"].may_fit_quantity("prefill_tok_s")
    assert by_id["S026"].may_fit_quantity("decode_tok_s")


def test_writing_and_reading_again_changes_nothing() -> None:
    records, _ = read_runs(published_runs_path())
    again, problems = parse_runs(write_runs(records))
    assert problems == []
    assert [r.row() for r in again] == [r.row() for r in records]


def test_unknown_columns_are_kept() -> None:
    record, problems = one(GOOD + ",warm,3 W", HEADER + ",room,power")
    assert problems == []
    assert record.extra == {"room": "warm", "power": "3 W"}
    assert "room" in write_runs([record])


@pytest.mark.parametrize(
    ("device", "stated", "count"),
    [
        ("4x RTX 3090", "", 4),
        ("H200 x8", "", 8),
        ("8xH100", "", 8),
        ("4x RTX 3090", "2", 2),
        ("rtx3090", "", None),
        ("2x EPYC 9654", "", None),
        ("4x MI50-32GB + 2x MI50-16GB", "6", 6),
    ],
)
def test_the_number_of_devices_may_stand_in_their_name(
    device: str, stated: str, count: float | None
) -> None:
    line = f"A1,Step-3.5-Flash,Q4_K_S,{device},llama.cpp,48.2,,,,{stated}"
    record, problems = one(line, HEADER + ",n_devices")
    assert problems == []
    assert record.n_devices == count


def test_headers_people_use_are_understood() -> None:
    text = "Model\tGPU\tGPUs\ttg\tpp\tDepth\tquantization\nStep\th100\t2\t30\t900\t4K\tQ4_K_S\n"
    records, problems = parse_runs(text)
    assert problems == []
    r = records[0]
    assert (r.device, r.n_devices, r.decode_tok_s, r.prefill_tok_s) == ("h100", 2, 30, 900)
    assert r.context_depth == 4096


@pytest.mark.parametrize(
    ("text", "column", "value"),
    [
        ("48.2", "decode_tok_s", 48.2),
        ("48.2 tok/s", "decode_tok_s", 48.2),
        ("1,234.5", "prefill_tok_s", 1234.5),
        ("103.84 GiB", "weights_gb", 103.84 * 2**30 / 1e9),
        ("111.5GB", "weights_gb", 111.5),
        ("128K", "context_depth", 131072),
        ("1.5 s", "ttft_ms", 1500),
        ("4e2", "prefill_tok_s", 400),
        ("8x", "n_devices", 8),
        ("", "decode_tok_s", None),
        ("n/a", "decode_tok_s", None),
    ],
)
def test_numbers_and_their_units(text: str, column: str, value: float | None) -> None:
    found, problem = parse_number(text, column)
    assert problem == ""
    assert found == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("fast", "decode_tok_s", "decode_tok_s is 'fast', expected a number of tok/s"),
        ("48,2", "decode_tok_s", "expected a number of tok/s"),
        ("20 ms", "decode_tok_s", "the unit is not understood"),
        ("~48", "decode_tok_s", "expected a number"),
        ("-3", "decode_tok_s", "from 0.001 to 1e+08"),
        ("0", "decode_tok_s", "from 0.001 to 1e+08"),
        ("nan", "decode_tok_s", "expected a number"),
        ("1e999", "decode_tok_s", "from 0.001"),
        ("0", "n_devices", "from 1 to"),
        ("5 lb", "weights_gb", "the unit is not understood"),
    ],
)
def test_numbers_that_cannot_be_used(text: str, column: str, message: str) -> None:
    value, problem = parse_number(text, column)
    assert value is None
    assert message in problem


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD.replace("48.2", "quick"), "line 2 (A1): decode_tok_s is 'quick'"),
        (GOOD.replace("48.2,400", ","), "line 2 (A1): nothing measured"),
        (GOOD.replace("m4max", ""), "line 2 (A1): no device"),
        (GOOD.replace("Step-3.5-Flash", ""), "line 2 (A1): no model"),
        (GOOD.replace("Q4_K_S", "").replace("111.5", ""), "neither quant nor weights_gb"),
        (GOOD + ",7,8", "11 cells, expected 9"),
    ],
)
def test_a_bad_row_is_kept_and_reported_in_one_line(line: str, message: str) -> None:
    record, problems = one(line)
    assert record.problems
    assert len(problems) == 1
    assert message in problems[0]
    assert "\n" not in problems[0]


def test_ids_are_made_unique_and_scopes_checked() -> None:
    text = f"{HEADER},decode_scope\n{GOOD},aggregate\n{GOOD},both\n"
    records, problems = parse_runs(text)
    assert [r.id for r in records] == ["A1", "A1 (line 3)"]
    assert records[0].decode_scope == "aggregate"
    assert any("occurs twice" in p for p in problems)
    assert any("decode_scope is 'both', expected per_user or aggregate" in p for p in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1,2\n", "no column 'model'"),
        ("model,device\nx,y\n", "no measured column"),
        ("model,device,decode_tok_s,tg\nx,y,1,2\n", "occurs twice"),
        ("model,device,tg\n\0,y,1\n", "zero bytes"),
        ("model,device,tg\n" + "x" * 200_000 + ",y,1\n", "not CSV"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_refused(text: str, message: str) -> None:
    with pytest.raises(RunFileError, match=message):
        parse_runs(text)


def test_files_that_cannot_be_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RunFileError, match="cannot be read"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFileError, match="not UTF-8"):
        read_runs(tmp_path / "b.csv")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(f"\ufeff{HEADER}\n{GOOD}\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    records, problems = read_runs("-")
    assert problems == []
    assert records[0].id == "A1"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["decode_tok_s", "weights_gb", "context_depth"]))
def test_any_text_is_a_number_or_a_problem(text: str, column: str) -> None:
    value, problem = parse_number(text.strip(), column)
    assert value is None or problem == ""
    assert value is None or value >= 0


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        records, problems = parse_runs("model,device,decode_tok_s\n" + text)
    except RunFileError:
        return
    assert all(isinstance(p, str) for p in problems)
    assert all(r.decode_tok_s is None or r.decode_tok_s > 0 for r in records)
    assert set(MEASURED_COLUMNS) <= {f for f in vars(records[0])} if records else True


@pytest.mark.parametrize("text", ["per-user", "Per user", "per_user", ""])
def test_spellings_of_the_scope_of_a_user(text: str) -> None:
    record, problems = one(f"{GOOD},{text}", f"{HEADER},decode_scope")
    assert (record.decode_scope, problems) == ("per_user", [])

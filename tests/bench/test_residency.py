"""`bench engine residency`: refusals, samples in a file, and the report's section."""

import dataclasses
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.residency import (
    LLAMA_ARM,
    Sample,
    control_group,
    measure,
    read_samples,
    write_samples,
)
from bench.residency_report import section
from bench.runners.base import RunnerError
from hwmodel.errors import RequestError

SAMPLE = Sample(
    arm="experts on demand", round=0, started=1.7e9, model="slice.gguf", file_bytes=7_000_000_000,
    limit_bytes=5_000_000_000, cold_s=(0.2, 0.2), warm_s=(0.04, 0.06), hit_rate=0.6,
    disk_bytes_per_token=100e6, disk_bytes_per_s=2e9, busy_disk_bytes_per_s=3.6e9,
    probe=(4e9, 4e9), peak_bytes=4_900_000_000, about="engine",
)  # fmt: skip


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["engine", "residency", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_samples_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "residency.json"
    assert read_samples(path) == []
    other = dataclasses.replace(SAMPLE, arm=LLAMA_ARM, hit_rate=None)
    write_samples(path, [SAMPLE, other])
    assert read_samples(path) == [SAMPLE, other]
    path.write_text('{"format": 9, "samples": []}')
    with pytest.raises(RequestError, match="not a file of residency samples"):
        read_samples(path)


def test_the_section_has_ratios_within_rounds(tmp_path: Path) -> None:
    """20 tokens/s against 4 and 5, against 5 and 5 of llama.cpp: ratios 5 and 4, and 4 and 4."""
    samples = []
    for number, slow in enumerate((0.25, 0.2)):
        samples.append(dataclasses.replace(SAMPLE, round=number))
        samples.append(
            dataclasses.replace(SAMPLE, arm="page faults", round=number, warm_s=(slow, slow))
        )
        samples.append(
            dataclasses.replace(
                SAMPLE,
                arm=LLAMA_ARM,
                round=number,
                warm_s=(0.2, 0.2),
                hit_rate=None,
                disk_bytes_per_token=None,
                disk_bytes_per_s=None,
                busy_disk_bytes_per_s=None,
            )
        )
    assert section([]) == []
    text = "\n".join(section(samples))
    own = next(line for line in text.splitlines() if "| experts on demand" in line)
    for cell in ("20.0 (20.0 to 20.0)", "4.50x (4.00 to 5.00)", "4.00x (4.00 to 4.00)", "60%",
                 "100", "2.00", "50%", "5.0"):  # fmt: skip
        assert f"| {cell} |" in own
    assert "file over limit 1.40" in text
    llama = next(line for line in text.splitlines() if "--repack 0 |" in line)
    assert "| - | - | - | - |" in llama


def test_what_proves_nothing_is_refused(tmp_path: Path) -> None:
    """A file that nearly fits, one with holes, an unknown way, no llama-bench."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    result = run("--model", str(path), "--limit", "1")
    assert result.exit_code == 2
    assert "are not 1.3 times the limit of 1.00 GB" in result.output
    with open(path, "r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(RequestError, match="the file has holes"):
        measure(path, 1000, ["page faults"], 1, None, lambda sample: None)
    result = run("--limit", "0")
    assert result.exit_code == 2


def test_control_groups_are_made_or_refused_in_a_sentence() -> None:
    """Where they can be made, the limit holds; they are gone afterwards."""
    try:
        with control_group(64 << 20) as group:
            limits = [group / n for n in ("memory.limit_in_bytes", "memory.max")]
            (found,) = [int(p.read_text()) for p in limits if p.exists()]
            assert found == 64 << 20
        assert not os.path.exists(group)
    except RunnerError as error:
        assert "cannot make a memory control group" in str(error)

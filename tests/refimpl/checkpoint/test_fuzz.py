"""Damaged files never crash the readers (more cases: see fuzz_readers.py)."""

import subprocess
import sys
from pathlib import Path

CASES = 600


def test_damaged_files_are_refused_or_read(made):
    script = Path(__file__).with_name("fuzz_readers.py")
    files = [made("micro", "q4_0"), made("micro", "hf-bf16")]
    command = [sys.executable, "-W", "error", script, *files, "--cases", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    print(run.stdout.strip())
    assert run.stdout.startswith(f"{CASES} cases: ") and run.stdout.endswith(" 0 crashes\n")
    refused = int(run.stdout.split()[2])
    assert CASES / 2 < refused < CASES  # most damage shows, and some leaves a usable file

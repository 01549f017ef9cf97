"""Damaged files of every kind are accepted or refused with a sentence (see run.py)."""

import json
import subprocess
import sys
from pathlib import Path

CASES = 2000


def test_damaged_files_are_accepted_or_refused_with_a_sentence(tmp_path: Path) -> None:
    script = Path(__file__).with_name("run.py")
    command = [sys.executable, script, "--cases", str(CASES), "--failures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failures"] == 0 and told["cases"] >= 0.99 * CASES
    for kind, counts in told["kinds"].items():
        assert counts["refused"] > counts["cases"] / 10, kind  # damage shows,
        assert counts["accepted"] > 0, kind  # and some leaves a usable file

"""The measurements at full size, on a file of true widths and small extent."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.full_size import main
from refimpl.checkpoint.slice import slice_config, write_random


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose memory it is")
def test_the_cache_takes_what_the_ledger_says(tmp_path: Path) -> None:
    """Five layers at 4,096 tokens: both full ones whole, windows and a micro-batch of the rest."""
    model, out = tmp_path / "slice.gguf", tmp_path / "reports" / "full.json"
    write_random(slice_config(8, 512), model, "q4_0", 1, sparse=True)
    args = [str(model), "--depth", "4094", "--tokens", "2", "--kv-type", "f16", "--out", str(out)]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    opening, (shallow, deep) = record["opening"], record["decoding"]
    assert opening["apparent_bytes"] == model.stat().st_size > 50 * opening["disk_bytes"]
    assert min(opening[k] for k in ("open_s", "engine_ready_s", "inspect_command_s")) > 0
    assert (shallow["synthetic_kv"], deep["synthetic_kv"]) == (False, True)
    # Rings are rounded up to groups of 16 positions and hold three rows for drafts.
    assert deep["resident"]["cache_bytes"] == pytest.approx(deep["ledger_kv_bytes"], rel=0.02)
    assert deep["avg_ts"] > 0 and deep["weight_bytes_per_step"] == shallow["weight_bytes_per_step"]


def test_a_missing_file_gets_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "none.gguf")])
    assert done.exit_code == 2 and "does not exist" in done.output

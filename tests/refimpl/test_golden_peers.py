"""The reference agrees with three implementations that nobody here wrote.

The golden files were made by transformers, mlx-lm and llama.cpp on seeded tiny checkpoints
(tests/golden/README.md); none of them is needed here, as the checkpoints are made again from
the seed. Float64 is held to 1e-9, float32 to 5e-5, tokens and experts to equality.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from golden_runs import Runs
from golden_shared import Golden, goldens, load

from refimpl.golden.compare import compare

FLOAT64 = 1e-9
FLOAT32 = 5e-5
PEERS = ("transformers", "mlx", "llamacpp")
FILES = [pytest.param(path, id=path.stem) for path in goldens()]
FLOAT64_FILES = [pytest.param(path, id=path.stem) for path in goldens(dtype="float64")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("golden"))


def tolerance(golden: Golden) -> float:
    return FLOAT64 if golden.meta["dtype"] == "float64" else FLOAT32


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_has_run_on_three_differing_checkpoints(peer: str) -> None:
    found = [load(path) for path in goldens(peer, "float32")]
    assert len({golden.meta["weights_sha256"] for golden in found}) == 3
    assert len({golden.meta["config_hash"] for golden in found}) == 3
    assert all("command" in g.meta and "peer_version" in g.meta for g in found)


@pytest.mark.parametrize("path", FILES)
def test_every_number_of_the_peer_is_met(path: Path, runs: Runs) -> None:
    golden = load(path)
    for name, theirs, ours in runs.pairs(golden):
        assert ours.shape == theirs.shape, name
        if theirs.dtype.kind == "i":
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            assert np.abs(ours - theirs).max() <= tolerance(golden), name


@pytest.mark.parametrize("path", FILES)
def test_the_likeliest_token_is_the_same_in_every_row(path: Path, runs: Runs) -> None:
    for name, theirs, ours in runs.pairs(load(path)):
        if "logits" in name:
            np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1), err_msg=name)


@pytest.mark.parametrize("path", FLOAT64_FILES)
def test_float64_files_hold_the_whole_forward_pass(path: Path) -> None:
    golden = load(path)
    config = golden.config
    rows, layers, h = len(golden.arrays["prompt"]), config.num_hidden_layers, config.hidden_size
    assert golden.arrays["hidden"].shape == (layers + 1, rows, h)
    assert golden.arrays["route_idx"].shape == (len(config.moe_layers), rows, config.moe_top_k)
    for k in range(config.num_nextn_predict_layers):
        forced = golden.arrays[f"mtp_forced_logits_{k}"]
        assert forced.shape == (rows - 1 - k, config.vocab_size)
    assert all(a.dtype == np.float64 for a in golden.arrays.values() if a.dtype.kind == "f")


@pytest.mark.parametrize("chunk", [1, 7, 16, 32])
def test_any_prefill_chunk_meets_the_same_numbers(chunk: int, runs: Runs) -> None:
    golden = load(goldens("transformers", "float64")[0])
    ours = runs.arrays(golden, "float64", chunk=chunk)
    np.testing.assert_array_equal(ours["greedy"], golden.arrays["greedy"])
    for name in ("logits", "hidden", "greedy_logits", "mtp_forced_logits_2", "draft_chain_logits"):
        assert np.abs(ours[name] - golden.arrays[name]).max() <= FLOAT64, name


@pytest.mark.parametrize("path", FILES)
def test_golden_compare_finds_no_departure(path: Path, runs: Runs) -> None:
    golden = load(path)
    dtype = golden.meta["dtype"]
    result = compare(golden.arrays, runs.arrays(golden, dtype), (dtype, dtype), tolerance(golden))
    assert result.first_departure is None


def test_the_float32_peers_differ_from_each_other_less_than_the_tolerance() -> None:
    for checkpoint in ("tiny_a", "tiny_b", "tiny_c"):
        files = [load(path) for path in goldens(dtype="float32", checkpoint=checkpoint)]
        logits = [golden.arrays["logits"] for golden in files]
        assert len(logits) == len(PEERS)
        assert max(np.abs(a - b).max() for a in logits for b in logits) <= FLOAT32
        assert len({golden.arrays["greedy"].tobytes() for golden in files}) == 1


def test_weights_that_drifted_are_noticed() -> None:
    golden = load(goldens()[0])
    drifted = dataclasses.replace(golden, meta={**golden.meta, "seed": golden.meta["seed"] + 1})
    golden.weights()
    with pytest.raises(AssertionError, match="regenerate the goldens"):
        drifted.weights()


def test_routing_of_the_peers_is_never_a_near_tie() -> None:
    """A margin far above float32 rounding, so that equality of experts is no accident."""
    for path in goldens("transformers", "float64"):
        assert load(path).arrays["route_margin"].min() > 1e-5

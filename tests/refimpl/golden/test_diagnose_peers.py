"""`golden diagnose` on what other implementations really computed.

transformers, mlx-lm and llama.cpp agree with the reference but for rounding, so none of their
files holds a mistake; and the MTP wirings of transformers and llama.cpp, which differ from the
published one, are named as theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden_runs import Runs
from golden_shared import goldens, load
from threadpoolctl import threadpool_limits

from refimpl.golden.candidate import Candidate, Observation, from_arrays
from refimpl.golden.diagnose import diagnose
from refimpl.reference.variant import VARIANTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with threadpool_limits(1):
        yield Runs(tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("path", goldens(), ids=lambda p: p.stem)
def test_a_peer_rounds_and_makes_no_mistake(path: Path, runs: Runs) -> None:
    golden = load(path)
    source = runs.source(golden)
    found = diagnose(source, from_arrays(path.name, golden.arrays, golden.meta, source.config))
    assert found.verdict == "noise", found.sentence
    assert found.largest < 1e-5


@pytest.mark.parametrize(
    ("prefix", "variant"),
    [("tf_wiring", "mtp_transformers"), ("llamacpp_wiring", "mtp_llamacpp")],
)
@pytest.mark.parametrize("checkpoint", ["tiny_a", "tiny_b"])
def test_a_peer_s_own_wiring_is_named(
    prefix: str, variant: str, checkpoint: str, runs: Runs
) -> None:
    peer = "transformers" if prefix == "tf_wiring" else "llamacpp"
    golden = load(goldens(peer, "float32", checkpoint)[0])
    source = runs.source(golden)
    found = diagnose(source, _with_wiring(golden.arrays, prefix, source.config))
    assert found.verdict == "variant", found.sentence
    assert [e.name for e in found.explanations] == [variant]
    assert found.sentence.startswith(f"equals the reference with {VARIANTS[variant].phrase}")


def _with_wiring(arrays, prefix: str, config) -> Candidate:  # type: ignore[no-untyped-def]
    """The peer's logits with the teacher-forced MTP logits of its own wiring beside them."""
    candidate = from_arrays(
        "a peer", {"prompt": arrays["prompt"], "logits": arrays["logits"]}, {}, config
    )
    seen = []
    for k in range(config.num_nextn_predict_layers):
        values = arrays[f"{prefix}_forced_logits_{k}"]
        rows = arrays.get(f"{prefix}_rows", np.arange(len(values)))
        place = (f"mtp_forced_logits_{k}", None)
        seen.append(Observation(place, rows[: len(values)], values.astype(np.float64)))
    text = candidate.sequences[0]
    text = dataclasses.replace(text, observations=(*text.observations, *seen))
    return dataclasses.replace(candidate, sequences=(text,))

"""Random blocks are valid, have the wanted spread, and make a model whose activations stay sane."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refimpl.checkpoint.block_scales import SCALE_FIELDS
from refimpl.checkpoint.block_types import block_type, decode
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.random_blocks import random_rows
from refimpl.checkpoint.slice import TYPES, slice_config, type_rule, write_random
from refimpl.checkpoint.synth import PRESETS
from refimpl.cli import main
from refimpl.config import FULL, SLIDING, ModelConfig, published
from refimpl.errors import ConfigError, InputError
from refimpl.inventory import gguf_inventory, parameters
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace


@pytest.fixture(scope="module")
def wide() -> ModelConfig:
    """A small model whose rows fill blocks of 256."""
    return dataclasses.replace(
        PRESETS["tiny_a"](),
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        share_expert_dim=256,
        num_attention_heads=8,
        sliding_attention_heads=8,
    )


@pytest.mark.parametrize("name", [*sorted(SCALE_FIELDS), "F32", "F16", "BF16"])
def test_decoded_values_have_the_wanted_mean_and_spread(name: str) -> None:
    kind, rng = block_type(name), np.random.Generator(np.random.SFC64(3))
    rows = np.concatenate(list(random_rows(kind, 300, 1024, 0.02, rng)))
    values = decode(kind, rows).astype(np.float64)
    assert values.shape == (300, 1024)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(0.02, rel=0.03)
    assert abs(values.mean()) < 0.02 * 0.02
    assert np.abs(values).max() < 30 * 0.02


@pytest.mark.parametrize("file_type", ["q4_k_s", "q6_k", "q8_0", "iq4_xs", "bf16"])
def test_a_random_file_opens_and_its_activations_stay_near_one(
    wide: ModelConfig, tmp_path: Path, file_type: str
) -> None:
    path = tmp_path / "r.gguf"
    write_random(wide, path, file_type, seed=4)
    assert inspect(path, check=True).problems == ()
    source = open_checkpoint(path)
    assert source.config.num_nextn_predict_layers == 3
    model, trace = ReferenceModel(source), Trace(record=frozenset({"attn_out", "ffn_out"}))
    step = model.prefill(list(range(20)), model.new_cache(20), all_logits=True, trace=trace)
    for layer in range(9):
        for name in ("attn_out", "ffn_out"):
            rms = float(np.sqrt(np.mean(trace.rows(name, layer) ** 2)))
            assert 0.05 < rms < 10, (name, layer)
    assert 0.5 < float(step.logits.std()) < 10


def test_a_folder_of_random_weights(wide: ModelConfig, tmp_path: Path) -> None:
    write_random(wide, tmp_path / "hf", "bf16", seed=4)
    found = inspect(tmp_path / "hf", check=True)
    assert found.problems == ()
    assert found.parameters == parameters(wide)
    assert set(found.types) == {"BF16", "F32"}
    with pytest.raises(InputError, match="a folder can hold f32, f16, bf16"):
        write_random(wide, tmp_path / "other", "q4_0", seed=4)


def test_the_seed_fixes_every_byte(wide: ModelConfig, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        (tmp_path / name).mkdir()
        write_random(wide, tmp_path / name / "r.gguf", "q4_0", seed)
        data = (tmp_path / name / "r.gguf").read_bytes()
        digests.append(hashlib.sha256(data).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_the_slice_has_one_layer_of_each_kind_at_true_width() -> None:
    c, real = slice_config(mtp=3), published()
    assert [s.kind for s in c.trunk] == [FULL, SLIDING, SLIDING, SLIDING, FULL]
    assert [s.is_moe for s in c.trunk] == [False, True, True, True, True]
    assert [s.is_mtp for s in c.layers] == [False] * 5 + [True] * 3
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim",
                 "num_attention_heads", "sliding_attention_heads", "sliding_window", "moe_top_k",
                 "share_expert_dim", "rope_scaling"):  # fmt: skip
        assert getattr(c, name) == getattr(real, name)
    assert c.swiglu_limits == (0, 0, 0, 7.0, 7.0, 0, 0, 0)
    assert c.swiglu_limits_shared == (0, 0, 0, 0, 16.0, 0, 0, 0)
    assert c.moe_num_experts == 64
    assert c.vocab_size == 16384
    assert parameters(slice_config()) == 4_843_025_920


def test_q4_k_s_is_the_mixture_of_the_official_file() -> None:
    """Sizes of the published model under the rule: 111.49 GB, as its README says (111.5)."""
    config = published().without_mtp()
    rule, total = type_rule("q4_k_s", config), 0
    for spec in gguf_inventory(config):
        kind = block_type(rule(spec))
        total += kind.row_bytes(spec.shape[-1]) * (spec.elements // spec.shape[-1])
    assert total == pytest.approx(111.494e9, rel=1e-4)


def test_every_type_that_the_command_offers_can_be_written(wide: ModelConfig) -> None:
    from refimpl.cli_synth import _TYPES

    assert sorted(_TYPES) == sorted(TYPES)
    for name in TYPES:
        rule = type_rule(name, wide)
        assert {rule(spec) for spec in gguf_inventory(wide)} >= {"F32"}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"experts": 4}, "8 of them are selected"), ({"mtp": 4}, "0 to 3"), ({"vocab": 0}, "vocab")],
)
def test_impossible_slices_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises((InputError, ConfigError), match=words):
        slice_config(**sizes)


@pytest.mark.parametrize(
    ("args", "files"),
    [
        (["tiny", "--type", "f32"], {"tiny"}),
        (["tiny.gguf", "--type", "q4_0", "--preset", "tiny_b", "--mtp", "0"], {"tiny.gguf"}),
    ],
)
def test_command_line(
    args: list[str], files: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["synth", *args])
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == files
    found = inspect(tmp_path / args[0], check=True)
    assert found.problems == ()
    assert found.mtp_state == ("none" if "--mtp" in args else "present")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["out", "--preset", "slice", "--type", "q4_0"], "a folder can hold"),
        (["out.gguf", "--preset", "slice", "--experts", "3"], "8 of them are selected"),
        (["out", "--mtp", "2"], "tiny_a has 3, or 0"),
        (["out.gguf", "--type", "q3_k"], "type is 'q3_k'"),
        (["no/such/out.gguf", "--preset", "slice", "--vocab", "300"], "cannot be written"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["synth", *args])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

"""Tiny checkpoints that the tests of this room share, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_checkpoints

from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.config import ModelConfig

SEED = 5


@pytest.fixture(scope="session")
def micro() -> ModelConfig:
    """The smallest model with every kind of tensor."""
    return small_checkpoints.micro()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, micro: ModelConfig):
    """made(name, form) gives the path of a checkpoint, made on first use.

    `name` is a preset or 'micro'; `form` 'hf-bf16', 'hf-f32', ... or a GGUF type such as 'q4_0',
    which is converted from 'hf-f32'.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    def path(name: str, form: str) -> Path:
        if form.startswith("hf-"):
            out = root / name / form
            if not out.exists():
                config = micro if name == "micro" else PRESETS[name]()
                synthesize(config, SEED, out, form.removeprefix("hf-"))
            return out
        out = root / name / f"{form}.gguf"
        if not out.exists():
            convert(path(name, "hf-f32"), out, form)
        return out

    return path

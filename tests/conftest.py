"""Fixtures shared by all tests: small seeded checkpoints, made once per run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.source import WeightSource
from refimpl.checkpoint.synth import PRESETS, synthesize

# No test sees device files that the user of this machine keeps.
os.environ["HWMODEL_DEVICES"] = str(Path(__file__).parent / "no-such-folder")

# A busy machine may hold a process up for seconds: the time of an example says nothing about it.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by preset name (seed 1, BF16)."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(preset: str) -> Path:
        path = root / preset
        return path if path.exists() else synthesize(PRESETS[preset](), 1, path)

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_dir: Callable[[str], Path]) -> Callable[[str], WeightSource]:
    """An open tiny checkpoint by preset name."""
    return lambda preset: open_checkpoint(tiny_dir(preset))

"""Whether prefill uses the tile registers of AMX here, and why not."""

from __future__ import annotations

import os
from dataclasses import dataclass

from refimpl.engine.amx import TileUnit
from refimpl.engine.simd import Simd

AMX_CHOICES = ("on", "off", "emulate")
_ENVIRONMENT = "REFIMPL_AMX"


@dataclass(frozen=True)
class AmxChoice:
    """Tile instructions to use, or None, and a sentence about it."""

    unit: TileUnit | None
    reason: str


def choose_amx(simd: Simd, exact: bool = False) -> AmxChoice:
    wanted = os.environ.get(_ENVIRONMENT, "off")
    if wanted == "emulate" and not exact:
        return AmxChoice(TileUnit("amx emulated", simd.sources), "emulated")
    return AmxChoice(None, "off")

"""Whether prefill uses the tile registers of AMX here, and if not, why.

It does where the processor has them, the AVX512 kernels are used, the system lets the process have
their state, and a first product in a process of its own (`refimpl.engine.amx_check`) was right.
`REFIMPL_AMX` is 'on' (the default), 'off', or 'emulate': the same kernel with the instructions as
operations on memory, slow, for tests on any machine.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache

from refimpl.engine.amx import TileUnit
from refimpl.engine.simd import Simd, cpu_features
from refimpl.errors import InputError

AMX_CHOICES = ("on", "off", "emulate")
_ENVIRONMENT = "REFIMPL_AMX"
_FEATURES = ("amx-tile", "amx-bf16")
_ARCH_PRCTL = 158  # x86-64's number of this system call
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18  # Linux, Documentation/arch/x86/xstate.rst


@dataclass(frozen=True)
class AmxChoice:
    """What was chosen.

    Attributes:
        unit: tile instructions to use, or None.
        reason: why, in a few words.
        failed: whether this processor should have them, but they do not work.
    """

    unit: TileUnit | None
    reason: str
    failed: bool = False

    @property
    def text(self) -> str:
        """For a person."""
        return f"{'off' if self.unit is None else self.unit.name} ({self.reason})"


def choose_amx(simd: Simd, exact: bool = False) -> AmxChoice:
    """The tile instructions for prefill with `simd`; `exact`: float32 activations.

    Raises:
        InputError: `REFIMPL_AMX` is none of the choices.
    """
    wanted = os.environ.get(_ENVIRONMENT) or "on"
    if wanted not in AMX_CHOICES:
        raise InputError(f"{_ENVIRONMENT} is {wanted!r}, expected one of {', '.join(AMX_CHOICES)}")
    if wanted == "off":
        return AmxChoice(None, f"{_ENVIRONMENT}=off")
    if exact:
        return AmxChoice(None, "float32 activations")
    if simd.name != "avx512":
        return AmxChoice(None, f"goes with the avx512 kernels, these are {simd.name}")
    if wanted == "emulate":
        return AmxChoice(TileUnit("amx emulated", simd.sources), f"{_ENVIRONMENT}=emulate")
    missing = [name for name in _FEATURES if name not in cpu_features()]
    if missing:
        return AmxChoice(None, f"this processor has no {' and no '.join(missing)}")
    return _usable(simd.sources)


@cache
def _usable(sources: str) -> AmxChoice:
    from refimpl.engine.amx_check import why_not

    refused = request_permission()
    if refused:
        return AmxChoice(None, refused)
    unit = TileUnit("amx", sources)
    wrong = why_not(unit)
    if wrong:
        return AmxChoice(None, wrong, failed=True)
    return AmxChoice(unit, "checked on this processor")


def request_permission() -> str:
    """Ask Linux to let this process use tile data; why it refused, or ''.

    To be called before threads use the instructions; asking again does no harm.
    """
    if sys.platform != "linux":
        return f"asking for it is known for Linux only, this is {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA):
        return f"the system does not allow it: {os.strerror(ctypes.get_errno())}"
    return ""

"""The exception tree of hwmodel (and of bench, which stands on it).

RefimplError
└── HwmodelError
    ├── UnknownNameError   a device, engine, quant type or model nobody has heard of
    ├── DeviceFileError    a device or engine file that lacks a source or contradicts itself
    ├── RequestError       an option or a combination of options that cannot be
    └── RunFileError       a file of measured runs that cannot be read at all
"""

import math

from refimpl.errors import RefimplError


class HwmodelError(RefimplError):
    """Base of all errors that are the input's fault; the message is one sentence."""


_WHERE = {
    "device": "see 'hwmodel devices list', or give the path of a device file",
    "engine": "see 'hwmodel engines list'",
    "model": "expected a name such as step-3.5-flash or minimax-m2, or the path of a config.json "
    "or GGUF file",
    "quant type": "expected a type such as Q4_K_S, Q8_0, FP8 or BF16, or the path of a checkpoint",
}


class UnknownNameError(HwmodelError):
    """A name is not in the registry; the message offers the nearest ones."""

    def __init__(self, kind: str, text: str, nearest: tuple[str, ...]) -> None:
        where = f"; {_WHERE[kind]}" if kind in _WHERE else ""
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else where
        super().__init__(f"unknown {kind} {text!r}{hint}")
        self.kind, self.text, self.nearest = kind, text, nearest


class DeviceFileError(HwmodelError):
    """A device or engine file cannot be used; the message names the file and the key."""


class RequestError(HwmodelError):
    """An option or a combination of options cannot be; the message says what would be."""


class RunFileError(HwmodelError):
    """A file of measured runs cannot be read at all."""


def _shown(value: float) -> str:
    """`4096`, `1000000`, `0.01`, `nan`: as one would type it, whole numbers in full."""
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
    return str(int(value)) if whole else f"{value:g}"


def check_range(option: str, value: float | None, low: float, high: float, unit: str = "") -> None:
    """Refuse an option's number outside its range; None (not given) passes.

    Raises:
        RequestError: the number is not finite, or outside.
    """
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    raise RequestError(
        f"{option} is {_shown(value)}, expected {_shown(low)} to {_shown(high)}"
        f"{f' {unit}' if unit else ''}"
    )

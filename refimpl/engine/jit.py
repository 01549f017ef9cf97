"""Numba's decorators as the engine uses them.

They are named here without their type hints: compiled functions are called with Numba's types, of
which a checker of Python types knows nothing.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import extending

cfunc: Any = numba.cfunc
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
overload: Any = extending.overload

"""Instruction sets and block formats as parameter objects of the kernels.

A `Parameter` is a Python object that Numba sees as a type of its own, so a template that takes
one is compiled per parameter and `@overload` functions choose by it. The instruction set is
chosen from the processor's feature flags, never from its name (hypervisors fake names); the
environment variable `REFIMPL_SIMD` forces one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from refimpl.errors import InputError

SIMD_NAMES = ("avx512", "avx2", "portable")
_COMPILED = (
    "activations", "amx", "amx_emulated", "attention", "bf16", "codes", "fields", "formats",
    "heads", "jit", "kernels", "kernels512", "kv", "lanes", "loads", "maths", "moe", "running",
    "simd", "step", "sums", "supers", "sync", "tiles", "tiles_codes", "tiles_products",
    "tiles_values", "vec", "work", "x86",
)  # fmt: skip
_ENVIRONMENT = "REFIMPL_SIMD"
_NEEDS = {
    "avx512": (
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512vbmi",
        "gfni",
        "avx2",
        "f16c",
    ),
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}


@dataclass(frozen=True)
class Parameter:
    """Something that a kernel template is compiled for."""

    name: str


@dataclass(frozen=True)
class Simd(Parameter):
    """An instruction set.

    Attributes:
        name: 'avx512' (with VNNI, VBMI and GFNI), 'avx2', or 'portable' (LLVM's generic vectors).
        dot: the 256-bit instruction for sums of four byte products: 'avx512vnni', 'avxvnni', or
            '' (two multiply-add instructions).
        sources: hash of the source files of compiled code; compiled kernels on disk are found by
            it, so that they are compiled again when anything that they are made from has changed
            (Numba by itself looks at the file of the outermost function only).
    """

    dot: str
    sources: str

    @property
    def integer(self) -> bool:
        """Whether the default arithmetic has integer kernels (int8 activations)."""
        return self.name != "portable"


class ParameterType(types.Type):
    """The Numba type of one `Parameter`."""

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        super().__init__(name=repr(parameter))


@register_model(ParameterType)
class _ParameterModel(models.OpaqueModel):
    pass


@typeof_impl.register(Parameter)
def _typeof_parameter(value: Parameter, context: Any) -> ParameterType:
    return ParameterType(value)


@lower_constant(ParameterType)
def _lower_parameter(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return cgutils.get_null_value(context.get_value_type(kind))


@cache
def sources_hash() -> str:
    """Hash of the source files of compiled code."""
    digest = hashlib.sha256()
    for name in _COMPILED:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


@cache
def cpu_features() -> frozenset[str]:
    """Feature flags of this processor that LLVM may use."""
    from llvmlite import binding

    try:
        flags = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on some platforms
        return frozenset()
    return frozenset(name for name, present in flags.items() if present)


def available() -> tuple[str, ...]:
    """Names of the instruction sets that this machine can run, the best first."""
    have = cpu_features()
    return tuple(name for name in SIMD_NAMES if have.issuperset(_NEEDS[name]))


def choose_simd(name: str | None = None) -> Simd:
    """The instruction set to use: `name`, else `REFIMPL_SIMD`, else the best one here.

    Raises:
        InputError: unknown, or this processor lacks what it needs.
    """
    wanted = name or os.environ.get(_ENVIRONMENT) or available()[0]
    if wanted not in SIMD_NAMES:
        raise InputError(f"{_ENVIRONMENT} is {wanted!r}, expected one of {', '.join(SIMD_NAMES)}")
    if wanted not in available():
        missing = ", ".join(f for f in _NEEDS[wanted] if f not in cpu_features())
        raise InputError(
            f"this processor cannot run the {wanted} kernels (it lacks {missing}); "
            f"choose {' or '.join(available())}"
        )
    have = cpu_features()
    dot = ""
    if wanted != "portable":
        if have.issuperset(("avx512vnni", "avx512vl")):
            dot = "avx512vnni"
        elif "avxvnni" in have:
            dot = "avxvnni"
    return Simd(wanted, dot, sources_hash())

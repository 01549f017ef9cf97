"""What every kernel needs of the processor, whatever the instruction set."""

from __future__ import annotations

from llvmlite import binding
from numba.core.registry import cpu_target

from refimpl.errors import InputError


def require_half_precision() -> None:
    """Refuse an x86 processor without F16C.

    For it LLVM turns float16 into calls of a compiler's library (__extendhfsf2), which is not
    there: the process would be ended when the first kernel is linked.

    Raises:
        InputError: such a processor, or a virtual one that hides it.
    """
    if not binding.get_process_triple().startswith(("x86_64", "i686")):
        return
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    if "+f16c" not in features:
        raise InputError(
            "this processor converts no float16 (it lacks f16c, or a virtual machine hides it), "
            "which the engine needs; use --backend reference"
        )

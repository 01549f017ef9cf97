"""What the engine's threads share: claimed units of work, barriers, calls by address.

Barriers spin for a bounded time, then give the processor away, and at last sleep in short naps, so
that a partner that was preempted can run, even on the same core. Work is claimed unit by unit
from an atomic counter, so that a slow thread holds the others up by one unit at most.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import device, pointer

_SPINS = 4000  # some ten microseconds
_YIELDS = 100
_NAP = 50  # microseconds (Windows: rounded up to a millisecond)
_SYMBOL_YIELD, _SYMBOL_NAP = "refimpl_engine_yield", "refimpl_engine_nap"


def register_symbols() -> None:
    """Make the operating system's yield and sleep known to compiled code, before any is loaded."""
    if sys.platform == "win32":
        kernel = ctypes.windll.kernel32
        functions = {_SYMBOL_YIELD: kernel.SwitchToThread, _SYMBOL_NAP: kernel.Sleep}
    else:
        libc = ctypes.CDLL(None)
        functions = {_SYMBOL_YIELD: libc.sched_yield, _SYMBOL_NAP: libc.usleep}
    for name, function in functions.items():
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


register_symbols()


@intrinsic
def fetch_add(typingctx, address, value):
    """Add to the int64 at `address`, atomically; what it was before."""

    def emit(context, builder, signature, args):
        at = pointer(builder, args[0], ir.IntType(64))
        return builder.atomic_rmw("add", at, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def load_shared(typingctx, address):
    """The int64 at `address`, as other threads last wrote it."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], ir.IntType(64)), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def yield_processor(typingctx):
    """Let another thread run."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _SYMBOL_YIELD), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def nap(typingctx):
    """Sleep for some tens of microseconds."""
    time = 1 if sys.platform == "win32" else _NAP

    def emit(context, builder, signature, args):
        i32 = ir.IntType(32)
        kind = ir.FunctionType(i32, [i32])
        function = cgutils.get_or_insert_function(builder.module, kind, _SYMBOL_NAP)
        builder.call(function, [ir.Constant(i32, time)])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a waiting loop (x86; nothing elsewhere)."""

    def emit(context, builder, signature, args):
        if binding.get_process_triple().startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_address(typingctx, function, arguments):
    """Call a function of int64 arguments (a tuple) by its address."""
    count = len(arguments)
    i64 = ir.IntType(64)

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [i64] * count)
        callee = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(callee, [builder.extract_value(args[1], i) for i in range(count)])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), emit


@device(types.void)
def barrier(counter, target):
    """Wait until `counter` has been raised to `target`; this call raises it by one."""
    fetch_add(counter, 1)
    wait_until(counter, target)


@device(types.void)
def wait_until(counter, target):
    """Wait until the int64 at `counter` is `target` or more."""
    spins = 0
    while load_shared(counter) < target:
        spins += 1
        if spins < _SPINS:
            pause()
        elif spins < _SPINS + _YIELDS:
            yield_processor()
        else:
            nap()

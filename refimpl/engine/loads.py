"""Loads, stores and prefetches at integer addresses, and memory on the stack.

Nothing here is checked: an address outside its buffer is read or written as it stands.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from refimpl.engine.jit import intrinsic
from refimpl.engine.vec import pointer


@intrinsic
def load(typingctx, kind, address):
    """The vector of type `kind` at `address`; any alignment."""
    vector = kind.instance_type

    def emit(context, builder, signature, args):
        return builder.load(pointer(builder, args[1], vector.llvm), align=1)

    return vector(kind, types.int64), emit


@intrinsic
def store(typingctx, address, value):
    """Write a vector to `address`; any alignment."""

    def emit(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), emit


def _scalar_load(numba_type: Any, llvm_type: Any, doc: str) -> Any:
    def typed(typingctx, address):
        def emit(context, builder, signature, args):
            return builder.load(pointer(builder, args[0], llvm_type), align=1)

        return numba_type(types.int64), emit

    typed.__doc__ = doc
    return intrinsic(typed)


def _scalar_store(numba_type: Any, llvm_type: Any, doc: str) -> Any:
    def typed(typingctx, address, value):
        def emit(context, builder, signature, args):
            builder.store(args[1], pointer(builder, args[0], llvm_type), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), emit

    typed.__doc__ = doc
    return intrinsic(typed)


load_i8 = _scalar_load(types.int8, ir.IntType(8), "The signed byte at an address.")
load_u8 = _scalar_load(types.uint8, ir.IntType(8), "The byte at an address.")
load_u16 = _scalar_load(types.uint16, ir.IntType(16), "The 16-bit integer at an address.")
load_u32 = _scalar_load(types.uint32, ir.IntType(32), "The 32-bit integer at an address.")
load_i32 = _scalar_load(types.int32, ir.IntType(32), "The signed 32-bit integer at an address.")
load_i64 = _scalar_load(types.int64, ir.IntType(64), "The 64-bit integer at an address.")
load_f32 = _scalar_load(types.float32, ir.FloatType(), "The float32 at an address.")
store_i8 = _scalar_store(types.int8, ir.IntType(8), "Write a byte.")
store_i32 = _scalar_store(types.int32, ir.IntType(32), "Write a 32-bit integer.")
store_i64 = _scalar_store(types.int64, ir.IntType(64), "Write a 64-bit integer.")
store_f32 = _scalar_store(types.float32, ir.FloatType(), "Write a float32.")


@intrinsic
def load_f16(typingctx, address):
    """The float16 at an address, as float32."""

    def emit(context, builder, signature, args):
        half = builder.load(pointer(builder, args[0], ir.HalfType()), align=1)
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.int64), emit


@intrinsic
def store_f16(typingctx, address, value):
    """Write a float32 as the nearest float16."""

    def emit(context, builder, signature, args):
        half = builder.fptrunc(args[1], ir.HalfType())
        builder.store(half, pointer(builder, args[0], ir.HalfType()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), emit


def _prefetch(locality: int, doc: str) -> Any:
    def typed(typingctx, address):
        def emit(context, builder, signature, args):
            i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            hints = [ir.Constant(i32, 0), ir.Constant(i32, locality), ir.Constant(i32, 1)]
            builder.call(function, [pointer(builder, args[0], ir.IntType(8)), *hints])
            return context.get_dummy_value()

        return types.void(types.int64), emit

    typed.__doc__ = doc
    return intrinsic(typed)


prefetch = _prefetch(3, "Ask for the cache line at an address; any address is allowed.")
prefetch_once = _prefetch(0, "The same for what is read once: the nearest cache keeps it.")


@intrinsic
def stack(typingctx, size):
    """Address of `size` (a literal) bytes on the stack, 64-byte aligned, until the kernel ends."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    count = size.literal_value

    def emit(context, builder, signature, args):
        with builder.goto_entry_block():
            slot = builder.alloca(ir.ArrayType(ir.IntType(8), count))
        slot.align = 64
        return builder.ptrtoint(slot, ir.IntType(64))

    return types.int64(size), emit

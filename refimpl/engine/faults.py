"""A sentence in place of a crash when a mapped file loses bytes that are being read.

A file is checked before every step, but it can shrink, or its disk can fail, in the middle of one.
The system then sends SIGBUS to the thread that read. No Python code can run there (the thread may
be inside a kernel, without the interpreter's lock), so the handler is a few machine instructions
made here: it looks the address up among the mapped files, writes that file's prepared sentence to
stderr and ends the process with code 2. A SIGBUS of any other origin is handed to whoever handled
it before. Linux and macOS on 64 bits; Windows does not let mapped files shrink.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import sys
from typing import Any

import numpy as np

from refimpl.engine.files import MappedFile

_MAX_FILES = 1024
_FIELDS = 4  # first address, end, address of the sentence, its length
_BAD_INPUT = 2


def _handler(table: int, rows: int, previous: int) -> Any:
    """The handler (signal, siginfo, context) as an LLVM module; `previous` is what to put back
    for a signal that does not come from a watched file."""
    from llvmlite import binding, ir

    libc, i32, i64 = ctypes.CDLL(None), ir.IntType(32), ir.IntType(64)
    module = ir.Module("faults")
    module.triple = binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i32, i64, i64]), "handler")
    entry, loop, ours, other, foreign = (
        function.append_basic_block(name) for name in ("entry", "next", "ours", "other", "foreign")
    )

    def read(address: Any) -> Any:
        return build.load(build.inttoptr(address, i64.as_pointer()), typ=i64)

    def call(function: Any, result: Any, arguments: list[Any]) -> None:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        place = ctypes.cast(function, ctypes.c_void_p).value
        build.call(build.inttoptr(i64(place), kind.as_pointer()), arguments)

    build = ir.IRBuilder(entry)
    # where siginfo_t has si_addr
    address = read(build.add(function.args[1], i64(24 if sys.platform == "darwin" else 16)))
    build.branch(loop)
    build.position_at_end(loop)
    i = build.phi(i64)
    row = build.add(i64(table), build.mul(i, i64(8 * _FIELDS)))
    above = build.icmp_unsigned(">=", address, read(row))
    inside = build.and_(above, build.icmp_unsigned("<", address, read(build.add(row, i64(8)))))
    build.cbranch(inside, ours, other)
    build.position_at_end(ours)
    text, length = read(build.add(row, i64(16))), read(build.add(row, i64(24)))
    call(libc.write, i64, [i32(2), text, length])
    call(libc._exit, ir.VoidType(), [i32(_BAD_INPUT)])
    build.ret_void()
    build.position_at_end(other)
    following = build.add(i, i64(1))
    i.add_incoming(i64(0), entry)
    i.add_incoming(following, other)
    build.cbranch(build.icmp_unsigned("<", following, i64(rows)), loop, foreign)
    build.position_at_end(foreign)
    call(libc.sigaction, i32, [function.args[0], i64(previous), i64(0)])
    build.ret_void()
    return module


class _Watch:
    """The handler and its table; there is one in a process."""

    def __init__(self) -> None:
        self._table = np.zeros((_MAX_FILES, _FIELDS), dtype=np.int64)
        self._texts: list[Any] = [None] * _MAX_FILES
        self._files: list[int | None] = [None] * _MAX_FILES
        self._counts = [0] * _MAX_FILES
        self._previous = ctypes.create_string_buffer(512)  # larger than any struct sigaction
        self._engine = self._compiled()
        self._install(int(self._engine.get_function_address("handler")))

    def add(self, file: MappedFile) -> None:
        """Watch a file, until it has been removed as often as it was added. What is beyond the
        table's rows is not watched."""
        if file.address in self._files:
            self._counts[self._files.index(file.address)] += 1
            return
        if None not in self._files:
            return
        row = self._files.index(None)
        sentence = (
            f"refimpl: error: {file.path}: bytes of the file are gone while it is in use (it "
            "became shorter, or its disk cannot be read); restore it and start again\n"
        )
        text = sentence.encode()
        buffer = ctypes.create_string_buffer(text)
        self._texts[row], self._files[row], self._counts[row] = buffer, file.address, 1
        self._table[row, 2:] = ctypes.addressof(buffer), len(text)
        self._table[row, :2] = file.address, file.address + file.size

    def remove(self, file: MappedFile) -> None:
        """Watch a file no longer."""
        if file.address in self._files:
            row = self._files.index(file.address)
            self._counts[row] -= 1
            if not self._counts[row]:
                self._table[row] = 0
                self._files[row] = self._texts[row] = None

    def _compiled(self) -> Any:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        made = _handler(self._table.ctypes.data, _MAX_FILES, ctypes.addressof(self._previous))
        module = binding.parse_assembly(str(made))
        machine = binding.Target.from_default_triple().create_target_machine()
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        return engine

    def _install(self, handler: int) -> None:
        """sigaction(SIGBUS, {handler, no mask, SA_SIGINFO}, previous)."""
        action = ctypes.create_string_buffer(512)
        ctypes.c_uint64.from_buffer(action).value = handler
        flags_at, flag = (12, 0x40) if sys.platform == "darwin" else (8 + 128, 4)
        ctypes.c_int32.from_buffer(action, flags_at).value = flag
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.sigaction(int(signal.SIGBUS), action, self._previous):
            raise OSError(ctypes.get_errno(), "sigaction failed")


_watch: _Watch | None = None


def supported() -> bool:
    """Whether this system's signals are known here."""
    return sys.platform in ("linux", "darwin") and platform.machine() in (
        "x86_64", "aarch64", "arm64",
    )  # fmt: skip


def watch(file: MappedFile) -> None:
    """End the process with a sentence when bytes of `file` turn out to be gone."""
    global _watch
    if not supported():
        return
    if _watch is None:
        _watch = _Watch()
    _watch.add(file)


def unwatch(file: MappedFile) -> None:
    """Stop watching a file, before its map is given back to the system."""
    if _watch is not None:
        _watch.remove(file)

"""The sums of the AVX512 kernels' loop: of one weight row, or of two.

Each step of one or two weight rows is multiplied with M rows of activations. With M = 4 there are
two weight rows, so that the loading of activations, which both share, does not hold them up; one
alone reads memory no slower and leaves no odd row.
"""

from __future__ import annotations

from typing import Any

from refimpl.engine.jit import overload
from refimpl.engine.simd import Parameter
from refimpl.engine.vec import F32x16, load, reduce_add, store, store_f32, zeros

_INLINE = {"forceinline": True}


class Sums(Parameter):
    """Which sums there are; as values they are always eight F32x16, a row's four after another's.

    Args:
        count: rows of activations, 1, 2 or 4.
    """

    def __init__(self, count: int) -> None:
        super().__init__(str(count))

    @property
    def count(self) -> int:
        """Rows of activations."""
        return int(self.name)

    @property
    def weight_rows(self) -> int:
        """Rows of weights at a time."""
        return 2 if self.count > 2 else 1

    @property
    def size(self) -> int:
        """Bytes of the sums in memory."""
        return 64 * self.count * self.weight_rows


def added(fmt: Any, step: Any, x: int, acc: Any) -> Any:
    """acc (F32x16) + the products of a decoded step with its activations."""
    raise NotImplementedError("only called from compiled kernels")


def added_all(sums: Any, fmt: Any, steps: Any, xs: Any, x: int, total: Any) -> Any:
    """`total` + the products of the steps of two weight rows with activations x_m + `x`."""
    raise NotImplementedError("only called from compiled kernels")


def keep(sums: Any, at: int, total: Any) -> None:
    """Write `total` to memory."""
    raise NotImplementedError("only called from compiled kernels")


def kept(sums: Any, at: int, anything: bool) -> Any:
    """What `keep` wrote, or zeros if it has written nothing."""
    raise NotImplementedError("only called from compiled kernels")


def put(sums: Any, ys: Any, at: int, second: int, total: Any) -> None:
    """Write the sums' lanes, added up, to y_m + `at`, and those of the second row after them unless
    `second` is 0."""
    raise NotImplementedError("only called from compiled kernels")


@overload(added_all, jit_options=_INLINE)
def _added_all(sums, fmt, steps, xs, x, total):
    count = sums.parameter.count

    def all_rows(sums, fmt, steps, xs, x, total):
        (step, other), (x0, x1, x2, x3) = steps, xs
        a0, a1, a2, a3, b0, b1, b2, b3 = total
        a0 = added(fmt, step, x0 + x, a0)
        if count > 2:
            b0 = added(fmt, other, x0 + x, b0)
        if count > 1:
            a1 = added(fmt, step, x1 + x, a1)
        if count > 2:
            b1 = added(fmt, other, x1 + x, b1)
            a2 = added(fmt, step, x2 + x, a2)
            b2 = added(fmt, other, x2 + x, b2)
            a3 = added(fmt, step, x3 + x, a3)
            b3 = added(fmt, other, x3 + x, b3)
        return a0, a1, a2, a3, b0, b1, b2, b3

    return all_rows


@overload(keep, jit_options=_INLINE)
def _keep(sums, at, total):
    count = sums.parameter.count

    def write(sums, at, total):
        a0, a1, a2, a3, b0, b1, b2, b3 = total
        store(at, a0)
        if count > 1:
            store(at + 64, a1)
        if count > 2:
            store(at + 128, a2)
            store(at + 192, a3)
            store(at + 256, b0)
            store(at + 320, b1)
            store(at + 384, b2)
            store(at + 448, b3)

    return write


@overload(kept, jit_options=_INLINE)
def _kept(sums, at, anything):
    count = sums.parameter.count

    def read(sums, at, anything):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zeros(F32x16)
        if anything:
            a0 = load(F32x16, at)
            if count > 1:
                a1 = load(F32x16, at + 64)
            if count > 2:
                a2, a3 = load(F32x16, at + 128), load(F32x16, at + 192)
                b0, b1 = load(F32x16, at + 256), load(F32x16, at + 320)
                b2, b3 = load(F32x16, at + 384), load(F32x16, at + 448)
        return a0, a1, a2, a3, b0, b1, b2, b3

    return read


@overload(put, jit_options=_INLINE)
def _put(sums, ys, at, second, total):
    count = sums.parameter.count

    def write(sums, ys, at, second, total):
        y0, y1, y2, y3 = ys
        a0, a1, a2, a3, b0, b1, b2, b3 = total
        store_f32(y0 + at, reduce_add(a0))
        if count > 1:
            store_f32(y1 + at, reduce_add(a1))
        if count > 2:
            store_f32(y2 + at, reduce_add(a2))
            store_f32(y3 + at, reduce_add(a3))
            if second:
                store_f32(y0 + at + 4, reduce_add(b0))
                store_f32(y1 + at + 4, reduce_add(b1))
                store_f32(y2 + at + 4, reduce_add(b2))
                store_f32(y3 + at + 4, reduce_add(b3))

    return write

"""The sums of the AVX512 kernels' loop: of one weight row, or of two.

Each step of one or two weight rows is multiplied with M rows of activations. With M = 4 there are
two weight rows, so that the loading of activations, which both share, does not hold them up; one
alone reads memory no slower and leaves no odd row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.engine.jit import njit, overload
from refimpl.engine.lanes import lane, shuffler
from refimpl.engine.loads import load, store, store_f32, store_i32, store_i64
from refimpl.engine.simd import Parameter
from refimpl.engine.vec import F32x16, I64x8, reduce_add, reinterpret, zeros

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
    def row_size(self) -> int:
        """Bytes of one weight row's sums in memory."""
        return 64 * self.count


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


# Two vectors' sums of lanes i and i + 8, then i and i + 4 of twice two, and so on: the additions of
# `reduce_add`, so that a row's result does not depend on which others are computed with it.
_lower_8, _upper_8 = (shuffler(F32x16, [*range(i, i + 8), *range(16 + i, 24 + i)]) for i in (0, 8))
_lower_4, _upper_4 = (
    shuffler(F32x16, [v + 8 * h + i + k for v in (0, 16) for h in (0, 1) for k in range(4)])
    for i in (0, 4)
)
_lower_2, _upper_2 = (
    shuffler(F32x16, [4 * q + v + i + k for q in range(4) for v in (0, 16) for k in range(2)])
    for i in (0, 2)
)
_even, _odd = (shuffler(F32x16, [2 * (k % 8) + i for k in range(16)]) for i in (0, 1))


@njit(forceinline=True)
def _added_lanes(total):
    """The lanes of each of eight vectors added up, as lanes 0 4 1 5 2 6 3 7 and once more."""
    a0, a1, a2, a3, b0, b1, b2, b3 = total
    a01, a23 = _lower_8(a0, a1) + _upper_8(a0, a1), _lower_8(a2, a3) + _upper_8(a2, a3)
    b01, b23 = _lower_8(b0, b1) + _upper_8(b0, b1), _lower_8(b2, b3) + _upper_8(b2, b3)
    a = _lower_4(a01, a23) + _upper_4(a01, a23)
    b = _lower_4(b01, b23) + _upper_4(b01, b23)
    both = _lower_2(a, b) + _upper_2(a, b)
    return _even(both, both) + _odd(both, both)


@njit(forceinline=True)
def _put_pair(y, at, pair, second):
    """Two results, or the first of them."""
    if second:
        store_i64(y + at, pair)
    else:
        store_i32(y + at, np.int32(pair))


@overload(put, jit_options=_INLINE)
def _put(sums, ys, at, second, total):
    count = sums.parameter.count

    def write(sums, ys, at, second, total):
        y0, y1, _, _ = ys
        store_f32(y0 + at, reduce_add(total[0]))
        if count > 1:
            store_f32(y1 + at, reduce_add(total[1]))

    def write_pairs(sums, ys, at, second, total):
        pairs = reinterpret(I64x8, _added_lanes(total))
        y0, y1, y2, y3 = ys
        _put_pair(y0, at, lane(pairs, 0), second)
        _put_pair(y1, at, lane(pairs, 1), second)
        _put_pair(y2, at, lane(pairs, 2), second)
        _put_pair(y3, at, lane(pairs, 3), second)

    return write_pairs if count > 2 else write

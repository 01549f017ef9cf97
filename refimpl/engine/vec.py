"""Vectors as Numba values, and their arithmetic.

A `VecType` is a Numba type over an LLVM vector such as <16 x float>; `load(F32x16, address)` of
`refimpl.engine.loads` reads one from an integer address, the usual operators work lane by lane, and
everything else is a small intrinsic below. LLVM splits vectors that are wider than the machine's,
so code written with these types alone runs anywhere Numba runs. What only x86 has is in
`refimpl.engine.x86`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, models, register_model, type_callable

from refimpl.engine.jit import intrinsic

_LLVM = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "i64": ir.IntType(64),
    "f16": ir.HalfType(),
    "f32": ir.FloatType(),
}
_SCALAR: dict[str, Any] = {
    "i8": types.int8,
    "i16": types.int16,
    "i32": types.int32,
    "i64": types.int64,
    "f32": types.float32,
}


class VecType(types.Type):
    """`count` lanes of `element` ('i8', 'i16', 'i32', 'i64', 'f16' or 'f32')."""

    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"{element}x{count}")

    @property
    def llvm(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(_LLVM[self.element], self.count)

    @property
    def is_float(self) -> bool:
        """Whether the lanes are floating-point numbers."""
        return self.element[0] == "f"


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: VecType) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


I8x16, I8x32, I8x64 = VecType("i8", 16), VecType("i8", 32), VecType("i8", 64)
I16x16, I16x32 = VecType("i16", 16), VecType("i16", 32)
I32x4, I32x8, I32x16 = VecType("i32", 4), VecType("i32", 8), VecType("i32", 16)
I64x8 = VecType("i64", 8)
F16x8, F16x16 = VecType("f16", 8), VecType("f16", 16)
F32x4, F32x8, F32x16 = VecType("f32", 4), VecType("f32", 8), VecType("f32", 16)


def device(result: Any) -> Any:
    """Decorator of functions that only compiled code calls, with the Numba type they return.

    Unlike `njit` it makes no entry for the interpreter and no machine code until the caller is
    linked, which halves the time to compile a large function; error model and other options are
    the caller's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        def typed(typingctx, *args):
            signature = result(*[types.unliteral(a) for a in args])

            def emit(context, builder, signature, values):
                return context.compile_internal(builder, function, signature, values)

            return signature, emit

        own = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(function).parameters.values()
        made: Any = typed
        made.__signature__ = inspect.Signature([own, *parameters])
        typed.__name__, typed.__doc__ = function.__name__, function.__doc__
        return intrinsic(made)

    return decorate


def pointer(builder: Any, address: Any, llvm_type: Any) -> Any:
    """An integer address as a pointer to `llvm_type`."""
    return builder.inttoptr(address, llvm_type.as_pointer())


def constant(llvm_type: Any, values: list[int] | list[float]) -> Any:
    """A constant vector."""
    return ir.Constant(llvm_type, [ir.Constant(llvm_type.element, v) for v in values])


def splatted(builder: Any, scalar: Any, llvm_type: Any) -> Any:
    """A vector whose lanes all hold `scalar`."""
    first = builder.insert_element(
        ir.Constant(llvm_type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    mask = ir.Constant(ir.VectorType(ir.IntType(32), llvm_type.count), [0] * llvm_type.count)
    return builder.shuffle_vector(first, ir.Constant(llvm_type, ir.Undefined), mask)


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _suffix(t: VecType) -> str:
    return f"v{t.count}{t.element}"


def _binary(op: Any, integer: str, floating: str | None) -> None:
    @type_callable(op)
    def typed(context: Any) -> Callable[[Any, Any], Any]:
        def typer(a: Any, b: Any) -> Any:
            same = isinstance(a, VecType) and a == b
            return a if same and (floating or not a.is_float) else None

        return typer

    @lower_builtin(op, VecType, VecType)
    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = floating if signature.return_type.is_float else integer
        return getattr(builder, str(name))(*args)


for _op, _integer, _floating in (
    (operator.add, "add", "fadd"),
    (operator.sub, "sub", "fsub"),
    (operator.mul, "mul", "fmul"),
    (operator.truediv, "sdiv", "fdiv"),
    (operator.and_, "and_", None),
    (operator.or_, "or_", None),
    (operator.xor, "xor", None),
):
    _binary(_op, _integer, _floating)


@intrinsic
def splat(typingctx, kind, scalar):
    """A vector of type `kind` whose lanes all hold `scalar`."""
    vector = kind.instance_type

    def emit(context, builder, signature, args):
        return splatted(builder, args[1], vector.llvm)

    return vector(kind, _SCALAR[vector.element]), emit


@intrinsic
def zeros(typingctx, kind):
    """A vector of zeros."""
    vector = kind.instance_type

    def emit(context, builder, signature, args):
        return ir.Constant(vector.llvm, None)

    return vector(kind), emit


def _shift(name: str, doc: str) -> Any:
    def typed(typingctx, value, bits):
        if not isinstance(bits, types.IntegerLiteral):
            return None

        def emit(context, builder, signature, args):
            amount = constant(value.llvm, [bits.literal_value] * value.count)
            return getattr(builder, name)(args[0], amount)

        return value(value, bits), emit

    typed.__doc__ = doc
    return intrinsic(typed)


shift_left = _shift("shl", "Lanes shifted left by a literal number of bits.")
shift_right = _shift("lshr", "Lanes shifted right by a literal number of bits, zeros coming in.")
shift_right_signed = _shift("ashr", "Lanes shifted right by a literal number of bits, with sign.")


@intrinsic
def shift_right_each(typingctx, value, bits):
    """Lanes shifted right by the lanes of `bits`, zeros coming in."""

    def emit(context, builder, signature, args):
        return builder.lshr(args[0], args[1])

    return (value(value, bits), emit) if value == bits else None


def _conversion(chosen: Callable[[VecType, VecType], str], doc: str) -> Any:
    def typed(typingctx, kind, value):
        target = kind.instance_type

        def emit(context, builder, signature, args):
            return getattr(builder, chosen(value, target))(args[1], target.llvm)

        return target(kind, value), emit

    typed.__doc__ = doc
    return intrinsic(typed)


def _signed(source: VecType, target: VecType) -> str:
    if source.is_float and target.is_float:
        return "fpext" if target.element == "f32" else "fptrunc"
    if source.is_float:
        return "fptosi"
    if target.is_float:
        return "sitofp"
    return "sext" if _LLVM[target.element].width > _LLVM[source.element].width else "trunc"


def _unsigned(source: VecType, target: VecType) -> str:
    return "uitofp" if target.is_float else "zext"


convert = _conversion(_signed, "Lane values in another type; integers are signed.")
widen = _conversion(_unsigned, "Lane values in a wider type; integers are unsigned.")
reinterpret = _conversion(lambda a, b: "bitcast", "The same bits as another type of equal size.")


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def emit(context, builder, signature, args):
        return call(builder, f"llvm.fma.{_suffix(a)}", a.llvm, list(args))

    return (a(a, a, a), emit) if a == b == c and a.is_float else None


def _unary_float(name: str, doc: str) -> Any:
    def typed(typingctx, a):
        def emit(context, builder, signature, args):
            return call(builder, f"llvm.{name}.{_suffix(a)}", a.llvm, list(args))

        return a(a), emit

    typed.__doc__ = doc
    return intrinsic(typed)


vabs = _unary_float("fabs", "Absolute values.")
vround = _unary_float("rint", "Nearest integers, ties to even.")


def _chosen(comparison: str, doc: str) -> Any:
    def typed(typingctx, a, b):
        def emit(context, builder, signature, args):
            picked = builder.fcmp_ordered(comparison, args[0], args[1])
            return builder.select(picked, args[0], args[1])

        return (a(a, a), emit) if a == b and a.is_float else None

    typed.__doc__ = doc
    return intrinsic(typed)


vmax = _chosen(">", "The larger of a and b, lane by lane; b where either is not a number.")
vmin = _chosen("<", "The smaller of a and b, lane by lane; b where either is not a number.")


@intrinsic
def where_less(typingctx, lanes, bound, a, b):
    """Lanes of a where `lanes` < `bound` (signed integers), else of b."""

    def emit(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", args[0], args[1]), args[2], args[3])

    return (a(lanes, lanes, a, a), emit) if lanes == bound and a == b else None


@intrinsic
def lane_numbers(typingctx, kind):
    """0, 1, 2, ... as an integer vector."""
    vector = kind.instance_type

    def emit(context, builder, signature, args):
        return constant(vector.llvm, list(range(vector.count)))

    return vector(kind), emit


def _reduction(integer: Any, floating: Any, doc: str) -> Any:
    """Halve the vector until one lane is left: a fixed tree."""

    def typed(typingctx, value):
        def emit(context, builder, signature, args):
            combine: Any = floating if value.is_float else integer
            vector, width = args[0], value.count
            while width > 1:
                width //= 2
                half = ir.VectorType(ir.IntType(32), width)
                low = builder.shuffle_vector(vector, vector, constant(half, list(range(width))))
                high = builder.shuffle_vector(
                    vector, vector, constant(half, list(range(width, 2 * width)))
                )
                vector = combine(builder, low, high)
            return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

        return _SCALAR[value.element](value), emit

    typed.__doc__ = doc
    return intrinsic(typed)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _larger_integer(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


reduce_add = _reduction(
    lambda builder, a, b: builder.add(a, b),
    lambda builder, a, b: builder.fadd(a, b),
    "The sum of all lanes, always in the same order.",
)
reduce_max = _reduction(_larger_integer, _larger, "The largest lane.")

"""What each operation of Python and torch means as IR: composed ones spelled out, kinds checked and converted.

A builder takes expressions; strings and None as they are. `functions.py` says under which names users find them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attn_engine.errors import UnknownOperation, WrongOperands
from attn_engine.ir.expr import Const, Expr, call
from attn_engine.ir.ops import INFO, DType, Number, Op

INT_LIMIT = 2**31
ZERO, ONE, MINUS_ONE = Const(0.0), Const(1.0), Const(-1.0)
_TWENTY, _HUNDREDTH = Const(20.0), Const(0.01)


def constant(value: Number) -> Const:
    """A number of the program; an int too large for a kernel's 32 bits becomes a float."""
    if isinstance(value, int) and not isinstance(value, bool) and not -INT_LIMIT <= value < INT_LIMIT:
        return Const(float(value))
    return Const(value)


def apply(op: Op, *args: Expr) -> Expr:
    """`op` on operands of the right kinds; computed at once when all are constants."""
    if any(a.dtype is DType.FLOAT for a in args):
        args = tuple(
            Const(float(a.value)) if isinstance(a, Const) and a.dtype is DType.INT else a for a in args
        )
    if all(isinstance(a, Const) for a in args):
        values = [a.value for a in args if isinstance(a, Const)]
        result = call(op, *args)
        value = INFO[op].evaluate(*values)
        return Const(float(value)) if result.dtype is DType.FLOAT else constant(value)
    return call(op, *args)


def to_float(x: Expr) -> Expr:
    return x if x.dtype is DType.FLOAT else apply(Op.TO_FLOAT, x)


def to_int(x: Expr) -> Expr:
    return x if x.dtype is DType.INT else apply(Op.TO_INT, x)


def to_bool(x: Expr) -> Expr:
    return x if x.dtype is DType.BOOL else apply(Op.NE, x, Const(0))


def number(x: Expr) -> Expr:
    return to_int(x) if x.dtype is DType.BOOL else x


def arithmetic(op: Op) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: apply(op, number(a), number(b))


def function(op: Op) -> Callable[[Expr], Expr]:
    return lambda x: apply(op, to_float(x))


add, subtract, multiply = arithmetic(Op.ADD), arithmetic(Op.SUB), arithmetic(Op.MUL)
maximum, minimum, divide = arithmetic(Op.MAX), arithmetic(Op.MIN), arithmetic(Op.DIV)
exp, exp2, log, log2 = function(Op.EXP), function(Op.EXP2), function(Op.LOG), function(Op.LOG2)
tanh, sigmoid, sqrt, rsqrt = function(Op.TANH), function(Op.SIGMOID), function(Op.SQRT), function(Op.RSQRT)
sin, cos = function(Op.SIN), function(Op.COS)


def negate(x: Expr) -> Expr:
    return apply(Op.NEG, number(x))


def absolute(x: Expr) -> Expr:
    return apply(Op.ABS, number(x))


def floor(x: Expr) -> Expr:
    return x if x.dtype is DType.INT else apply(Op.FLOOR, to_float(x))


def ceil(x: Expr) -> Expr:
    return negate(floor(negate(x)))


def floor_divide(a: Expr, b: Expr) -> Expr:
    if DType.FLOAT in (a.dtype, b.dtype):
        return floor(divide(a, b))
    return apply(Op.FLOORDIV, number(a), number(b))


def remainder(a: Expr, b: Expr) -> Expr:
    if DType.FLOAT in (a.dtype, b.dtype):
        return subtract(a, multiply(floor_divide(a, b), b))
    return apply(Op.MOD, number(a), number(b))


def add_scaled(a: Expr, b: Expr, alpha: Expr | None = None) -> Expr:
    return add(a, b if alpha is None else multiply(b, alpha))


def subtract_scaled(a: Expr, b: Expr, alpha: Expr | None = None) -> Expr:
    return subtract(a, b if alpha is None else multiply(b, alpha))


def reverse_subtract(a: Expr, b: Expr) -> Expr:
    return subtract(b, a)


def reciprocal(x: Expr) -> Expr:
    return divide(ONE, x)


def square(x: Expr) -> Expr:
    return multiply(x, x)


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    if condition.dtype is not DType.BOOL:
        raise WrongOperands(
            operation="where",
            expected="a bool condition",
            got=kind(condition),
            instead="Compare it first, for example `x > 0`.",
        )
    if DType.BOOL in (a.dtype, b.dtype) and a.dtype is not b.dtype:
        a, b = number(a), number(b)
    return apply(Op.WHERE, condition, a, b)


def relu(x: Expr) -> Expr:
    return where(apply(Op.LT, zero_like(x), x), x, zero_like(x))


def clamp(x: Expr, min: Expr | None = None, max: Expr | None = None) -> Expr:
    x = number(x)
    if all(bound is None or bound.dtype is DType.INT for bound in (x, min, max)):
        x = x if min is None else maximum(x, min)
        return x if max is None else minimum(x, max)
    if min is not None:
        x = where(apply(Op.LT, x, min), min, x)
    if max is not None:
        x = where(apply(Op.LT, max, x), max, x)
    return x


def zero_like(x: Expr) -> Const:
    return Const(0.0 if x.dtype is DType.FLOAT else 0)


def power(base: Expr, exponent: Expr) -> Expr:
    """base ** exponent: products for whole exponents, exp2 for a constant base, else exp(exponent * log(base))."""
    if isinstance(exponent, Const):
        if exponent.value == int(exponent.value) if math.isfinite(exponent.value) else False:
            return whole_power(number(base), int(exponent.value), exponent.dtype is DType.FLOAT)
        if exponent.value == 0.5:
            return sqrt(base)
        if exponent.value == -0.5:
            return rsqrt(base)
    if isinstance(base, Const) and base.value > 0:
        steps = exponent if base.value == 2 else multiply(exponent, Const(math.log2(base.value)))
        return exp2(steps)
    return exp(multiply(exponent, log(base)))


def whole_power(base: Expr, exponent: int, floating: bool) -> Expr:
    """Repeated squaring, so that (-2) ** 3 is -8 and the gradient is a polynomial."""
    if floating or exponent < 0:
        base = to_float(base)
    if exponent < 0:
        return reciprocal(whole_power(base, -exponent, floating))
    result: Expr | None = None
    while exponent:
        if exponent & 1:
            result = base if result is None else multiply(result, base)
        exponent >>= 1
        base = multiply(base, base) if exponent else base
    return result if result is not None else Const(1.0 if base.dtype is DType.FLOAT else 1)


def softplus(x: Expr, beta: Expr = ONE, threshold: Expr = _TWENTY) -> Expr:
    scaled = multiply(x, beta)
    curved = log(add(ONE, exp(minimum(scaled, threshold))))
    return where(apply(Op.LT, threshold, scaled), x, divide(curved, beta))


def silu(x: Expr) -> Expr:
    return multiply(x, sigmoid(x))


def logsigmoid(x: Expr) -> Expr:
    return negate(softplus(negate(x)))


def leaky_relu(x: Expr, negative_slope: Expr = _HUNDREDTH) -> Expr:
    return where(apply(Op.LT, zero_like(x), x), to_float(x), multiply(x, negative_slope))


def elu(x: Expr, alpha: Expr = ONE) -> Expr:
    curved = multiply(alpha, subtract(exp(minimum(x, ZERO)), ONE))
    return where(apply(Op.LT, zero_like(x), x), to_float(x), curved)


def gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate != "tanh":
        raise UnknownOperation(
            operation="gelu", instead='Use torch.nn.functional.gelu(x, approximate="tanh").'
        )
    inner = multiply(
        Const(math.sqrt(2 / math.pi)), add(x, multiply(Const(0.044715), whole_power(x, 3, True)))
    )
    return multiply(multiply(Const(0.5), x), add(ONE, tanh(inner)))


def hardtanh(x: Expr, min_val: Expr = MINUS_ONE, max_val: Expr = ONE) -> Expr:
    return clamp(x, min_val, max_val)


def log1p(x: Expr) -> Expr:
    return log(add(ONE, x))


def expm1(x: Expr) -> Expr:
    return subtract(exp(x), ONE)


def tan(x: Expr) -> Expr:
    return divide(sin(x), cos(x))


def sign(x: Expr) -> Expr:
    x = number(x)
    positive, negative = apply(Op.LT, zero_like(x), x), apply(Op.LT, x, zero_like(x))
    return subtract(_one_or_zero(positive, x), _one_or_zero(negative, x))


def _one_or_zero(condition: Expr, like: Expr) -> Expr:
    return to_float(condition) if like.dtype is DType.FLOAT else to_int(condition)


def comparison(op: Op, swap: bool = False) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: apply(op, b, a) if swap else apply(op, a, b)


def logical(op: Op) -> Callable[..., Expr]:
    """torch.logical_*: any number counts as true unless it is zero."""
    return lambda *args: apply(op, *(to_bool(a) for a in args))


def logical_xor(a: Expr, b: Expr) -> Expr:
    return apply(Op.NE, to_bool(a), to_bool(b))


def kind(x: Expr) -> str:
    """How a message calls the kind of a value."""
    return {DType.BOOL: "a bool", DType.INT: "an int"}.get(x.dtype, "a float")


def only_pairwise(build: Callable[[Expr, Expr], Expr], name: str) -> Callable[..., Expr]:
    """torch.max and torch.min of two values; of one they would reduce a tensor that is not there."""

    def checked(*args: Expr, **options: object) -> Expr:
        if len(args) != 2 or options:
            raise UnknownOperation(
                operation=f"{name} over a dimension",
                instead=f"A score is one number here: use torch.{name}imum(a, b); rows are reduced in an OnlineFunc.",
            )
        return build(*args)

    return checked


def clamp_min(x: Expr, min: Expr) -> Expr:
    return clamp(x, min)


def clamp_max(x: Expr, max: Expr) -> Expr:
    return clamp(x, None, max)


def is_nan(x: Expr) -> Expr:
    return apply(Op.NE, x, x)


def is_infinite(x: Expr) -> Expr:
    return apply(Op.EQ, absolute(x), Const(math.inf))


def same(x: Expr) -> Expr:
    return x


def one_like(x: Expr) -> Const:
    return Const(1.0 if x.dtype is DType.FLOAT else 1)


def full_like(x: Expr, fill_value: Expr) -> Expr:
    return fill_value

"""Rounding and division by truncation, composed of floor; on ints like C's."""

from __future__ import annotations

from attn_engine.errors import UnknownOperation
from attn_engine.frontend.operations import (
    ONE,
    ZERO,
    absolute,
    add,
    apply,
    ceil,
    divide,
    floor,
    floor_divide,
    multiply,
    negate,
    number,
    subtract,
    to_float,
    where,
    zero_like,
)
from attn_engine.ir.expr import Const, Expr
from attn_engine.ir.ops import DType, Op

_HALF = Const(0.5)


def round_half_even(x: Expr, decimals: Expr | None = None) -> Expr:
    """torch.round: the nearest whole number, of two equally near ones the even one."""
    if decimals is not None:
        return _round_to(x, decimals)
    if x.dtype is not DType.FLOAT:
        return number(x)
    lower = floor(x)
    above = subtract(x, lower)  # exact, unlike x + 0.5
    odd = subtract(lower, multiply(Const(2.0), floor(multiply(lower, _HALF))))
    at_tie = where(apply(Op.EQ, above, _HALF), odd, ZERO)
    return add(lower, where(apply(Op.LT, _HALF, above), ONE, at_tie))


def _round_to(x: Expr, decimals: Expr) -> Expr:
    if not isinstance(decimals, Const):
        raise UnknownOperation(
            operation="round with traced decimals", instead="Give decimals as a plain int."
        )
    if decimals.value == 0:
        return round_half_even(x)
    scale = Const(10.0 ** int(decimals.value))
    return divide(round_half_even(multiply(to_float(x), scale)), scale)


def trunc(x: Expr) -> Expr:
    if x.dtype is not DType.FLOAT:
        return number(x)
    return where(apply(Op.LT, x, ZERO), ceil(x), floor(x))


def frac(x: Expr) -> Expr:
    return subtract(x, trunc(x))


def truncating_divide(a: Expr, b: Expr) -> Expr:
    if DType.FLOAT in (a.dtype, b.dtype):
        return trunc(divide(a, b))
    a, b = number(a), number(b)
    size = floor_divide(absolute(a), absolute(b))
    opposite = apply(Op.NE, apply(Op.LT, a, zero_like(a)), apply(Op.LT, b, zero_like(b)))
    return where(opposite, negate(size), size)


def fmod(a: Expr, b: Expr) -> Expr:
    """The remainder with the sign of a."""
    return subtract(number(a), multiply(truncating_divide(a, b), number(b)))


def torch_divide(a: Expr, b: Expr, rounding_mode: str | None = None) -> Expr:
    if rounding_mode not in (None, "floor", "trunc"):
        raise UnknownOperation(
            operation=f"rounding_mode={rounding_mode!r}", instead='Use "floor" or "trunc".'
        )
    if rounding_mode is None:
        return divide(a, b)
    return floor_divide(a, b) if rounding_mode == "floor" else truncating_divide(a, b)

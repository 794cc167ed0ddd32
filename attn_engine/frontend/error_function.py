"""erf from products, quotients and exp: Cody's rational approximations (Mathematics of Computation 23, 1969, 631-637).

Accurate to the last digits of float64; differentiated like any other expression.
"""

from __future__ import annotations

import math

from attn_engine.errors import UnknownOperation
from attn_engine.frontend.operations import (
    ONE,
    ZERO,
    absolute,
    add,
    apply,
    divide,
    exp,
    gelu_tanh,
    maximum,
    minimum,
    multiply,
    negate,
    square,
    subtract,
    to_float,
    where,
)
from attn_engine.ir.expr import Const, Expr
from attn_engine.ir.ops import Op

_BORDER = 0.46875  # below it erf(x) = x * P(x^2) / Q(x^2), above it 1 - exp(-x^2) * P(x) / Q(x)
_LARGEST = 6.0  # erf is 1 from here on, to float64
_NEAR_ABOVE = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
    3.77485237685302021e2, 3.20937758913846947e3,
)  # fmt: skip
_NEAR_BELOW = (
    1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3,
)  # fmt: skip
_FAR_ABOVE = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3,
)  # fmt: skip
_FAR_BELOW = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)  # fmt: skip


def erf(x: Expr) -> Expr:
    x = to_float(x)
    near = maximum(minimum(x, Const(0.5)), Const(-0.5))  # beyond the border, where its kink does not matter
    size = minimum(absolute(x), Const(_LARGEST))
    inside = multiply(near, _quotient(_NEAR_ABOVE, _NEAR_BELOW, square(near)))
    outside = subtract(ONE, multiply(exp(negate(square(size))), _quotient(_FAR_ABOVE, _FAR_BELOW, size)))
    signed = where(apply(Op.LT, x, ZERO), negate(outside), outside)
    return where(apply(Op.LE, absolute(x), Const(_BORDER)), inside, signed)


def erfc(x: Expr) -> Expr:
    return subtract(ONE, erf(x))


def gelu_exact(x: Expr) -> Expr:
    """x times the normal distribution function of x."""
    x = to_float(x)
    return multiply(multiply(Const(0.5), x), add(ONE, erf(multiply(x, Const(math.sqrt(0.5))))))


def gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate not in ("none", "tanh"):
        raise UnknownOperation(operation=f"approximate={approximate!r}", instead='Use "none" or "tanh".')
    return gelu_exact(x) if approximate == "none" else gelu_tanh(x)


def _quotient(above: tuple[float, ...], below: tuple[float, ...], x: Expr) -> Expr:
    return divide(_polynomial(above, x), _polynomial(below, x))


def _polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's scheme, the highest power first."""
    result: Expr = Const(coefficients[0])
    for coefficient in coefficients[1:]:
        result = add(multiply(result, x), Const(coefficient))
    return result

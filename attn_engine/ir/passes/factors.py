"""Expressions as products and sums: what of a weight is the score's, what is the row's, and how it follows the row.

exp(s - m) / l        factors:  exp(s - m) above, l below; without the score: l
exp(s - (m + log l))  the same: a logarithm inside an exponential is a factor
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attn_engine.ir.expr import Call, Const, Expr, call, postorder, substitute
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.autodiff import derivative
from attn_engine.ir.passes.simplify import is_zero, simplify, sum_of

_POWERS = (Op.EXP, Op.EXP2)
ONE = Const(1.0)


@dataclass(frozen=True, slots=True)
class Product:
    """Factors above and below the fraction line."""

    above: tuple[Expr, ...]
    below: tuple[Expr, ...] = ()

    @property
    def expr(self) -> Expr:
        """The product as one expression; 1.0 where there are no factors."""
        top, bottom = _multiplied(self.above), _multiplied(self.below)
        return top if bottom is ONE else top / bottom


def _multiplied(factors: Iterable[Expr]) -> Expr:
    result: Expr = ONE
    for factor in factors:
        result = factor if result is ONE else result * factor
    return result


def touches(e: Expr, nodes: set[Expr]) -> bool:
    """Whether one of the nodes occurs in e."""
    return any(n in nodes for n in postorder(e))


def factors(e: Expr) -> Product:
    """e as a product: through *, /, negation and sums of logarithms inside exponentials."""
    match e:
        case Call(Op.MUL, (a, b)):
            x, y = factors(a), factors(b)
            return Product((*x.above, *y.above), (*x.below, *y.below))
        case Call(Op.DIV, (a, b)):
            x, y = factors(a), factors(b)
            return Product(tuple(f for f in (*x.above, *y.below) if f is not ONE), (*x.below, *y.above))
        case Call(Op.NEG, (a,)):
            x = factors(a)
            return Product((Const(-1.0), *x.above), x.below)
        case Call(Op.EXP, (x,)):
            return _without_logarithms(e, x)
        case Const(1.0):
            return Product(())
        case _:
            return Product((e,))


def _without_logarithms(e: Expr, exponent: Expr) -> Product:
    terms = additive_terms(exponent)
    logs = [
        (sign, t.args[0])
        for sign, t in terms
        if isinstance(t, Call) and t.op is Op.LOG and "kv" not in t.axes
    ]
    if not logs:
        return Product((e,))
    rest = _added(
        [(s, t) for s, t in terms if not (isinstance(t, Call) and t.op is Op.LOG and "kv" not in t.axes)]
    )
    above = [] if rest is None else [call(Op.EXP, rest)]
    return Product((*above, *(x for sign, x in logs if sign > 0)), tuple(x for sign, x in logs if sign < 0))


def is_exponential(factor: Expr) -> bool:
    """Whether a factor is exp or exp2 of something."""
    return isinstance(factor, Call) and factor.op in _POWERS


def split(e: Expr, belongs: Callable[[Expr], bool]) -> tuple[Expr, Product]:
    """e = a * h, with every factor that `belongs` to h in h; a is e itself where none does."""
    product = factors(e)
    h = Product(tuple(filter(belongs, product.above)), tuple(filter(belongs, product.below)))
    if not h.above and not h.below:
        return e, h
    rest = Product(
        tuple(f for f in product.above if not belongs(f)), tuple(f for f in product.below if not belongs(f))
    )
    return rest.expr, h


def additive_terms(e: Expr, sign: int = 1) -> list[tuple[int, Expr]]:
    """(+1 or -1, term): e as a sum; a factor that no key changes is multiplied into the terms."""
    match e:
        case Call(Op.ADD, (a, b)):
            return additive_terms(a, sign) + additive_terms(b, sign)
        case Call(Op.SUB, (a, b)):
            return additive_terms(a, sign) + additive_terms(b, -sign)
        case Call(Op.NEG, (a,)):
            return additive_terms(a, -sign)
        case Call(Op.MUL, (a, b)):
            x, c = (b, a) if "kv" not in a.axes else (a, b)
            terms = additive_terms(x, sign)
            return [(n, t * c) for n, t in terms] if "kv" not in c.axes and len(terms) > 1 else [(sign, e)]
        case Call(Op.DIV, (a, c)):
            terms = additive_terms(a, sign)
            return [(n, t / c) for n, t in terms] if "kv" not in c.axes and len(terms) > 1 else [(sign, e)]
        case _:
            return [(sign, e)]


def _added(terms: Iterable[tuple[int, Expr]]) -> Expr | None:
    total: Expr | None = None
    for sign, term in terms:
        first = term if sign > 0 else -term
        total = first if total is None else total + term if sign > 0 else total - term
    return total


def exponential_ratio(e: Expr, moved: dict[Expr, Expr]) -> Expr | None:
    """e(new) / e(old) where that is visibly free of the score: None, or 1.0 where e does not depend on the nodes.

    moved: old row value -> new one. exp(s - m) gives exp(m - new_m): small numbers stay small.
    """
    product, old = factors(e), set(moved)
    difference: list[tuple[int, Expr]] = []
    base: Op | None = None
    for side, sign in ((product.above, 1), (product.below, -1)):
        for factor in side:
            if not touches(factor, old):
                continue
            if not isinstance(factor, Call) or factor.op not in _POWERS or base not in (None, factor.op):
                return None
            base = factor.op
            terms = [(n * sign, t) for n, t in additive_terms(factor.args[0]) if touches(t, old)]
            if any("kv" in t.axes for _, t in terms):
                return None
            difference += [(n, substitute(t, moved)) for n, t in terms] + [(-n, t) for n, t in terms]
    if base is None:
        return ONE
    total = _added(sorted(difference, key=lambda term: -term[0]))
    assert total is not None
    return call(base, total)


@dataclass(frozen=True, slots=True)
class Slope:
    """d(e)/d(r) = e * relative where `relative` differs from row to row only; else the derivative, key by key."""

    relative: Expr | None
    derivative: Expr


def slope(e: Expr, wrt: Expr) -> Slope:
    """How e follows a row value or a parameter."""
    plain = derivative(e, wrt)
    if is_zero(plain):
        return Slope(Const(0.0), plain)
    relative: Expr = Const(0.0)
    product = factors(e)
    for side, sign in ((product.above, 1), (product.below, -1)):
        for factor in side:
            part = relative_slope(factor, wrt)
            if "kv" in part.axes:
                return Slope(None, plain)
            relative = sum_of(relative, part if sign > 0 or is_zero(part) else simplify(-part))
    return Slope(relative, plain)


def relative_slope(factor: Expr, wrt: Expr) -> Expr:
    """d(log factor)/d(wrt); of an exponential, the exponent's derivative."""
    if isinstance(factor, Call) and factor.op is Op.EXP:
        terms = [(n, derivative(t, wrt)) for n, t in additive_terms(factor.args[0])]
        return _added_slopes(terms)
    step = derivative(factor, wrt)
    return step if is_zero(step) else simplify(step / factor)


def _added_slopes(terms: Iterable[tuple[int, Expr]]) -> Expr:
    total: Expr = Const(0.0)
    for sign, term in terms:
        if not is_zero(term):
            total = sum_of(total, term if sign > 0 else simplify(-term))
    return simplify(total)


def exponent_slope(e: Expr, wrt: Expr) -> Expr | None:
    """d(log e)/d(wrt) where every factor that depends on wrt is an exponential; None otherwise."""
    product, total = factors(e), Const(0.0)
    result: Expr = total
    for side, sign in ((product.above, 1), (product.below, -1)):
        for factor in side:
            if not touches(factor, {wrt}):
                continue
            if not isinstance(factor, Call) or factor.op is not Op.EXP:
                return None
            part = relative_slope(factor, wrt)
            result = sum_of(result, part if sign > 0 else simplify(-part))
    return result

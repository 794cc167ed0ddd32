"""Questions about row functions that sympy answers, and the numeric trial that guards each answer.

sympy is imported when a question is first asked: no built-in normaliser asks one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Call, Const, Expr, Full, Load, Reduce, Var, call, postorder, substitute, where
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.program import LOGIT

_POINTS = 12
_TOLERANCE = 1e-9


class NotSymbolic(Exception):
    """An expression that sympy has no words for."""


def random_points(*roots: Expr, count: int = _POINTS) -> list[dict[Expr, Number]]:
    """Values of the variables and reads of some expressions, the same on every call."""
    source = random.Random(20)
    inputs = [n for n in postorder(*roots) if isinstance(n, Var | Load)]
    return [
        {n: source.randrange(1, 9) if n.dtype is DType.INT else source.uniform(0.2, 2.5) for n in inputs}
        for _ in range(count)
    ]


def agree(a: Expr, b: Expr) -> bool:
    """Whether two expressions have equal values at random points."""
    for point in random_points(a, b):
        try:
            x, y = evaluate(a, point), evaluate(b, point)
        except (ArithmeticError, ValueError):
            return False
        if not abs(x - y) <= _TOLERANCE * (1 + abs(x) + abs(y)):
            return False
    return True


def is_nothing(e: Expr) -> bool:
    """Whether e is zero whatever its variables are: numbers may deny it at once, sympy has to prove it."""
    if not agree(e, Const(0.0)):
        return False
    try:
        symbols = Symbols()
        return bool(_sympy().simplify(symbols.to_sympy(e)) == 0)
    except NotSymbolic:
        return False


def ratio_free_of_score(e: Expr, moved: Mapping[Expr, Expr]) -> Expr | None:
    """e(new) / e(old) for moved row values, where sympy proves that it does not depend on the score; None otherwise."""
    new = substitute(e, dict(moved))
    ratio = new / e
    other = Var("another_score", DType.FLOAT, LOGIT.axes)
    if not agree(ratio, substitute(ratio, {LOGIT: other})):
        return None
    try:
        symbols = Symbols()
        sympy = _sympy()
        found = sympy.simplify(sympy.powsimp(symbols.to_sympy(new) / symbols.to_sympy(e), force=True))
        if found.has(symbols.to_sympy(LOGIT)):
            return None
        result = symbols.to_ir(found)
    except NotSymbolic:
        return None
    return result if agree(result, ratio) else None


@lru_cache(maxsize=512)
def tidy(e: Expr) -> Expr:
    """A row value in sympy's simplest form, where that is shorter and has the same values; e itself otherwise."""
    if any(isinstance(n, Call) and n.op is Op.WHERE for n in postorder(e)):
        return e
    try:
        symbols = Symbols(rows_closed=True)
        found = symbols.to_ir(_sympy().simplify(symbols.to_sympy(e)))
    except NotSymbolic:
        return e
    shorter = len(postorder(found)) < len(postorder(e))
    return found if shorter and agree(found, e) else e


@lru_cache(maxsize=512)
def expanded(e: Expr) -> tuple[Expr, ...]:
    """e as a sum of products, logarithms and powers taken apart; (e,) where nothing comes of it.

    p * log(p) with p = exp(s - m) / l becomes s exp(s - m) / l, - m exp(s - m) / l and - log(l) exp(s - m) / l.
    """
    try:
        symbols, sympy = Symbols(rows_closed=True), _sympy()
        whole = symbols.to_sympy(e)
        opened = sympy.expand(
            sympy.expand_log(whole, force=True), power_exp=False, power_base=False, log=False
        )
        terms = tuple(symbols.to_ir(t) for t in sympy.Add.make_args(opened))
    except NotSymbolic:
        return (e,)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return terms if len(terms) > 1 and agree(total, e) else (e,)


@lru_cache(maxsize=1)
def _sympy() -> Any:
    import sympy  # pyright: ignore[reportMissingTypeStubs]

    return sympy


class Symbols:
    """Translates expressions to sympy's and back; what sympy need not look into is one symbol.

    rows_closed: exponentials and logarithms of row values are such symbols. sympy would multiply a fraction with
    exp(sink - m) in it by exp(m), which overflows.
    """

    def __init__(self, rows_closed: bool = False) -> None:
        self._rows_closed = rows_closed
        self._symbols: dict[Expr, Any] = {}
        self._nodes: dict[Any, Expr] = {}

    def to_sympy(self, e: Expr) -> Any:
        """The same as a sympy expression. Raises NotSymbolic."""
        done: dict[Expr, Any] = {}
        for node in postorder(e):
            done[node] = self._translated(node, done)
        return done[e]

    def _translated(self, node: Expr, done: Mapping[Expr, Any]) -> Any:
        match node:
            case Const(bool() as value):
                return _sympy().true if value else _sympy().false
            case Const(value):
                return _number(value)
            case Full(value):
                return _number(value)
            case Call(Op.EXP | Op.EXP2 | Op.LOG) if self._rows_closed and "kv" not in node.axes:
                return self._symbol(node)
            case Call(op, args) if op in _TO_SYMPY:
                return _TO_SYMPY[op](_sympy(), [done[a] for a in args])
            case Reduce():
                raise NotSymbolic(node)
            case _:
                return self._symbol(node)

    def _symbol(self, node: Expr) -> Any:
        """A variable, a read, or an operation like floor: real, and nothing more is known of it."""
        if isinstance(node, Call) and "kv" in node.axes:
            raise NotSymbolic(node)
        if node not in self._symbols:
            symbol = _sympy().Symbol(f"x{len(self._symbols)}", real=True)
            self._symbols[node], self._nodes[symbol] = symbol, node
        return self._symbols[node]

    def to_ir(self, x: Any) -> Expr:
        """Back again. Raises NotSymbolic."""
        sympy = _sympy()
        if x in self._nodes:
            return self._nodes[x]
        if x.is_Number or x.is_NumberSymbol:
            return Const(float(x))
        if x.is_Add:
            return self._sum(x.args)
        if x.is_Mul:
            return self._product(x)
        if isinstance(x, sympy.exp):
            return call(Op.EXP, self.to_ir(x.exp))
        if x.is_Pow:
            return self._power(*x.as_base_exp())
        if isinstance(x, sympy.Piecewise):
            return self._piecewise(x)
        return self._function(x)

    def _function(self, x: Any) -> Expr:
        for name, op in _FUNCTIONS.items():
            if isinstance(x, getattr(_sympy(), name)):
                first, *others = (self.to_ir(a) for a in x.args)
                for other in others:
                    first = call(op, first, other)
                return first if others or op in (Op.MAX, Op.MIN) else call(op, first)
        raise NotSymbolic(x)

    def _sum(self, args: Any) -> Expr:
        """Positive terms first, so that no sum starts with a minus sign."""
        signed = [(bool(a.could_extract_minus_sign()), a) for a in args]
        signed.sort(key=lambda item: item[0])
        total: Expr | None = None
        for negative, a in signed:
            term = self.to_ir(-a if negative else a)
            total = (
                (-term if negative else term) if total is None else total - term if negative else total + term
            )
        assert total is not None
        return total

    def _product(self, x: Any) -> Expr:
        if x.could_extract_minus_sign():
            return -self.to_ir(-x)
        top, bottom = x.as_numer_denom()
        if bottom != 1:
            return self.to_ir(top) / self.to_ir(bottom)
        result: Expr | None = None
        for a in x.args:
            factor = self.to_ir(a)
            result = factor if result is None else result * factor
        assert result is not None
        return result

    def _power(self, base: Any, exponent: Any) -> Expr:
        if exponent.is_Integer and 0 < abs(int(exponent)) <= 8:
            x = self.to_ir(base)
            power = x
            for _ in range(abs(int(exponent)) - 1):
                power = power * x
            return power if exponent > 0 else 1.0 / power
        if exponent == _sympy().Rational(1, 2):
            return call(Op.SQRT, self.to_ir(base))
        if exponent == -_sympy().Rational(1, 2):
            return 1.0 / call(Op.SQRT, self.to_ir(base))
        if base == 2:
            return call(Op.EXP2, self.to_ir(exponent))
        raise NotSymbolic(base)

    def _piecewise(self, x: Any) -> Expr:
        *cases, (last, always) = x.args
        if always != _sympy().true:
            raise NotSymbolic(x)
        result = self.to_ir(last)
        for value, condition in reversed(cases):
            result = where(self._condition(condition), self.to_ir(value), result)
        return result

    def _condition(self, x: Any) -> Expr:
        sympy = _sympy()
        if isinstance(x, sympy.core.relational.Relational):
            a, b = (self.to_ir(side) for side in x.args)
            return {"<": a < b, "<=": a <= b, ">": b < a, ">=": b <= a, "==": a.equals(b)}[x.rel_op]
        raise NotSymbolic(x)


def _number(value: Number) -> Any:
    """An exact number: 0.5 as a half, 0.1 as the fraction that its bits are."""
    sympy = _sympy()
    if value in (float("inf"), float("-inf")) or value != value:
        raise NotSymbolic(value)
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Rational(value)


_FUNCTIONS = {
    "log": Op.LOG, "Abs": Op.ABS, "tanh": Op.TANH, "sin": Op.SIN, "cos": Op.COS, "Max": Op.MAX, "Min": Op.MIN,
}  # fmt: skip
_TO_SYMPY: dict[Op, Callable[[Any, Sequence[Any]], Any]] = {
    Op.ADD: lambda _, x: x[0] + x[1],
    Op.SUB: lambda _, x: x[0] - x[1],
    Op.MUL: lambda _, x: x[0] * x[1],
    Op.DIV: lambda _, x: x[0] / x[1],
    Op.NEG: lambda _, x: -x[0],
    Op.ABS: lambda sympy, x: sympy.Abs(x[0]),
    Op.MAX: lambda sympy, x: sympy.Max(x[0], x[1]),
    Op.MIN: lambda sympy, x: sympy.Min(x[0], x[1]),
    Op.LE: lambda sympy, x: sympy.Le(x[0], x[1]),
    Op.LT: lambda sympy, x: sympy.Lt(x[0], x[1]),
    Op.EQ: lambda sympy, x: sympy.Eq(x[0], x[1]),
    Op.NE: lambda sympy, x: sympy.Ne(x[0], x[1]),
    Op.AND: lambda sympy, x: sympy.And(x[0], x[1]),
    Op.OR: lambda sympy, x: sympy.Or(x[0], x[1]),
    Op.NOT: lambda sympy, x: sympy.Not(x[0]),
    Op.WHERE: lambda sympy, x: sympy.Piecewise((x[1], x[0]), (x[2], True)),
    Op.TO_FLOAT: lambda _, x: x[0],
    Op.EXP: lambda sympy, x: sympy.exp(x[0]),
    Op.EXP2: lambda sympy, x: 2 ** x[0],
    Op.LOG: lambda sympy, x: sympy.log(x[0]),
    Op.LOG2: lambda sympy, x: sympy.log(x[0]) / sympy.log(2),
    Op.TANH: lambda sympy, x: sympy.tanh(x[0]),
    Op.SIGMOID: lambda sympy, x: 1 / (1 + sympy.exp(-x[0])),
    Op.SQRT: lambda sympy, x: sympy.sqrt(x[0]),
    Op.RSQRT: lambda sympy, x: 1 / sympy.sqrt(x[0]),
    Op.SIN: lambda sympy, x: sympy.sin(x[0]),
    Op.COS: lambda sympy, x: sympy.cos(x[0]),
}

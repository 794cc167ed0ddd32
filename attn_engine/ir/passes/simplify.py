"""Algebraic simplification of expressions: one named function per rule.

Every rule keeps the value, the kind and the axes of what it rewrites, also for infinities and NaN.
"""

from __future__ import annotations

from collections.abc import Callable

from attn_engine.ir.expr import Call, Const, Expr, call, transform
from attn_engine.ir.ops import INFO, DType, Op

Rule = Callable[[Expr], Expr | None]


def fold_constants(e: Expr) -> Expr | None:
    """2 + 3 -> 5"""
    match e:
        case Call(op, args) if all(isinstance(a, Const) for a in args):
            if op in (Op.FLOORDIV, Op.MOD) and args[1] is Const(0):
                return None
            value = INFO[op].evaluate(*(a.value for a in args if isinstance(a, Const)))
            return Const(float(value) if e.dtype is DType.FLOAT else value)
        case _:
            return None


def drop_identity(e: Expr) -> Expr | None:
    """x + 0, x - 0, x * 1, x / 1 -> x"""
    match e:
        case Call(Op.ADD | Op.SUB, (x, Const(0 | 0.0))) | Call(Op.ADD, (Const(0 | 0.0), x)):
            return x
        case Call(Op.MUL | Op.DIV | Op.FLOORDIV, (x, Const(1 | 1.0))) | Call(Op.MUL, (Const(1 | 1.0), x)):
            return x
        case _:
            return None


def drop_logical(e: Expr) -> Expr | None:
    """x & True -> x, x | False -> x, x & x -> x, ~~x -> x"""
    match e:
        case Call(Op.AND, (x, Const(True))) | Call(Op.AND, (Const(True), x)):
            return x
        case Call(Op.OR, (x, Const(False))) | Call(Op.OR, (Const(False), x)):
            return x
        case Call(Op.AND | Op.OR | Op.MAX | Op.MIN, (x, y)) if x is y:
            return x
        case Call(Op.NOT, (Call(Op.NOT, (x,)),)) | Call(Op.NEG, (Call(Op.NEG, (x,)),)):
            return x
        case _:
            return None


def decide_where(e: Expr) -> Expr | None:
    """where(True, a, b) -> a, where(c, a, a) -> a"""
    match e:
        case Call(Op.WHERE, (Const(bool() as c), a, b)):
            return a if c else b
        case Call(Op.WHERE, (_, a, b)) if a is b:
            return a
        case _:
            return None


def integer_zero(e: Expr) -> Expr | None:
    """i - i -> 0, i * 0 -> 0 for integers (a float may be infinite)"""
    match e:
        case Call(Op.SUB, (x, y)) if x is y and e.dtype is DType.INT:
            return Const(0)
        case Call(Op.MUL, (_, Const(0))) | Call(Op.MUL, (Const(0), _)) if e.dtype is DType.INT:
            return Const(0)
        case _:
            return None


def gather_offsets(e: Expr) -> Expr | None:
    """(i + 2) - 3 -> i - 1, i + -2 -> i - 2, for integers"""
    if e.dtype is not DType.INT:
        return None
    match e:
        case Call(
            Op.ADD | Op.SUB as outer,
            (Call(Op.ADD | Op.SUB as inner, (x, Const(int() as a))), Const(int() as b)),
        ):
            total = (a if inner is Op.ADD else -a) + (b if outer is Op.ADD else -b)
            return x if total == 0 else x + total if total > 0 else x - -total
        case Call(Op.ADD, (x, Const(int() as a))) if a < 0:
            return x - -a
        case Call(Op.SUB, (x, Const(int() as a))) if a < 0:
            return x + -a
        case Call(Op.SUB, (Call(Op.ADD, (x, y)), z)) if y is z:
            return x
        case _:
            return None


def subtract_negated(e: Expr) -> Expr | None:
    """a + -b -> a - b, a - -b -> a + b"""
    match e:
        case Call(Op.ADD, (a, Call(Op.NEG, (b,)))):
            return a - b
        case Call(Op.SUB, (a, Call(Op.NEG, (b,)))):
            return a + b
        case _:
            return None


def negate_sum(e: Expr) -> Expr | None:
    """-(a - b) -> b - a, -(-a + b) -> a - b, -a + b -> b - a"""
    match e:
        case Call(Op.NEG, (Call(Op.SUB, (a, b)),)):
            return b - a
        case Call(Op.NEG, (Call(Op.ADD, (Call(Op.NEG, (a,)), b)),)):
            return a - b
        case Call(Op.ADD, (Call(Op.NEG, (a,)), b)):
            return b - a
        case _:
            return None


def multiply_by_one_minus(e: Expr) -> Expr | None:
    """-1 * x -> -x"""
    match e:
        case Call(Op.MUL, (Const(-1 | -1.0), x)) | Call(Op.MUL, (x, Const(-1 | -1.0))):
            return -x
        case _:
            return None


RULES: tuple[Rule, ...] = (
    fold_constants,
    drop_identity,
    drop_logical,
    decide_where,
    integer_zero,
    gather_offsets,
    subtract_negated,
    negate_sum,
    multiply_by_one_minus,
)


def simplify(root: Expr) -> Expr:
    """Rewrite bottom-up with RULES until none applies.

    >>> from attn_engine.ir.program import Q_IDX
    >>> simplify((Q_IDX + 2) - 3) is Q_IDX - 1
    True
    """

    def change(node: Expr) -> Expr:
        while (better := _first_match(node)) is not None:
            node = better
        return node

    return transform(root, change)


def _first_match(node: Expr) -> Expr | None:
    for rule in RULES:
        better = rule(node)
        if (
            better is not None
            and better is not node
            and better.dtype is node.dtype
            and better.axes == node.axes
        ):
            return better
    return None


def is_zero(e: Expr) -> bool:
    return isinstance(e, Const) and not isinstance(e.value, bool) and e.value == 0


def sum_of(a: Expr, b: Expr) -> Expr:
    """a + b, without adding zeros."""
    return b if is_zero(a) else a if is_zero(b) else call(Op.ADD, a, b)

"""Reverse-mode differentiation of an expression, as more expressions.

Nodes are visited in reverse topological order, so a shared node collects every contribution before it passes its
gradient on: it is counted once per use, never twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from attn_engine.ir.expr import Call, Const, Expr, call, postorder, where
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.simplify import simplify, sum_of

# For y = op(*args) and dy = d(loss)/dy: the contribution to each argument, None where there is none.
Gradient = Callable[[Expr, tuple[Expr, ...], Expr], tuple[Expr | None, ...]]

ZERO = Const(0.0)


def _split_at(first_wins: Expr, tie: Expr, dy: Expr) -> tuple[Expr, Expr]:
    """max and min: the whole gradient to the winner, half to each at a tie (as torch.maximum)."""
    half = dy * 0.5
    return where(tie, half, where(first_wins, dy, ZERO)), where(tie, half, where(first_wins, ZERO, dy))


def _sign(x: Expr) -> Expr:
    return where(x > 0.0, 1.0, where(x < 0.0, -1.0, 0.0))


GRADIENTS: dict[Op, Gradient] = {
    Op.ADD: lambda y, a, dy: (dy, dy),
    Op.SUB: lambda y, a, dy: (dy, -dy),
    Op.MUL: lambda y, a, dy: (dy * a[1], dy * a[0]),
    Op.DIV: lambda y, a, dy: (dy / a[1], -(dy * y) / a[1]),
    Op.NEG: lambda y, a, dy: (-dy,),
    Op.ABS: lambda y, a, dy: (dy * _sign(a[0]),),
    Op.MAX: lambda y, a, dy: _split_at(a[0] > a[1], a[0].equals(a[1]), dy),
    Op.MIN: lambda y, a, dy: _split_at(a[0] < a[1], a[0].equals(a[1]), dy),
    Op.WHERE: lambda y, a, dy: (None, where(a[0], dy, ZERO), where(a[0], ZERO, dy)),
    Op.TO_FLOAT: lambda y, a, dy: (dy,),
    Op.EXP: lambda y, a, dy: (dy * y,),
    Op.EXP2: lambda y, a, dy: (dy * (y * math.log(2)),),
    Op.LOG: lambda y, a, dy: (dy / a[0],),
    Op.LOG2: lambda y, a, dy: (dy / (a[0] * math.log(2)),),
    Op.TANH: lambda y, a, dy: (dy * (1.0 - y * y),),
    Op.SIGMOID: lambda y, a, dy: (dy * (y * (1.0 - y)),),
    Op.SQRT: lambda y, a, dy: (dy * 0.5 / y,),
    Op.RSQRT: lambda y, a, dy: (dy * -0.5 * y / a[0],),
    Op.SIN: lambda y, a, dy: (dy * call(Op.COS, a[0]),),
    Op.COS: lambda y, a, dy: (-(dy * call(Op.SIN, a[0])),),
}
# Integers, comparisons and steps: constant wherever they are differentiable at all.
NOT_DIFFERENTIABLE = frozenset(
    {Op.FLOORDIV, Op.MOD, Op.LE, Op.LT, Op.EQ, Op.NE, Op.AND, Op.OR, Op.NOT, Op.TO_INT, Op.FLOOR, Op.BIT}
)


def gradients(result: Expr, seed: Expr, wrt: Sequence[Expr]) -> list[Expr]:
    """d(loss)/d(w) for each w, where d(loss)/d(result) = seed; Const(0.0) where result does not depend on w.

    `wrt` are nodes of the graph (variables, loads); each is treated as an independent input.

    >>> from attn_engine.ir.program import SCORE
    >>> gradients(SCORE * SCORE, Const(1.0), [SCORE])[0] is SCORE + SCORE
    True
    """
    targets = set(wrt)
    collected: dict[Expr, Expr] = {result: seed}
    order = postorder(result)
    reaches = _reaching(order, targets)
    for node in reversed(order):
        dy = collected.get(node)
        if dy is None or not isinstance(node, Call) or node.op in NOT_DIFFERENTIABLE or node in targets:
            continue
        for arg, d in zip(node.args, GRADIENTS[node.op](node, node.args, dy), strict=True):
            if d is not None and arg in reaches and arg.dtype is DType.FLOAT:
                collected[arg] = sum_of(collected.get(arg, ZERO), simplify(d))
    return [simplify(collected.get(w, ZERO)) if w in reaches else ZERO for w in wrt]


def _reaching(order: list[Expr], targets: set[Expr]) -> set[Expr]:
    """Nodes that depend on a target: gradients of all others are never needed."""
    reaches: set[Expr] = set()
    for node in order:
        if node in targets or any(o in reaches for o in node.operands):
            reaches.add(node)
    return reaches


def derivative(result: Expr, wrt: Expr) -> Expr:
    """d(result)/d(wrt)."""
    (gradient,) = gradients(result, Const(1.0), [wrt])
    return gradient

"""A normaliser's methods as one row function: its update run once, the whole row as one tile, then its epilogue."""

from __future__ import annotations

import math

from attn_engine.ir.expr import Call, Const, Expr, Reduce, postorder, substitute, transform
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.autodiff import gradients
from attn_engine.ir.passes.factors import touches
from attn_engine.ir.passes.row_form import NotDerivable
from attn_engine.ir.passes.simplify import is_zero, simplify
from attn_engine.ir.passes.symbolic import agree
from attn_engine.ir.program import OUT, RowState


def one_tile(
    states: tuple[RowState, ...],
    weights: Expr,
    new_states: tuple[Expr, ...],
    output: Expr,
    saved: tuple[tuple[str, Expr], ...],
) -> tuple[Expr, tuple[tuple[str, Expr], ...], dict[RowState, Expr]]:
    """The weights (q, kv), the saved rows and the final states in terms of the scores alone, with `Reduce` nodes.

    Raises NotDerivable where the epilogue is not the output times a row value.
    """
    initial: dict[Expr, Expr] = {s.var: Const(s.initial) for s in states}
    last = {s: at_start(substitute(new, initial)) for s, new in zip(states, new_states, strict=True)}
    final: dict[Expr, Expr] = {s.var: e for s, e in last.items()}
    factor = at_start(substitute(_epilogue_factor(output), final))
    tile = at_start(substitute(weights, initial))
    rows = tuple((name, at_start(substitute(e, final))) for name, e in saved)
    return simplify(tile * factor), rows, last


def _epilogue_factor(output: Expr) -> Expr:
    """h in output = OUT * h. Raises NotDerivable where the epilogue is anything else."""
    (slope,) = gradients(output, Const(1.0), (OUT,))
    if touches(slope, {OUT}) or "kv" in slope.axes or not agree(output, OUT * slope):
        raise NotDerivable("the epilogue is not the output times a row value")
    return slope


def at_start(e: Expr) -> Expr:
    """e simplified where states are still infinite or zero; reductions are finite numbers, as in any row with keys.

    >>> from attn_engine.ir.expr import Var, call
    >>> m = Var("m", DType.FLOAT, ("q",))
    >>> at_start(call(Op.MAX, Const(-math.inf), m)) is m
    True
    """
    return transform(e, lambda node: _folded(simplify(node)))


def _folded(e: Expr) -> Expr:  # noqa: C901  one line per rule
    match e:
        case Call(Op.MAX, (Const(value), x)) | Call(Op.MAX, (x, Const(value))) if value == -math.inf:
            return x
        case Call(Op.MIN, (Const(value), x)) | Call(Op.MIN, (x, Const(value))) if value == math.inf:
            return x
        case Call(Op.ADD, (Const(value), x)) | Call(Op.ADD, (x, Const(value))) if _infinite(value):
            return Const(value)
        case Call(Op.SUB, (Const(value), _)) if _infinite(value):
            return Const(value)
        case Call(Op.SUB, (_, Const(value))) if _infinite(value):
            return Const(-value)
        case Call(Op.MUL, (a, b)) if e.dtype is DType.FLOAT and (is_zero(a) or is_zero(b)):
            return Const(0.0)
        case Call(Op.DIV, (a, _)) if is_zero(a):
            return Const(0.0)
        case Call(Op.EQ, (Const(value), _)) | Call(Op.EQ, (_, Const(value))) if _infinite(value):
            return Const(False)
        case Call(Op.NE, (Const(value), _)) | Call(Op.NE, (_, Const(value))) if _infinite(value):
            return Const(True)
        case Call(Op.LT | Op.LE, (Const(value), _)) if _infinite(value):
            return Const(value < 0)
        case Call(Op.LT | Op.LE, (_, Const(value))) if _infinite(value):
            return Const(value > 0)
        case _:
            return simplify(e)


def _infinite(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)


def reductions_of(*roots: Expr) -> list[Reduce]:
    """Every reduction, inner ones first."""
    return [n for n in postorder(*roots) if isinstance(n, Reduce)]

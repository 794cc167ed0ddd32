"""Gradients of a token's functions, whose rows may be reduced inside: L2 norms, softmax feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from attn_engine.ir.expr import Call, Const, Expr, Full, Reduce, postorder, where
from attn_engine.ir.ops import DType
from attn_engine.ir.passes.autodiff import GRADIENTS, NOT_DIFFERENTIABLE
from attn_engine.ir.passes.simplify import simplify, sum_of

ROW_AXES = ("d", "dv")


def row_gradients(results: Sequence[tuple[Expr, Expr]], wrt: Sequence[Expr]) -> list[Expr | None]:
    """d(loss)/d(w) for each w, where (result, d(loss)/d(result)) are given; None where nothing depends on w.

    A value that a row of numbers is computed from gets the sum over the row. `wrt` are variables and loads.
    """
    targets, zero = set(wrt), Const(0.0)
    order = postorder(*(result for result, _ in results))
    reaches: set[Expr] = set()
    for node in order:
        if node in targets or any(o in reaches for o in node.operands):
            reaches.add(node)
    collected: dict[Expr, Expr] = {}
    for result, seed in results:
        collected[result] = sum_of(collected.get(result, zero), fitted(seed, result, result))
    for node in reversed(order):
        dy = collected.get(node)
        if dy is None or node in targets:
            continue
        for arg, d in _contributions(node, dy):
            if arg in reaches and arg.dtype is DType.FLOAT:
                collected[arg] = sum_of(collected.get(arg, zero), simplify(fitted(d, node, arg)))
    return [simplify(collected[w]) if w in reaches and w in collected else None for w in wrt]


def _contributions(node: Expr, dy: Expr) -> list[tuple[Expr, Expr]]:
    match node:
        case Call(op, args) if op not in NOT_DIFFERENTIABLE:
            pairs = zip(args, GRADIENTS[op](node, args, dy), strict=True)
            return [(a, d) for a, d in pairs if d is not None]
        case Reduce("sum", x, _):
            return [(x, dy)]
        case Reduce(_, x, axis):  # shared evenly among equal extrema
            among = where(x.equals(node), 1.0, 0.0)
            return [(x, dy * among / Reduce("sum", among, axis))]
        case _:
            return []


def fitted(d: Expr, node: Expr, arg: Expr) -> Expr:
    """A contribution to `arg` from an elementwise `node`: summed over the axis of a row that only `node` has."""
    for axis in ROW_AXES:
        if axis in node.axes and axis not in arg.axes:
            spread = d if axis in d.axes else d * Full(1.0, (axis,))
            d = Reduce("sum", spread, axis)
    return d

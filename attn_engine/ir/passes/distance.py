"""Whether an index reads two positions only through how far apart they are: what is summed along diagonals."""

from __future__ import annotations

from attn_engine.ir.expr import Call, Const, Expr, Var, call, rebuild
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import KV_IDX, Q_IDX

# No name that a user can give: a captured number may be called "distance".
DISTANCE = Var("q_idx - kv_idx", DType.INT)


def by_distance(index: Expr) -> Expr | None:
    """`index` as a function of DISTANCE and of what spans no axis; None where it depends on the positions otherwise.

    >>> by_distance(call(Op.MIN, Q_IDX - KV_IDX + 3, 9)) is simplify(call(Op.MIN, DISTANCE + 3, 9))
    True
    >>> by_distance(Q_IDX + KV_IDX) is None
    True
    """
    if not index.axes:
        return index
    form = _linear(index)
    if form is not None:
        q_factor, kv_factor, rest = form
        return simplify(DISTANCE * q_factor + rest) if q_factor == -kv_factor else None
    if not index.operands:
        return None
    operands = [by_distance(o) for o in index.operands]
    found = tuple(o for o in operands if o is not None)
    return simplify(rebuild(index, found)) if len(found) == len(operands) else None


def _linear(e: Expr) -> tuple[int, int, Expr] | None:
    """(a, b, rest) where e = a * q_idx + b * kv_idx + rest and the rest spans no axis."""
    if e is Q_IDX:
        return 1, 0, Const(0)
    if e is KV_IDX:
        return 0, 1, Const(0)
    if e.dtype is not DType.INT:
        return None
    if not e.axes:
        return 0, 0, e
    match e:
        case Call(Op.ADD | Op.SUB as op, (a, b)):
            x, y = _linear(a), _linear(b)
            if x is None or y is None:
                return None
            sign = 1 if op is Op.ADD else -1
            return x[0] + sign * y[0], x[1] + sign * y[1], call(op, x[2], y[2])
        case Call(Op.NEG, (a,)):
            return _scaled(a, -1)
        case Call(Op.MUL, (a, Const(int() as c))) | Call(Op.MUL, (Const(int() as c), a)):
            return _scaled(a, c)
        case _:
            return None


def _scaled(e: Expr, factor: int) -> tuple[int, int, Expr] | None:
    x = _linear(e)
    return None if x is None else (x[0] * factor, x[1] * factor, x[2] * factor)

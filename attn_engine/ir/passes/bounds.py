"""The exact range of an index expression that is linear in the positions, given the sizes of a call."""

from __future__ import annotations

from collections.abc import Mapping

from attn_engine.ir.expr import Call, Const, Expr, Var
from attn_engine.ir.ops import Number, Op

Bounds = tuple[int, int]
_POSITIONS = {"batch": "batches", "head": "heads", "q_idx": "q_len", "kv_idx": "kv_len"}


def index_bounds(index: Expr, sizes: Mapping[str, int], scalars: Mapping[str, Number]) -> Bounds | None:
    """(lowest, highest) value over all positions; None where it is not linear in them. lowest > highest: no position.

    >>> from attn_engine.ir.program import KV_IDX, Q_IDX
    >>> index_bounds(Q_IDX - KV_IDX + 3, {"q_len": 4, "kv_len": 4}, {})
    (0, 6)
    """
    form = _linear(index, scalars)
    if form is None:
        return None
    constant, coefficients = form
    low = high = constant
    for name, factor in coefficients.items():
        last = sizes[_POSITIONS[name]] - 1
        if last < 0:
            return (0, -1)
        low, high = low + min(0, factor * last), high + max(0, factor * last)
    return low, high


def _linear(e: Expr, scalars: Mapping[str, Number]) -> tuple[int, dict[str, int]] | None:
    match e:
        case Const(int() as value):
            return int(value), {}
        case Var(name) if name in _POSITIONS:
            return 0, {name: 1}
        case Var(name) if isinstance(scalars.get(name), int):
            return int(scalars[name]), {}
        case Call(Op.ADD | Op.SUB as op, (a, b)):
            x, y = _linear(a, scalars), _linear(b, scalars)
            return None if x is None or y is None else _plus(x, y, 1 if op is Op.ADD else -1)
        case Call(Op.NEG, (a,)):
            x = _linear(a, scalars)
            return None if x is None else _plus((0, {}), x, -1)
        case Call(Op.MUL, (a, b)):
            x, y = _linear(a, scalars), _linear(b, scalars)
            if x is None or y is None or (x[1] and y[1]):
                return None
            x, y = (x, y) if not y[1] else (y, x)
            return _plus((0, {}), x, y[0])
        case _:
            return None


def _plus(
    x: tuple[int, dict[str, int]], y: tuple[int, dict[str, int]], factor: int
) -> tuple[int, dict[str, int]]:
    """x + factor * y."""
    coefficients = dict(x[1])
    for name, c in y[1].items():
        coefficients[name] = coefficients.get(name, 0) + factor * c
    return x[0] + factor * y[0], {n: c for n, c in coefficients.items() if c}

"""Conditions on a pair of tiles as ranges: for one tile of queries, from which tile of keys to which do they hold?

A comparison bounds the tiles of keys where it can be written as  f(query tile) <= g(key tile)  and g never decreases
(or never increases) from tile to tile. Whether it does is seen when its values are there: positions always do, the
document ids of a packed sequence do because they are sorted. Then a search finds the bound of every query tile, and
`&`, `|` and `~` of comparisons are intersections, unions and complements of ranges.

    kv_start <= q_last                              q: -q_last, kv: -kv_start
    min_q document <= max_kv document               as it stands; sorted ids make a range of it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attn_engine.ir.expr import Call, Const, Expr, Reduce, Var, call, where
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.simplify import simplify

SIDES = {"q_start": "q", "q_last": "q", "kv_start": "kv", "kv_last": "kv"}
_ZERO = Const(0)


@dataclass(frozen=True, slots=True)
class Gate:
    """Every key tile where a condition on the query tile holds, none where not."""

    condition: Expr


@dataclass(frozen=True, slots=True)
class Threshold:
    """The key tiles with q <= kv (q < kv where strict); with kv <= q where not kv_larger. Neither side is NaN."""

    q: Expr
    kv: Expr
    strict: bool
    kv_larger: bool = True


@dataclass(frozen=True, slots=True)
class Both:
    parts: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Either:
    parts: tuple[Formula, ...]


Formula = Gate | Threshold | Both | Either


def range_formula(condition: Expr) -> Formula | None:
    """A `TileClass` condition in terms of ranges; None where a part of it compares what cannot be told apart."""
    return _formula(condition, negated=False)


def leaves(formula: Formula) -> tuple[Expr, ...]:
    """The expressions whose values the ranges are found from."""
    match formula:
        case Gate(condition):
            return (condition,)
        case Threshold(q, kv):
            return (q, kv)
        case Both(parts) | Either(parts):
            return tuple(dict.fromkeys(e for part in parts for e in leaves(part)))


@lru_cache(maxsize=4096)
def sides(e: Expr) -> frozenset[str]:
    """Which of the two tiles a value depends on: "q", "kv". What is reduced over a tile depends on that tile only."""
    match e:
        case Reduce(_, _, axis):
            return frozenset((axis,))
        case Var(name) if not e.axes and name in SIDES:
            return frozenset((SIDES[name],))
        case _:
            return frozenset(side for operand in e.operands for side in sides(operand))


def _formula(e: Expr, *, negated: bool) -> Formula | None:
    match e:
        case Call(Op.NOT, (x,)):
            return _formula(x, negated=not negated)
        case Call(Op.AND | Op.OR as op, args):
            parts = tuple(_formula(a, negated=negated) for a in args)
            known = tuple(p for p in parts if p is not None)
            if len(known) < len(parts):
                return None
            return Both(known) if (op is Op.AND) is not negated else Either(known)
        case _ if "kv" not in sides(e):
            return Gate(simplify(~e) if negated else e)
        case Call(Op.LE | Op.LT as op, (a, b)) if DType.BOOL not in (a.dtype, b.dtype):
            if negated:  # with no NaN about, the opposite comparison
                return _comparison(b, a, strict=op is Op.LE)
            return _comparison(a, b, strict=op is Op.LT)
        case _ if sides(e) == frozenset(("kv",)):
            return Threshold(
                _ZERO if negated else Const(1), where(e, 1, 0), strict=False, kv_larger=not negated
            )
        case _:
            return None


def _comparison(a: Expr, b: Expr, *, strict: bool) -> Threshold | None:
    """a <= b, or a < b."""
    if a.dtype is b.dtype is DType.INT:
        low, high = _split(a), _split(b)
        if low is None or high is None:
            return None
        return Threshold(simplify(low[0] - high[0]), simplify(high[1] - low[1]), strict)
    if "kv" not in sides(a) and "q" not in sides(b):
        return Threshold(a, b, strict)
    if "kv" not in sides(b) and "q" not in sides(a):
        return Threshold(b, a, strict, kv_larger=False)
    return None


def _split(e: Expr) -> tuple[Expr, Expr] | None:
    """An integer as a sum of one that does not depend on the key tile and one that does not on the query tile."""
    if "kv" not in sides(e):
        return e, _ZERO
    if "q" not in sides(e):
        return _ZERO, e
    match e:
        case Call(Op.ADD | Op.SUB as op, (a, b)):
            x, y = _split(a), _split(b)
            return None if x is None or y is None else (call(op, x[0], y[0]), call(op, x[1], y[1]))
        case Call(Op.NEG, (a,)):
            x = _split(a)
            return None if x is None else (-x[0], -x[1])
        case Call(Op.MUL, (a, Const(int() as c))) | Call(Op.MUL, (Const(int() as c), a)):
            x = _split(a)
            return None if x is None else (x[0] * c, x[1] * c)
        case _:
            return None

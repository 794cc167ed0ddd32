"""Weights that never fall when the logit rises: the largest weight of a block is that of its largest logit."""

from __future__ import annotations

import math
from functools import lru_cache

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Call, Const, Expr, postorder
from attn_engine.ir.ops import Number, Op
from attn_engine.ir.passes.powers_of_two import never_negative, without_bound
from attn_engine.ir.program import LOGIT, OnlineRule

_POINTS = (0.37, -2.25, 3.5)


@lru_cache(maxsize=256)
def weight_of_largest_logit(rule: OnlineRule) -> Expr | None:
    """The largest final weight of some keys of a row, in terms of their largest LOGIT and the saved row values.

    It is 0 where that is -inf: no key. None where it is not certain, or needs more than these.
    """
    weight = without_bound(rule)
    leaves = {e for e in postorder(weight) if not e.operands and not isinstance(e, Const)}
    if not leaves <= {LOGIT, *rule.saved_vars} or _direction(weight, rule) not in (0, 1):
        return None
    for point in _POINTS:
        row: dict[Expr, Number] = {v: point + i for i, v in enumerate(rule.saved_vars)}
        if evaluate(weight, {**row, LOGIT: -math.inf}) != 0:
            return None
    return weight


def _direction(e: Expr, rule: OnlineRule) -> int | None:
    """1: never falls with the logit, -1: never rises, 0: does not depend on it, None: unknown."""
    if LOGIT not in postorder(e):
        return 0
    match e:
        case Call(Op.EXP | Op.EXP2 | Op.SIGMOID | Op.TANH, (x,)):
            return _direction(x, rule)
        case Call(Op.NEG, (x,)):
            return _turned(_direction(x, rule))
        case Call(Op.ADD | Op.MAX | Op.MIN, (a, b)):
            return _joined(_direction(a, rule), _direction(b, rule))
        case Call(Op.SUB, (a, b)):
            return _joined(_direction(a, rule), _turned(_direction(b, rule)))
        case Call(Op.MUL, (a, b)):
            factor, x = (a, b) if LOGIT in postorder(b) else (b, a)
            return _scaled(x, factor, rule)
        case Call(Op.DIV, (a, b)):
            return _scaled(a, b, rule)
        case _:
            return 1 if e is LOGIT else None


def _scaled(x: Expr, factor: Expr, rule: OnlineRule) -> int | None:
    """x times, or over, what does not depend on the logit and is not negative."""
    independent = LOGIT not in postorder(factor)
    return _direction(x, rule) if independent and never_negative(factor, rule) else None


def _turned(direction: int | None) -> int | None:
    return None if direction is None else -direction


def _joined(a: int | None, b: int | None) -> int | None:
    if a is None or b is None or a * b < 0:
        return None
    return a or b

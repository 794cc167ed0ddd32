"""What a row rule is made of, and what it does at its edges: with a masked score of -inf, in a row without keys.

The edges are decided by evaluating the rule's expressions at several points, so that any user's rule gets the guards
it needs.
"""

from __future__ import annotations

import math
from dataclasses import replace

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import (
    REDUCE_IDENTITY,
    Call,
    Const,
    Expr,
    Full,
    Load,
    Reduce,
    Var,
    postorder,
    substitute,
)
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.program import BATCH, HEAD, LOGIT, OUT, Q_IDX, OnlineRule, RowPass, RowState, saved_var

_PLACE: dict[Expr, Number] = {BATCH: 1, HEAD: 2, Q_IDX: 3}  # a normaliser may ask where its row is
_CAPTURED = 0.7  # and read a number or a tensor
_POINTS = ((0.37, 1.9), (-2.25, 0.6), (3.5, 7.25))


def pass_as_rule(rule: OnlineRule, p: RowPass) -> OnlineRule:
    """A pass that only makes row values, as a rule whose weights are zero."""
    return replace(
        rule, states=p.states, new_states=p.new_states, weights=Const(0.0), out_scale=Const(1.0), saved=()
    )


def in_dependency_order(rule: OnlineRule) -> list[tuple[RowState, Expr]]:
    """Each state with its new value, after those that the value contains."""
    pairs = list(zip(rule.states, rule.new_states, strict=True))
    return sorted(
        pairs, key=lambda p: sum(other is not p[1] and other in postorder(p[1]) for _, other in pairs)
    )


def tile_extremum(state: RowState, new: Expr) -> Reduce | None:
    """The tile's extremum in new = max(state, max of the tile), or the same with min; None for any other value."""
    if not isinstance(new, Call) or new.op not in (Op.MAX, Op.MIN) or state.var not in new.args:
        return None
    other = new.args[0] if new.args[1] is state.var else new.args[1]
    return other if isinstance(other, Reduce) and other.kind == new.op.value else None


def vanishes_when_masked(rule: OnlineRule) -> bool:
    """Whether LOGIT = -inf gives weight 0 and leaves every reduction as it was, so that masking the score is enough."""
    roots = (rule.weights, *rule.new_states, rule.out_scale)
    reductions = [e for e in postorder(*roots) if isinstance(e, Reduce)]
    for point in _POINTS:
        env = _environment(rule, point)
        if _at_minus_infinity(rule.weights, env) != 0:
            return False
        if any(_at_minus_infinity(r.x, env) != REDUCE_IDENTITY[r.kind] for r in reductions):
            return False
    return True


def _at_minus_infinity(e: Expr, env: dict[Expr, Number]) -> Number:
    """e with the score masked; reductions inside it are finite, as they are once any key was seen."""
    finite: dict[Expr, Expr] = {r: Full(0.5, r.axes) for r in postorder(e) if isinstance(r, Reduce)}
    return evaluate(substitute(e, finite), {**env, LOGIT: -math.inf})


def _environment(rule: OnlineRule, point: tuple[float, float]) -> dict[Expr, Number]:
    return {**_captured(rule), **{s.var: point[i % 2] + i for i, s in enumerate(rule.states)}}


def _captured(rule: OnlineRule) -> dict[Expr, Number]:
    """Something for all that a rule reads besides scores and states, the values of earlier passes among it."""
    roots = (rule.weights, *rule.new_states, rule.out_scale, rule.output, *(e for _, e in rule.saved))
    found: dict[Expr, Number] = {n: _CAPTURED for n in postorder(*roots) if isinstance(n, Load | Var)}
    return {**{n: 1 if n.dtype is DType.INT else x for n, x in found.items()}, **_PLACE}


def output_of_empty_row(rule: OnlineRule) -> Number:
    """The epilogue's output where no key was seen: NaN for softmax (0 / 0)."""
    return evaluate(rule.output, {**_initial(rule), OUT: 0.0})


def saved_of_empty_row(rule: OnlineRule) -> dict[str, Number]:
    """The saved row values where no key was seen: -inf for softmax's lse."""
    return {name: evaluate(e, {**_initial(rule), OUT: 0.0}) for name, e in rule.saved}


def values_of_empty_row(rule: OnlineRule) -> dict[Expr, Number]:
    """The values of the earlier passes where no key was seen (and whatever else the rule reads)."""
    return _initial(rule)


def _initial(rule: OnlineRule) -> dict[Expr, Number]:
    known: dict[Expr, Number] = {**_captured(rule), **{s.var: s.initial for s in rule.states}}
    for step in rule.earlier:  # their values where no key was seen
        known |= {s.var: s.initial for s in step.states}
        known |= {saved_var(name): evaluate(e, known | _read(e, known)) for name, e in step.values}
    return known


def _read(e: Expr, known: dict[Expr, Number]) -> dict[Expr, Number]:
    return {n: _CAPTURED for n in postorder(e) if isinstance(n, Load | Var) and n not in known}

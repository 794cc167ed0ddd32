"""Gradients that arrive through saved row values: added where a rule leaves them out, dropped where nothing needs them.

A saved value f(r) of the row's final states r adds  d_f * df/ds_j  to the gradient of the score s_j:

    df/ds_j = sum over states k of  g_k * dr_k/ds_j,     g_k = df/dr_k + sum over later states m of  g_m dr_m/dr_k

A sum r_m = sum of e_m(s; r_k) has dr_m/dr_k = r_m * d rho_m/dr_k, where rho_m is what the update rescales it by.
A maximum has no gradient of its own here: where its g is not zero, the value is not differentiable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Call, Const, Expr, Load, Reduce, Var, postorder, substitute, transform
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.passes.autodiff import gradients
from attn_engine.ir.passes.rule_analysis import in_dependency_order, tile_extremum
from attn_engine.ir.passes.simplify import is_zero, simplify, sum_of
from attn_engine.ir.program import (
    LOGIT,
    OUT,
    PROBS,
    OnlineRule,
    RowPass,
    RowState,
    RuleParameter,
    d_saved_var,
    saved_var,
)

_POINTS = 12
_TOLERANCE = 1e-9
_ZERO = Const(0.0)


def differentiable_rows(rule: OnlineRule) -> tuple[str, ...]:
    """The saved row values whose gradients the rule takes on, in the rule's order."""
    read = set(postorder(*backward_roots(rule)))
    return tuple(name for name, _ in rule.saved if d_saved_var(name) in read)


def backward_roots(rule: OnlineRule) -> list[Expr]:
    """Every expression of the backward pass."""
    roots = [rule.recompute, rule.gradient]
    roots += [e for p in rule.adjoints for e in (*p.new_states, *(value for _, value in p.values))]
    return roots + [e for p in rule.parameters for e in (p.per_pair, p.per_row) if e is not None]


# -- adding them


def with_row_gradients(rule: OnlineRule) -> OnlineRule:
    """The rule, its gradient completed by those saved row values that it leaves out and whose derivative is known.

    Softmax gets  + PROBS * d_lse;  a row maximum has no derivative here, a rule of several passes is left as it is.
    """
    if rule.earlier:
        return rule
    known = differentiable_rows(rule)
    gradient = rule.gradient
    for name, value in rule.saved:
        step = None if name in known else _step_of(rule, value)
        if step is not None and not is_zero(step):
            gradient = gradient + step * d_saved_var(name)
    return replace(rule, gradient=gradient)


def _step_of(rule: OnlineRule, value: Expr) -> Expr | None:
    """d(saved value)/d(LOGIT) in terms of LOGIT, PROBS and saved values; None where that is not possible."""
    if not any(s.var in postorder(value) for s in rule.states):
        return None
    try:
        step = _through_states(rule, value)
        if step is None:
            return None
        factor = _multiple_of_weights(rule, step)
    except (ArithmeticError, ValueError, KeyError, TypeError):
        return None  # an expression that cannot be tried at a point
    if factor is not None:
        return PROBS if factor == 1 else PROBS * factor
    kept: dict[Expr, Expr] = {e: saved_var(name) for name, e in rule.saved if isinstance(e, Var)}
    step = substitute(step, kept)
    states = {s.var for s in rule.states}
    return None if states & set(postorder(step)) - set(kept.values()) else step


def _through_states(rule: OnlineRule, value: Expr) -> Expr | None:
    """d(value)/d(LOGIT) in terms of LOGIT and the final states."""
    pairs = in_dependency_order(rule)
    final: dict[Expr, Expr] = {new: state.var for state, new in pairs if new.axes}
    adjoint: dict[RowState, Expr] = {
        s: g for (s, _), g in zip(pairs, gradients(value, Const(1.0), [s.var for s, _ in pairs]), strict=True)
    }
    total: Expr = _ZERO
    for i, (state, new) in reversed(list(enumerate(pairs))):
        g, others = adjoint[state], {n: v for n, v in final.items() if n is not new}
        if tile_extremum(state, new) is not None:
            if not _is_zero_everywhere(g):
                return None
            continue
        if is_zero(g):
            continue
        inner = substitute(new, others)
        sums = [n for n in postorder(inner) if isinstance(n, Reduce)]
        if not sums and state.var not in postorder(inner):  # it follows from the other states
            for other, _ in pairs[:i]:
                adjoint[other] = sum_of(adjoint[other], _slope(inner, other.var, g))
            continue
        if len(sums) != 1 or sums[0].kind != "sum":
            return None
        total = sum_of(total, _slope(sums[0].x, LOGIT, g))
        for other, other_new in pairs[:i]:
            adjoint[other] = sum_of(adjoint[other], g * _moved(state, new, other, other_new))
    return simplify(total)


def _slope(e: Expr, wrt: Expr, seed: Expr) -> Expr:
    (found,) = gradients(e, seed, [wrt])
    return found


def _moved(state: RowState, new: Expr, other: RowState, other_new: Expr) -> Expr:
    """d(sum)/d(other state): the sum times the slope of what it is rescaled by when the other one moves."""
    (rescale,) = gradients(new, Const(1.0), [state.var])
    after = Var("after", DType.FLOAT, ("q",))
    slope = _slope(substitute(rescale, {other_new: after}), after, Const(1.0))
    return _ZERO if is_zero(slope) else state.var * substitute(slope, {after: other.var})


# -- trying expressions at points


def _points(*roots: Expr) -> Iterable[dict[Expr, Number]]:
    source = random.Random(31)
    inputs = [n for n in postorder(*roots) if isinstance(n, Var | Load)]
    for _ in range(_POINTS):
        yield {
            n: source.randrange(1, 9) if n.dtype is DType.INT else source.uniform(0.2, 2.5) for n in inputs
        }


def _is_zero_everywhere(e: Expr) -> bool:
    return is_zero(e) or all(abs(evaluate(e, at)) <= _TOLERANCE for at in _points(e))


def _multiple_of_weights(rule: OnlineRule, step: Expr) -> float | None:
    """c in step = c * w, where w are the normalised weights in terms of LOGIT and the final states."""
    final: dict[Expr, Expr] = {n: s.var for s, n in zip(rule.states, rule.new_states, strict=True) if n.axes}
    numerator = substitute(rule.weights, final)
    factor = _slope(rule.output, OUT, Const(1.0))
    if any(isinstance(n, Reduce) for n in postorder(numerator)) or OUT in postorder(factor):
        return None
    weights = numerator * factor
    ratios = [evaluate(step, at) / evaluate(weights, at) for at in _points(step, weights)]
    middle = ratios[0]
    if not all(abs(r - middle) <= _TOLERANCE * abs(middle) for r in ratios):
        return None
    return float(round(middle)) if math.isclose(middle, round(middle), rel_tol=_TOLERANCE) else middle


# -- dropping those that nothing needs


def only_row_gradients(rule: OnlineRule, used: tuple[str, ...]) -> OnlineRule:
    """The rule where only the row values in `used` have a gradient; passes that then feed nothing are gone."""
    unused: dict[Expr, Expr] = {d_saved_var(n): _ZERO for n in differentiable_rows(rule) if n not in used}
    if unused:

        def drop(e: Expr) -> Expr:
            return transform(e, lambda node: unused[node] if node in unused else _without_zero(node))

        rule = replace(
            rule,
            gradient=drop(rule.gradient),
            parameters=tuple(_dropped_parameter(p, drop) for p in rule.parameters),
            adjoints=tuple(
                RowPass(p.states, tuple(map(drop, p.new_states)), tuple((n, drop(e)) for n, e in p.values))
                for p in rule.adjoints
            ),
            names={**rule.names, **{drop(e): name for e, name in rule.names.items()}},
            sources={**rule.sources, **{drop(e): text for e, text in rule.sources.items()}},
        )
    return _without_idle_passes(rule)


def _dropped_parameter(p: RuleParameter, drop: Callable[[Expr], Expr]) -> RuleParameter:
    pair, row = (None if e is None else drop(e) for e in (p.per_pair, p.per_row))
    return RuleParameter(p.load, *(None if e is None or is_zero(e) else e for e in (pair, row)))


def _without_zero(e: Expr) -> Expr | None:
    """0 * x, 0 / x, -0, x + 0, x - 0 and where(c, 0, 0): what is left where a gradient is known to be zero."""
    match e:
        case Call(Op.MUL, (a, b)) if is_zero(a) or is_zero(b):
            return _ZERO
        case Call(Op.DIV, (a, _)) | Call(Op.NEG, (a,)) if is_zero(a):
            return _ZERO
        case Call(Op.ADD, (a, b)) if is_zero(a) or is_zero(b):
            return sum_of(a, b)
        case Call(Op.SUB, (a, b)) if is_zero(a) or is_zero(b):
            return a if is_zero(b) else -b
        case Call(Op.WHERE, (_, a, b)) if is_zero(a) and is_zero(b):
            return _ZERO
        case Reduce("sum", x) if is_zero(x):
            return _ZERO
        case _:
            return None


def _without_idle_passes(rule: OnlineRule) -> OnlineRule:
    """Adjoint values that nothing reads are left out, last pass first."""
    read = set(postorder(*backward_roots(replace(rule, adjoints=()))))
    kept: list[RowPass] = []
    for p in reversed(rule.adjoints):
        values = tuple((name, e) for name, e in p.values if saved_var(name) in read)
        if values:
            kept.append(replace(p, values=values))
            read |= set(postorder(*p.new_states, *(e for _, e in values)))
    return replace(rule, adjoints=tuple(reversed(kept)))

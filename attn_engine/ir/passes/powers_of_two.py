"""Normalisers in powers of two: for rules whose logit passes only through extrema and exponentials.

A GPU computes 2^x. With every logit counted in powers of two (logit / ln 2), a pair costs softmax one maximum, one
fused multiply-add and one power of two: the factor 1 / ln 2, and the scale of the scores with it, is multiplied there.

    weights = exp(logit - new_max)                  ->  2^(logit - new_max), row_max and new_max in powers of two
    exp(min(logit - row_max, 0)) * inverse_sum      ->  2^(logit - (row_max / ln 2 - log2(inverse_sum)))

Row values that leave the forward kernel, and that the backward pass reads, stay what they are. A state in powers of two
is itself the number that is subtracted, so its rounding is the same in weights, sums and rescaling, and cancels; scores
beyond 2^26 would overflow instead, which elements of 16 bits have no digits for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Call, Const, Expr, Reduce, Var, call, postorder, rebuild, substitute
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.passes.rule_analysis import tile_extremum
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import LOGIT, OnlineRule, RowState, saved_var

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_POINTS = 4
_TOLERANCE = 1e-9
_COMPARISONS = (Op.LE, Op.LT, Op.EQ, Op.NE)


@lru_cache(maxsize=256)
def forward_in_powers_of_two(rule: OnlineRule) -> OnlineRule:
    """The rule with LOGIT in powers of two in its online update; the rule itself where that gains nothing."""
    if rule.earlier or rule.pooled:
        return rule
    counted = frozenset(s.var for s, new in _states(rule) if _is_extremum(s, new))
    convert = _Converter(counted)
    try:
        changed = replace(
            rule,
            weights=convert.plain(rule.weights),
            new_states=tuple(
                convert.counted(new) if s.var in counted else convert.plain(new) for s, new in _states(rule)
            ),
            out_scale=convert.plain(rule.out_scale),
            output=convert.plain(rule.output),
            saved=tuple((name, convert.row_value(e)) for name, e in rule.saved),
            powers_of_two=True,
        )
    except _Refused:
        return rule
    if changed.weights is rule.weights:
        return rule
    return replace(changed, names=convert.moved(rule.names), sources=convert.moved(rule.sources))


@lru_cache(maxsize=256)
def backward_in_powers_of_two(rule: OnlineRule) -> OnlineRule:
    """The rule with LOGIT in powers of two in its backward formulas; the rule itself where that gains nothing."""
    if rule.earlier or rule.adjoints:
        return rule
    convert = _Converter(frozenset())
    bounded = without_bound(rule)
    try:
        weights, gradient = convert.plain(bounded), convert.plain(rule.gradient)
        for p in rule.parameters:
            if p.per_pair is not None and LOGIT in postorder(p.per_pair):
                raise _Refused
    except _Refused:
        return rule
    if weights is bounded:
        return rule
    recompute, shift = _with_factor_inside(weights, rule)
    return replace(
        rule,
        recompute=recompute,
        gradient=gradient,
        powers_of_two=True,
        names={**convert.moved(rule.names), **({shift: "log2_sum"} if shift is not None else {})},
        sources=convert.moved(rule.sources),
    )


class _Refused(Exception):
    """A pair would need its logit as it is, and converting it back costs what is to be saved."""


class _Converter:
    """Rewrites expressions over LOGIT into the same over LOGIT / ln 2.

    A node becomes (expression, whether it is in powers of two). Sums, extrema and multiples of what is in powers of two
    are so too; an exponential of it is a plain power of two. Row values are converted where a plain one is needed.
    """

    def __init__(self, counted: frozenset[Var]) -> None:
        self._done: dict[Expr, tuple[Expr, bool]] = {
            LOGIT: (LOGIT, True),
            **{state: (state, True) for state in counted},
        }

    def plain(self, root: Expr) -> Expr:
        """The value itself."""
        return _as_plain(self._of(root))

    def counted(self, root: Expr) -> Expr:
        """The value over ln 2."""
        return _as_counted(self._of(root))

    def row_value(self, root: Expr) -> Expr:
        """The value itself; of a sum, only the part that is in powers of two is converted."""
        if isinstance(root, Call) and root.op in (Op.ADD, Op.SUB):
            a, b = (self._of(e) for e in root.args)
            if a[1] != b[1]:
                self._done[root] = root.with_operands((_as_plain(a), _as_plain(b))), False
        return self.plain(root)

    def moved(self, notes: Mapping[Expr, str]) -> dict[Expr, str]:
        """Names or source lines of nodes, for what the nodes have become."""
        return {self._done[e][0] if e in self._done else e: text for e, text in notes.items()}

    def _of(self, root: Expr) -> tuple[Expr, bool]:
        for node in postorder(root):
            if node not in self._done:
                self._done[node] = _converted(node, [self._done[o] for o in node.operands])
        return self._done[root]


def _converted(node: Expr, operands: list[tuple[Expr, bool]]) -> tuple[Expr, bool]:
    """One node over converted operands."""
    if not any(counts for _, counts in operands):
        return rebuild(node, tuple(e for e, _ in operands)), False
    (first, counts), *others = operands
    match node:
        case Call(Op.EXP):
            return call(Op.EXP2, first), False
        case Call(Op.SIGMOID):
            return 1.0 / (1.0 + call(Op.EXP2, -first)), False
        case Call(Op.ADD | Op.SUB | Op.MAX | Op.MIN | Op.NEG | Op.ABS) | Reduce():
            return node.with_operands(tuple(_as_counted(o) for o in operands)), True
        case Call(op) if op in _COMPARISONS:
            return node.with_operands(tuple(_as_counted(o) for o in operands)), False
        case Call(Op.WHERE):
            return node.with_operands((first, *(_as_counted(o) for o in others))), True
        case Call(Op.MUL) if counts != others[0][1]:
            return node.with_operands(tuple(e for e, _ in operands)), True
        case Call(Op.DIV) if not others[0][1]:
            return node.with_operands(tuple(e for e, _ in operands)), True
        case _:
            return node.with_operands(tuple(_as_plain(o) for o in operands)), False


def _as_plain(value: tuple[Expr, bool]) -> Expr:
    e, counts = value
    if not counts:
        return e
    return _times(e, LN_2)


def _as_counted(value: tuple[Expr, bool]) -> Expr:
    e, counts = value
    if counts or e.dtype is DType.BOOL:
        return e
    if isinstance(e, Const):
        return Const(float(e.value) * LOG2_E)
    return _times(e, LOG2_E)


def _times(e: Expr, factor: float) -> Expr:
    if "kv" in e.axes:
        raise _Refused
    return e * factor


def _states(rule: OnlineRule) -> list[tuple[RowState, Expr]]:
    return list(zip(rule.states, rule.new_states, strict=True))


def _is_extremum(state: RowState, new: Expr) -> bool:
    """Whether a state is the largest or smallest of something made from logits."""
    found = tile_extremum(state, new)
    return found is not None and math.isinf(state.initial) and LOGIT in postorder(found.x)


def without_bound(rule: OnlineRule) -> Expr:
    """The recomputed weights without min(x - row_max, 0) where row_max is the row's largest x: it is never above 0."""
    maxima = {
        saved_var(name): found.x
        for name, e in rule.saved
        for state, new in _states(rule)
        if e is state.var and (found := tile_extremum(state, new)) is not None and found.kind == "max"
    }

    def is_below_maximum(e: Expr) -> bool:
        return (
            isinstance(e, Call)
            and e.op is Op.SUB
            and isinstance(e.args[1], Var)
            and maxima.get(e.args[1]) is e.args[0]
        )

    done: dict[Expr, Expr] = {}
    for node in postorder(rule.recompute):
        new = rebuild(node, tuple(done[o] for o in node.operands))
        match new:
            case Call(Op.MIN, (x, Const(0 | 0.0))) | Call(Op.MIN, (Const(0 | 0.0), x)) if is_below_maximum(x):
                new = x
            case _:
                pass
        done[node] = new
    return done[rule.recompute]


def _with_factor_inside(weights: Expr, rule: OnlineRule) -> tuple[Expr, Expr | None]:
    """2^(x - m) * r as 2^(x - (m - log2 r)) where r is a row's value that is never negative, and what is subtracted."""
    factor: Expr = Const(1.0)
    power = weights
    match weights:
        case Call(Op.MUL, (a, b)):
            power, factor = (a, b) if "kv" in a.axes else (b, a)
        case Call(Op.DIV, (a, b)):
            power, factor = a, 1.0 / b
        case _:
            pass
    if "kv" in factor.axes or not isinstance(power, Call) or power.op is not Op.EXP2:
        return weights, None
    match power.args[0]:
        case Call(Op.SUB, (x, m)) if "kv" not in m.axes and never_negative(factor, rule):
            shift = m if factor is Const(1.0) else _saved_sum(m, factor, rule)
            shift = m - call(Op.LOG2, factor) if shift is None else shift
            return call(Op.EXP2, x - shift), simplify(shift)
        case _:
            return weights, None


def _saved_sum(m: Expr, factor: Expr, rule: OnlineRule) -> Expr | None:
    """m - log2(factor) as a saved row value over ln 2: softmax keeps the logarithm of its sum. Tried at some points."""
    saved = {saved_var(name): e for name, e in rule.saved}
    found = set(saved)
    for seed in range(_POINTS):
        point: dict[Expr, Number] = {s.var: 0.3 + (7 * seed + 3 * i) % 5 for i, s in enumerate(rule.states)}
        try:
            rows: dict[Expr, Number] = {v: evaluate(e, point) for v, e in saved.items()}
            wanted = evaluate(m, rows) - math.log2(evaluate(factor, rows))
        except (KeyError, TypeError, ValueError):  # it reads something else, or is not positive
            return None
        found = {v for v in found if abs(rows[v] * LOG2_E - wanted) <= _TOLERANCE}
    return next((v * LOG2_E for v in saved if v in found), None)


def never_negative(root: Expr, rule: OnlineRule) -> bool:
    """Whether a row's value is certainly >= 0: made of exponentials, their sums and quotients."""
    made = substitute(
        root, {saved_var(name): e for name, e in rule.saved}
    )  # of the states after the last tile
    states: dict[Expr, Expr] = {s.var: new for s, new in _states(rule) if s.initial >= 0}

    def holds(e: Expr) -> bool:
        match e:
            case Const(value):
                return value >= 0
            case Call(Op.EXP | Op.EXP2 | Op.SIGMOID | Op.ABS):
                return True
            case Call(Op.ADD | Op.MUL | Op.DIV | Op.MIN, (a, b)) | Call(Op.WHERE, (_, a, b)):
                return holds(a) and holds(b)
            case Call(Op.MAX, (a, b)):
                return holds(a) or holds(b)
            case Reduce(_, x):
                return holds(x)
            case Var():
                return e in states
            case _:
                return False

    while any(not holds(new) for new in states.values()):
        states = {state: new for state, new in states.items() if holds(new)}
    return holds(made)

"""The backward half of a row rule from its forward half, for rules whose weights factor.

With the row's final states r, w = a(s; r) * h(r): `a` is what the last tile's step gives, `h` what the epilogue
multiplies the output by. A state that is a maximum and that w does not depend on once the sums follow it (a stabiliser)
has no gradient. A sum reaches w through h alone:

    ds = dP * dw/ds + sum over sums k of  g_k * de_k/ds,      g_k = (d log h / d r_k) * <dO, o>
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Expr, Load, Reduce, Var, postorder, substitute
from attn_engine.ir.ops import DType
from attn_engine.ir.passes.autodiff import gradients
from attn_engine.ir.passes.rule_analysis import tile_extremum
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import D_PROBS, DELTA, LOGIT, OUT, RowState, saved_var

_POINTS = 12
_TOLERANCE = 1e-9


class NotDerivable(Exception):
    """Why a rule's backward pass cannot be derived here."""


@dataclass(frozen=True, slots=True)
class Derived:
    """saved row values, the weights again from LOGIT and them, and the gradient of LOGIT."""

    saved: tuple[tuple[str, Expr], ...]
    recompute: Expr
    gradient: Expr


@dataclass(frozen=True, slots=True)
class _Sum:
    """A state that adds up `term` over the keys, with what happens to the old value at a new tile (`rescale`)."""

    state: RowState
    term: Expr
    rescale: Expr


def derive_rule(
    states: tuple[RowState, ...],
    weights: Expr,
    new_states: tuple[Expr, ...],
    out_scale: Expr,
    output: Expr,
    saved: tuple[tuple[str, Expr], ...],
) -> Derived:
    """Derive what a user's OnlineFunc leaves out. Raises NotDerivable with the reason."""
    final, aliases = _final_values(states, new_states)
    numerator = substitute(substitute(weights, final), aliases)
    if any(isinstance(n, Reduce) for n in postorder(numerator)):
        raise NotDerivable("the weights of online_fwd use a reduction that is not a new row value")
    factor = substitute(_epilogue_factor(output), aliases)
    whole = simplify(numerator * factor)
    own = [(s, n) for s, n in zip(states, new_states, strict=True) if s.var not in aliases]
    sums = tuple(_sum_of(s, n, final) for s, n in own if tile_extremum(s, n) is None)
    for state, new in own:
        if tile_extremum(state, new) is not None:
            _check_stabiliser(state, new, sums, numerator, factor, out_scale)
    (gradient,) = gradients(whole, D_PROBS, (LOGIT,))
    for item in sums:
        gradient = gradient + _through_sum(item, numerator, factor)
    rows = tuple((name, substitute(e, aliases)) for name, e in saved)
    return _finish(states, rows, whole, simplify(gradient))


def _final_values(
    states: tuple[RowState, ...], new_states: tuple[Expr, ...]
) -> tuple[dict[Expr, Expr], dict[Expr, Expr]]:
    """New value -> the state's variable; and the variable -> its value, for states that follow from other states."""
    final: dict[Expr, Expr] = {new: s.var for s, new in zip(states, new_states, strict=True) if new.axes}
    aliases: dict[Expr, Expr] = {}
    for state, new in zip(states, new_states, strict=True):
        value = substitute(new, {n: v for n, v in final.items() if n is not new})
        if not any(isinstance(n, Reduce) or n is state.var for n in postorder(value)):
            aliases[state.var] = value
    return final, aliases


def _finish(
    states: tuple[RowState, ...], saved: tuple[tuple[str, Expr], ...], whole: Expr, gradient: Expr
) -> Derived:
    """Save the states that the two expressions read, under their own names where those are free."""
    taken = {name for name, _ in saved}
    rows, renamed = list(saved), dict[Expr, Expr]()
    for state in states:
        if any(_depends_on(e, state.var) for e in (whole, gradient)):
            name = state.name if state.name not in taken else f"final_{state.name}"
            known = next((n for n, e in saved if e is state.var), None)
            if known is None:
                rows.append((name, state.var))
            renamed[state.var] = saved_var(known or name)
    return Derived(tuple(rows), substitute(whole, renamed), substitute(gradient, renamed))


def _depends_on(e: Expr, node: Expr) -> bool:
    return any(n is node for n in postorder(e))


def _epilogue_factor(output: Expr) -> Expr:
    """h in output = OUT * h. Raises NotDerivable where the epilogue is anything else."""
    (slope,) = gradients(output, Const(1.0), (OUT,))
    free_of_out = not _depends_on(slope, OUT) and "kv" not in slope.axes
    if not free_of_out or not _agree(output, OUT * slope):
        raise NotDerivable("the epilogue is not the output times a row value")
    return slope


def _sum_of(state: RowState, new: Expr, final: dict[Expr, Expr]) -> _Sum:
    """Read new = state * rescale + sum(term), with the other states at their new values."""
    others: dict[Expr, Expr] = {n: v for n, v in final.items() if n is not new}
    value = substitute(new, others)
    totals = [n for n in postorder(value) if isinstance(n, Reduce)]
    problem = f"row value {state.name!r} is neither a maximum nor a rescaled running sum over the keys"
    if len(totals) != 1 or totals[0].kind != "sum":
        raise NotDerivable(problem)
    (total,) = totals
    (rescale,) = gradients(value, Const(1.0), (state.var,))
    linear = state.var * rescale + Var("total", DType.FLOAT)
    if _depends_on(rescale, state.var) or not _agree(
        substitute(value, {total: Var("total", DType.FLOAT)}), linear
    ):
        raise NotDerivable(problem)
    # In the rescaling factor the variables of other states stood for their old values: keep it as the user wrote it.
    (written,) = gradients(new, Const(1.0), (state.var,))
    return _Sum(state, total.x, written)


def _through_sum(item: _Sum, numerator: Expr, factor: Expr) -> Expr:
    """The gradient that reaches the score through a row sum: the weights' relative slope in it must not depend on s."""
    scaled = numerator * factor if _depends_on(numerator, item.state.var) else factor
    (slope,) = gradients(scaled, Const(1.0), (item.state.var,))
    relative = slope / scaled
    at_one = substitute(relative, {LOGIT: Const(1.0)})
    if not _agree(relative, at_one):
        raise NotDerivable(f"the row sum {item.state.name!r} does not only scale the weights of a row")
    (step,) = gradients(item.term, Const(1.0), (LOGIT,))
    return simplify(at_one) * DELTA * step


def _check_stabiliser(
    state: RowState, new: Expr, sums: tuple[_Sum, ...], numerator: Expr, factor: Expr, out_scale: Expr
) -> None:
    """The maximum may be any number: moving it, with sums and output rescaled, leaves the weights as they are."""
    old, moved = Var("before", DType.FLOAT, ("q",)), Var("after", DType.FLOAT, ("q",))
    step: dict[Expr, Expr] = {new: moved, state.var: old}
    sums_moved: dict[Expr, Expr] = {s.state.var: s.state.var * substitute(s.rescale, step) for s in sums}
    whole = numerator * factor
    before, after = substitute(whole, {state.var: old}), substitute(whole, {state.var: moved, **sums_moved})
    scaled = substitute(numerator, {state.var: old}) * substitute(out_scale, step)
    if not _agree(scaled, substitute(numerator, {state.var: moved})) or not _agree(before, after):
        raise NotDerivable(
            f"the weights depend on the row maximum {state.name!r} itself, not only as a stabiliser"
        )


def _agree(a: Expr, b: Expr) -> bool:
    """Whether two expressions have equal values at random points."""
    source = random.Random(20)
    for _ in range(_POINTS):
        inputs: dict[Expr, bool | int | float] = {
            n: source.randrange(1, 9) if n.dtype is DType.INT else source.uniform(0.2, 2.5)
            for n in postorder(a, b)
            if isinstance(n, Var | Load)
        }
        x, y = evaluate(a, inputs), evaluate(b, inputs)
        if not abs(x - y) <= _TOLERANCE * (1 + abs(x) + abs(y)):
            return False
    return True

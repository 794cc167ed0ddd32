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
from attn_engine.ir.expr import Call, Const, Expr, Load, Reduce, Var, postorder, substitute
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.autodiff import gradients
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
    final = {new: state.var for state, new in zip(states, new_states, strict=True) if isinstance(new, Call | Reduce)}
    numerator = substitute(weights, dict(final))
    _require_final(numerator, "the weights of online_fwd")
    factor = _epilogue_factor(output)
    whole = simplify(numerator * factor)
    sums = tuple(_sum_of(s, n, final) for s, n in zip(states, new_states, strict=True) if not _is_extremum(n))
    extrema = [s for s, n in zip(states, new_states, strict=True) if _is_extremum(n)]
    _check_stabilisers(extrema, sums, numerator, factor, out_scale, final)
    for item in sums:
        if _depends_on(numerator, item.state.var):
            raise NotDerivable(f"the weights before the epilogue depend on the row sum {item.state.name!r}")
    (slope,) = gradients(whole, D_PROBS, (LOGIT,))
    gradient = slope
    for item in sums:
        gradient = gradient + _through_sum(item, factor)
    return _finish(states, saved, whole, simplify(gradient))


def _finish(states: tuple[RowState, ...], saved: tuple[tuple[str, Expr], ...], whole: Expr, gradient: Expr) -> Derived:
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


def _require_final(e: Expr, what: str) -> None:
    if any(isinstance(n, Reduce) for n in postorder(e)):
        raise NotDerivable(f"{what} use a reduction of the tile that is not a new row value")


def _epilogue_factor(output: Expr) -> Expr:
    """h in output = OUT * h. Raises NotDerivable where the epilogue is anything else."""
    (slope,) = gradients(output, Const(1.0), (OUT,))
    slope = simplify(slope)
    free_of_out = not _depends_on(slope, OUT) and "kv" not in slope.axes
    if not free_of_out or not _agree(output, OUT * slope):
        raise NotDerivable("the epilogue is not the output times a row value")
    return slope


def _is_extremum(new: Expr) -> bool:
    return isinstance(new, Call) and new.op in (Op.MAX, Op.MIN)


def _sum_of(state: RowState, new: Expr, final: dict[Expr, Expr]) -> _Sum:
    """Read new = state * rescale + sum(term), with the other states at their new values."""
    inner = [r for r in postorder(new) if isinstance(r, Reduce) and _is_outer(r, new, final)]
    if len(inner) != 1 or inner[0].kind != "sum":
        raise NotDerivable(f"row value {state.name!r} is neither a maximum nor a running sum over the keys")
    (total,) = inner
    others: dict[Expr, Expr] = {n: v for n, v in final.items() if n is not new}
    body = substitute(new, {**others, total: Const(0.0)})
    rescale, unit = gradients(substitute(new, others), Const(1.0), (state.var, substitute(total, others)))
    rescale = simplify(rescale)
    if not (isinstance(simplify(unit), Const) and evaluate(simplify(unit), {}) == 1):
        raise NotDerivable(f"row value {state.name!r} does not add the sum over the keys as it is")
    if _depends_on(rescale, state.var) or not _agree(body, state.var * rescale):
        raise NotDerivable(f"row value {state.name!r} is not rescaled by a factor")
    term = substitute(total.x, others)
    _require_final(term, f"the terms of row value {state.name!r}")
    return _Sum(state, term, rescale)


def _is_outer(reduction: Reduce, new: Expr, final: dict[Expr, Expr]) -> bool:
    """Whether a reduction remains once the new values of other states are taken as variables."""
    others: dict[Expr, Expr] = {n: v for n, v in final.items() if n is not new}
    return any(n is substitute(reduction, others) for n in postorder(substitute(new, others)))


def _through_sum(item: _Sum, factor: Expr) -> Expr:
    """The gradient that reaches the score through a row sum that the epilogue divides by."""
    (slope,) = gradients(factor, Const(1.0), (item.state.var,))
    (step,) = gradients(item.term, Const(1.0), (LOGIT,))
    return slope / factor * DELTA * step


def _check_stabilisers(
    extrema: list[RowState], sums: tuple[_Sum, ...], numerator: Expr, factor: Expr, out_scale: Expr, final: dict[Expr, Expr]
) -> None:
    """Each maximum may be any number: moving it, with the sums and the output rescaled, leaves the weights as they are."""
    for state in extrema:
        old, moved = Var(f"{state.name} before", DType.FLOAT, ("q",)), Var(f"{state.name} after", DType.FLOAT, ("q",))
        scale = _between(out_scale, state, final, old, moved)
        before = substitute(numerator * factor, {state.var: old})
        rescaled: dict[Expr, Expr] = {
            s.state.var: s.state.var * _between(s.rescale, state, final, old, moved) for s in sums
        }
        after = substitute(numerator * factor, {state.var: moved, **rescaled})
        follows = _agree(substitute(numerator, {state.var: old}) * scale, substitute(numerator, {state.var: moved}))
        if not follows or not _agree(before, after):
            raise NotDerivable(f"the weights depend on the row maximum {state.name!r} itself, not only as a stabiliser")


def _between(scale: Expr, state: RowState, final: dict[Expr, Expr], old: Expr, moved: Expr) -> Expr:
    """A rescaling factor written for the old and new value of a maximum, at two given values."""
    new = next((n for n, v in final.items() if v is state.var), None)
    marked = substitute(scale, {} if new is None else {new: moved})
    return substitute(marked, {state.var: old})


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




"""What a user's OnlineFunc leaves out, derived from what it gives: its methods are a row function said tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.ir.expr import REDUCE_IDENTITY, Expr, substitute
from attn_engine.ir.passes.derive_backward import derive_backward
from attn_engine.ir.passes.derive_forward import guarded
from attn_engine.ir.passes.derive_row_function import (
    Fresh,
    RowDefinition,
    derive_row_function,
    form_of,
    saved_rows,
)
from attn_engine.ir.passes.one_tile import one_tile, reductions_of
from attn_engine.ir.passes.row_form import NotDerivable, RowForm
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.passes.try_rule import problem_of
from attn_engine.ir.program import OnlineRule, RowState


@dataclass(frozen=True, slots=True)
class Given:
    """The methods that a user has written; None for those to derive."""

    recompute: Expr | None
    gradient: Expr | None


def definition_of_rule(rule: OnlineRule, taken: frozenset[str]) -> tuple[RowDefinition, dict[RowState, Expr]]:
    """The row function that a rule's online update and epilogue compute, and its final states. Raises NotDerivable."""
    weights, rows, last = one_tile(rule.states, rule.weights, rule.new_states, rule.output, rule.saved)
    states = {e: s.name for s, e in last.items()}
    fresh = Fresh({*taken, *(s.name for s in rule.states), *(name for name, _ in rule.saved)})
    roots = (weights, *(e for _, e in rows))
    names = tuple((r, states.get(r) or fresh(f"row_{r.kind}")) for r in reductions_of(*roots))
    return RowDefinition(
        rule.name, weights, rows, names, taken, captures=rule.captures, scalars=rule.scalars
    ), last


def complete_rule(rule: OnlineRule, given: Given, taken: frozenset[str]) -> OnlineRule:
    """`rule` with the methods that were not given: its online update and epilogue stay what the user wrote.

    Where the final states do not tell the reductions that the backward pass needs, everything is derived. Raises
    NotDerivable.
    """
    definition, last = definition_of_rule(rule, taken)
    form = form_of(definition)
    if not _states_tell(form, last):
        return derive_row_function(definition)
    found = _with_backward(rule, form, given, definition)
    problem, nothing = problem_of(found), Given(None, None)
    if problem is not None and given != nothing:  # a given method may be at fault: `check_methods` names it
        problem = problem_of(_with_backward(rule, form, nothing, definition))
    if problem is not None:
        raise NotDerivable(problem)
    return found


def _states_tell(form: RowForm, last: dict[RowState, Expr]) -> bool:
    """Whether each reduction is one of the states."""
    finals = {substitute(e, form.known) for e in last.values()}
    return all(r.var in finals and any(s.name == r.name for s in last) for r in form.reductions)


def _with_backward(rule: OnlineRule, form: RowForm, given: Given, definition: RowDefinition) -> OnlineRule:
    fresh = Fresh({*definition.taken, *(s.name for s in rule.states), *(name for name, _ in rule.saved)})
    initial: dict[Expr, float] = {r.var: REDUCE_IDENTITY[r.kind] for r in form.reductions}
    scale = simplify(guarded(form.factor, initial))
    backward = derive_backward(form, scale, form.outputs, fresh)
    saved, backward = saved_rows(form, form.outputs, {}, scale, backward, fresh)
    written = dict(rule.saved)
    return replace(
        rule,
        saved=tuple((name, written.get(name, e)) for name, e in saved),
        recompute=backward.recompute if given.recompute is None else given.recompute,
        gradient=backward.gradient if given.gradient is None else given.gradient,
        adjoints=backward.adjoints if given.gradient is None else (),
        parameters=backward.parameters,
    )

"""From a row function, w_j = w(s_j; reductions over the row), to the rule that every kernel of it is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Expr, Reduce, Var, postorder, substitute
from attn_engine.ir.passes.derive_backward import Backward, derive_backward, is_one
from attn_engine.ir.passes.derive_forward import Forward, derive_forward, exponent_of, log_of
from attn_engine.ir.passes.factors import additive_terms
from attn_engine.ir.passes.row_form import NotDerivable, RowForm, row_form
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.passes.symbolic import random_points
from attn_engine.ir.passes.try_rule import problem_of
from attn_engine.ir.program import LOGIT, Captured, OnlineRule, saved_var

Rows = tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, slots=True)
class RowDefinition:
    """weights (q, kv) and outputs (q), with `Reduce` nodes over "kv".

    names: of the reductions. taken: names that mean something else already. unread: outputs that kernels must not use
    as variables, because of their names. locals: (node, the user's name for it, its source line).
    """

    name: str
    weights: Expr
    outputs: Rows
    names: tuple[tuple[Reduce, str], ...] = ()
    taken: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    locals: tuple[tuple[Expr, str, str], ...] = ()
    captures: tuple[Captured, ...] = ()
    scalars: tuple[Var, ...] = ()


@lru_cache(maxsize=256)
def derive_row_function(function: RowDefinition) -> OnlineRule:
    """The rule: in one pass where the ratios allow it, else in as many as its reductions need.

    Raises NotDerivable. Every rule is tried on random rows: cut into tiles, and its gradient against differences.
    """
    form, rule = _derived(function, separate=False)
    problem = problem_of(rule, form)
    if problem is None:
        return rule
    if any(form.layers) or form.reductions:
        form, rule = _derived(function, separate=True)
        problem = problem_of(rule, form)
    if problem is not None:
        raise NotDerivable(problem)
    return rule


def form_of(function: RowDefinition, separate: bool = False) -> RowForm:
    """The function's reductions in order, under their names."""
    return row_form(
        function.weights,
        function.outputs,
        dict(function.names).__getitem__,
        separate=separate,
        words=[(e, name) for e, name, _ in function.locals],
    )


def _derived(function: RowDefinition, separate: bool) -> tuple[RowForm, OnlineRule]:
    form = form_of(function, separate)
    fresh = Fresh({*function.taken, *(r.name for r in form.reductions), *(name for name, _ in form.outputs)})
    forward = derive_forward(form, fresh)
    outputs = [*form.outputs, *_lse(form, fresh)]
    scale = simplify(substitute(forward.scale, {v: k for k, v in forward.final.items()}))
    backward = derive_backward(form, scale, outputs, fresh)
    saved, backward = saved_rows(form, outputs, forward.final, scale, backward, fresh, function.unread)
    names, sources = _users_words(function, form, forward)
    return form, OnlineRule(
        function.name, forward.states, forward.weights, forward.new_states, forward.out_scale, forward.output,
        saved, backward.recompute, backward.gradient, names, sources, forward.earlier, backward.adjoints,
        backward.parameters, function.captures, function.scalars, reasons=form.reasons,
    )  # fmt: skip


def _users_words(
    function: RowDefinition, form: RowForm, forward: Forward
) -> tuple[dict[Expr, str], dict[Expr, str]]:
    """The user's names and source lines for what has become of the user's local variables in each pass."""
    names, sources = dict(forward.names), dict[Expr, str]()
    for node, name, source in function.locals:
        row = substitute(node, form.known)
        if isinstance(row, Var):
            continue
        places = [substitute(row, meaning) for meaning in (*forward.meanings, forward.final, {})]
        for here in (*places, substitute(row, form.within_extrema([row]))):
            names.setdefault(here, name)
            sources.setdefault(here, source)
    return names, sources


class Fresh:
    """Hands out names that nothing else has."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = set(taken)

    def __call__(self, wanted: str) -> str:
        name, n = wanted, 2
        while name in self._taken:
            name, n = f"{wanted}_{n}", n + 1
        self._taken.add(name)
        return name


def _lse(form: RowForm, fresh: Callable[[str], str]) -> Rows:
    """lse = -(c + log h), where w = exp(s + c) * h: the logarithm of what the row's exponentials are divided by."""
    exponent = exponent_of(form.local)
    if exponent is None or any(name == "lse" for name, _ in form.outputs):
        return ()
    terms = additive_terms(exponent)
    rest = [(sign, t) for sign, t in terms if t is not LOGIT]
    if len(rest) != len(terms) - 1 or (1, LOGIT) not in terms or any("kv" in t.axes for _, t in rest):
        return ()
    h = form.factor.expr
    if not form.reductions or any(evaluate(h, point) <= 0 for point in random_points(h)):
        return ()
    offset = log_of(form.factor)
    total = simplify(-offset)
    first = [t if sign < 0 else simplify(-t) for sign, t in rest]
    for t in reversed(first):
        total = simplify(t + total)
    name = fresh("lse")
    return ((name, total),) if name == "lse" else ()


def saved_rows(
    form: RowForm,
    outputs: Sequence[tuple[str, Expr]],
    final: dict[Expr, Expr],
    scale: Expr,
    backward: Backward,
    fresh: Callable[[str], str],
    unread: frozenset[str] = frozenset(),
) -> tuple[Rows, Backward]:
    """What the epilogue keeps: the user's outputs, then what the backward pass reads and they do not hold.

    h is kept in place of what it is made from where that makes no more rows.
    """
    kept: dict[Expr, Var] = {
        e: saved_var(name) for name, e in outputs if isinstance(e, Var) and name not in unread
    }
    if not is_one(scale) and not isinstance(scale, Var):
        name = fresh("row_scale")
        shorter = backward.replaced({scale: saved_var(name)})
        if len(_read(form, shorter)) < len(_read(form, backward)):
            backward = shorter
            kept[scale] = saved_var(name)
    read = _read(form, backward)
    if form.reductions and not read and any(p.per_row is not None for p in backward.parameters):
        read = [form.reductions[0].var]  # tells rows without keys, which have no part in the gradient
    mine = {name for name, _ in outputs}
    for v in read:
        if v not in kept:
            kept[v] = saved_var(fresh(f"final_{v.name}") if v.name in mine else v.name)
    rows = [*outputs, *((var.name, value) for value, var in kept.items())]
    saved = {name: simplify(substitute(value, final)) for name, value in rows}
    renamed: dict[Expr, Expr] = {value: var for value, var in kept.items() if isinstance(value, Var)}
    return tuple(saved.items()), backward.replaced(renamed) if renamed else backward


def _read(form: RowForm, backward: Backward) -> list[Var]:
    found = set(postorder(*backward.roots))
    return [v for v in form.variables if v in found]

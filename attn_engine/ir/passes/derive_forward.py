"""The online update and the epilogue of a row function from its row form: passes before, then out = out * scale + w v.

maximum, minimum   new = max(state, max over the tile)
sum                new = state * ratio + sum over the tile of the term, at the new values of what it reads
output             out = out * ratio + a(s; new values) @ V;  at the end out * h
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import (
    REDUCE_IDENTITY,
    Call,
    Const,
    Expr,
    Load,
    Reduce,
    Var,
    call,
    postorder,
    substitute,
    where,
)
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.passes.factors import ONE, Product, touches
from attn_engine.ir.passes.row_form import Reduction, RowForm, new_value, ratio
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import OUT, RowPass, RowState


@dataclass(frozen=True, slots=True)
class Forward:
    """What `OnlineRule` says of the forward pass, but for `saved`.

    final: each reduction's variable -> its value in the epilogue. scale: h, 0 where a row without keys has none.
    meanings: for every pass, the reductions' variables -> their values after a tile. names: of new values.
    """

    earlier: tuple[RowPass, ...]
    states: tuple[RowState, ...]
    weights: Expr
    new_states: tuple[Expr, ...]
    out_scale: Expr
    output: Expr
    scale: Expr
    final: dict[Expr, Expr]
    names: dict[Expr, str]
    meanings: tuple[dict[Expr, Expr], ...]


def derive_forward(form: RowForm, fresh: Callable[[str], str]) -> Forward:
    """The passes of a row function; `fresh` makes a name like the one it is given that nothing has yet."""
    final: dict[Expr, Expr] = {}
    passes: list[RowPass] = []
    names: dict[Expr, str] = {}
    meanings: list[dict[Expr, Expr]] = []
    for layer in range(form.last):
        update = _Update(form, layer, final, lambda r: fresh(f"running_{r.name}"))
        meanings.append(update.meaning)
        values = [(fresh(f"{r.name}_of_row"), r, s.var) for r, s in update.states.items()]
        passes.append(
            RowPass(tuple(update.states.values()), update.new_states, tuple((n, e) for n, _, e in values))
        )
        final |= {r.var: Var(name, DType.FLOAT, ("q",)) for name, r, _ in values}
        names |= update.names
    update = _Update(form, form.last, final, lambda r: r.name)
    names |= update.names
    final |= {r.var: s.var for r, s in update.states.items()}
    initial: dict[Expr, float] = {r.var: REDUCE_IDENTITY[r.kind] for r in form.reductions}
    scale = substitute(guarded(form.factor, initial), final)
    return Forward(
        tuple(passes),
        tuple(update.states.values()),
        update.at_new(form.local),
        update.new_states,
        update.rescaled(form.local),
        OUT if scale is ONE else OUT * scale,
        scale,
        final,
        names,
        (*meanings, update.meaning),
    )


class _Update:
    """One pass: the states of its reductions and their values after a tile."""

    def __init__(
        self, form: RowForm, layer: int, final: dict[Expr, Expr], name: Callable[[Reduction], str]
    ) -> None:
        own = [r for r, found in zip(form.reductions, form.layers, strict=True) if found == layer]
        self.states = {r: RowState(name(r), REDUCE_IDENTITY[r.kind]) for r in own}
        self._final = final
        self._new: dict[Expr, Expr] = {}
        self.names: dict[Expr, str] = {}
        for reduction, state in self.states.items():
            self._new[reduction.var] = new = self._new_value(reduction, state)
            self.names[new] = f"new_{reduction.name}"

    @property
    def new_states(self) -> tuple[Expr, ...]:
        return tuple(self._new[r.var] for r in self.states)

    def _new_value(self, reduction: Reduction, state: RowState) -> Expr:
        tile = Reduce(reduction.kind, self.at_new(reduction.term), "kv")
        if reduction.kind != "sum":
            return call(Op(reduction.kind), state.var, tile)
        factor = self.rescaled(reduction.term)
        return (state.var if factor is ONE else state.var * factor) + tile

    @property
    def meaning(self) -> dict[Expr, Expr]:
        """The reductions' variables -> their values after the tile."""
        return {**self._final, **self._new}

    def at_new(self, e: Expr) -> Expr:
        """e at the values after the tile, and at the final ones of earlier passes."""
        return substitute(e, self.meaning)

    def rescaled(self, e: Expr) -> Expr:
        """e(after the tile) / e(before it)."""
        moving = [v for v in self._new if touches(e, {v})]
        if not moving:
            return ONE
        found = ratio(e, moving)
        assert found is not None, "row_form puts such values into an earlier pass"
        old: dict[Expr, Expr] = {r.var: s.var for r, s in self.states.items()}
        new: dict[Expr, Expr] = {new_value(v): e for v, e in self._new.items()}
        factor = substitute(found, {**self._final, **old, **new})
        for state in self._unsafe(found, moving):  # inf / inf: nothing was summed before the first key
            factor = where(state.var.equals(state.initial), 0.0, factor)
        self.names.setdefault(factor, "rescale")
        return factor

    def _unsafe(self, found: Expr, moving: list[Expr]) -> list[RowState]:
        """The states whose initial values make a ratio that is no number: 1 / 0 or inf / 2, but not exp(-inf)."""
        states: dict[Expr, RowState] = {r.var: s for r, s in self.states.items()}
        if math.isfinite(at_start(found, {v: states[v].initial for v in moving})):
            return []
        alone = [v for v in moving if not math.isfinite(at_start(found, {v: states[v].initial}))]
        return [states[v] for v in alone or moving]


def guarded(factor: Product, initial: dict[Expr, float]) -> Expr:
    """h, but 0 where it is not a number in a row that has met no key, such as 1 / 0."""
    h = simplify(factor.expr)
    if math.isfinite(at_start(h, initial)):
        return h
    zeros = [f for f in factor.below if at_start(f, initial) == 0]
    if zeros and math.isfinite(
        at_start(Product(factor.above, tuple(f for f in factor.below if f not in zeros)).expr, initial)
    ):
        some = call(Op.NE, zeros[0], 0.0)
        for zero in zeros[1:]:
            some = some & call(Op.NE, zero, 0.0)
        return where(some, h, 0.0)
    return where(call(Op.ABS, h) < math.inf, h, 0.0)


def at_start(e: Expr, initial: dict[Expr, float]) -> Number:
    """A row value in a row without keys, at a place, number or element of 2 for everything else."""
    point: dict[Expr, Number] = {n: 2 for n in postorder(e) if isinstance(n, Var | Load)}
    try:
        return evaluate(e, {**point, **initial})
    except (ArithmeticError, ValueError):
        return math.nan


def log_of(factor: Product) -> Expr:
    """log h, factor by factor."""
    total: Expr = Const(0.0)
    for f in factor.above:
        total = simplify(total + call(Op.LOG, f))
    for f in factor.below:
        total = simplify(total - call(Op.LOG, f))
    return total


def exponent_of(e: Expr) -> Expr | None:
    """x where e = exp(x)."""
    return e.args[0] if isinstance(e, Call) and e.op is Op.EXP else None

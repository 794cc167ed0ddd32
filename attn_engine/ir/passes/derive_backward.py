"""The backward pass of a row function from its row form.

With w = a(s; r) * h(r), dP_j the gradient of weight j and delta = sum of dP_j w_j:

    ds_j = dP_j dw_j/ds + sum over sums k of g_k de_k/ds + sum over extrema k of g_k share_kj de_k/ds
    g_k  = sum_j dP_j dw_j/dr_k + sum over later m of g_m dr_m/dr_k + sum over row outputs f of d_f df/dr_k

Where log w (or log e_m) follows r_k by the same slope at every key, as everything in h does, the sum over the keys is
delta (or r_m) times that slope. Where it does not, an `adjoints` pass over the keys adds it up. A row value is a
stabiliser for the weights, or for an output, where its g is nothing: the maximum in softmax. An extremum that is none
shares its gradient evenly among the keys that reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_engine.ir.expr import Const, Expr, Full, Load, Reduce, call, loads, postorder, substitute, where
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.autodiff import derivative
from attn_engine.ir.passes.factors import exponent_slope, slope, touches
from attn_engine.ir.passes.row_form import Reduction, RowForm
from attn_engine.ir.passes.simplify import is_zero, simplify, sum_of
from attn_engine.ir.passes.symbolic import is_nothing, tidy
from attn_engine.ir.program import (
    D_PROBS,
    DELTA,
    LOGIT,
    PROBS,
    RowPass,
    RowState,
    RuleParameter,
    d_saved_var,
    saved_var,
)

# An extremum is recomputed in the backward pass, rounded differently: keys this near to it, relatively, share it.
NEARLY = 2.0**-16

_ZERO = Const(0.0)


@dataclass(frozen=True, slots=True)
class Backward:
    """recompute, gradient, adjoints and parameters as in `OnlineRule`, in terms of the reductions' variables."""

    recompute: Expr
    gradient: Expr
    adjoints: tuple[RowPass, ...]
    parameters: tuple[RuleParameter, ...]

    @property
    def roots(self) -> list[Expr]:
        """Every expression."""
        inner = [e for p in self.adjoints for e in (*p.new_states, *(x for _, x in p.values))]
        more = [e for p in self.parameters for e in (p.per_pair, p.per_row) if e is not None]
        return [self.recompute, self.gradient, *inner, *more]

    def replaced(self, known: dict[Expr, Expr]) -> Backward:
        """The same with some nodes replaced."""

        def new(e: Expr) -> Expr:
            return simplify(substitute(e, known))

        def maybe(e: Expr | None) -> Expr | None:
            return None if e is None else new(e)

        adjoints = tuple(
            RowPass(p.states, tuple(map(new, p.new_states)), tuple((n, new(e)) for n, e in p.values))
            for p in self.adjoints
        )
        parameters = tuple(
            RuleParameter(p.load, maybe(p.per_pair), maybe(p.per_row)) for p in self.parameters
        )
        return Backward(new(self.recompute), new(self.gradient), adjoints, parameters)


def derive_backward(
    form: RowForm, scale: Expr, differentiable: Sequence[tuple[str, Expr]], fresh: Callable[[str], str]
) -> Backward:
    """scale: h as the epilogue computes it. differentiable: row outputs, in the reductions' variables."""
    return _Derivation(form, scale, differentiable, fresh).backward()


class _Derivation:
    def __init__(
        self, form: RowForm, scale: Expr, outputs: Sequence[tuple[str, Expr]], fresh: Callable[[str], str]
    ) -> None:
        self.form, self.scale, self.outputs, self.fresh = form, scale, outputs, fresh
        self.states: dict[Expr, RowState] = {}  # term -> the state that sums it in the adjoint pass
        self.values: list[tuple[str, Expr]] = []
        self.weights = simplify(form.local * scale)

    def backward(self) -> Backward:
        adjoint = self.adjoints()
        inner, same = self.inner(adjoint)
        gradient = self.gradient(LOGIT, adjoint, inner, same)
        found = [self.parameter(load, adjoint, inner, same) for load in self.parameters()]
        parameters = tuple(p for p in found if p.per_pair is not None or p.per_row is not None)
        found = Backward(self.weights, gradient, self.passes(gradient, parameters), parameters)
        return found.replaced(self.form.within_extrema(found.roots))

    def passes(self, gradient: Expr, parameters: Sequence[RuleParameter]) -> tuple[RowPass, ...]:
        """The one pass that makes what the others read, where they read anything."""
        read = set(
            postorder(gradient, *(e for p in parameters for e in (p.per_pair, p.per_row) if e is not None))
        )
        values = [(name, e) for name, e in self.values if saved_var(name) in read]
        summed = set(postorder(*(e for _, e in values)))
        sums = [(term, s) for term, s in self.states.items() if s.var in summed]
        if not values:
            return ()
        new = tuple(s.var + Reduce("sum", term, "kv") for term, s in sums)
        return (RowPass(tuple(s for _, s in sums), new, tuple(values)),)

    # -- adjoints of the reductions

    def adjoints(self) -> dict[Reduction, Expr]:
        """g_k of every reduction that has one."""
        total: dict[Reduction, Expr] = {}
        seeds = [self.direct_weights, *(self.direct_output(name, e) for name, e in self.outputs)]
        for direct in seeds:
            own: dict[Reduction, Expr] = {}
            for reduction in reversed(self.form.reductions):
                if not self.moves(reduction):
                    continue
                g = direct(reduction)
                for later, g_later in own.items():
                    g = sum_of(g, self.through(later, reduction, g_later))
                if not is_zero(g) and not is_nothing(g):
                    own[reduction] = g
            for reduction, g in own.items():
                total[reduction] = sum_of(total.get(reduction, _ZERO), g)
        return {r: self.kept(r, tidy(total[r])) for r in self.form.reductions if r in total}

    def moves(self, reduction: Reduction) -> bool:
        """Whether anything can change it: a number of keys stays as it is."""
        return any(
            n is LOGIT or isinstance(n, Load) or n in self.form.variables for n in postorder(reduction.term)
        )

    def direct_weights(self, reduction: Reduction) -> Expr:
        """sum_j dP_j dw_j/dr."""
        found = slope(self.form.factor.expr, reduction.var).relative
        assert found is not None
        total = simplify(DELTA * found) if not is_zero(found) else _ZERO
        local = slope(self.form.local, reduction.var)
        if local.relative is None:
            return sum_of(
                total, self.summed(f"weights_by_{reduction.name}", D_PROBS * self.scale * local.derivative)
            )
        return total if is_zero(local.relative) else sum_of(total, simplify(DELTA * local.relative))

    def direct_output(self, name: str, value: Expr) -> Callable[[Reduction], Expr]:
        def direct(reduction: Reduction) -> Expr:
            step = derivative(value, reduction.var)
            return _ZERO if is_zero(step) else simplify(d_saved_var(name) * step)

        return direct

    def through(self, later: Reduction, reduction: Reduction, g: Expr) -> Expr:
        """g times d(later)/d(reduction)."""
        if later.kind != "sum":
            return _ZERO
        found = slope(later.term, reduction.var)
        if found.relative is None:
            return g * self.summed(f"{later.name}_by_{reduction.name}", found.derivative)
        return _ZERO if is_zero(found.relative) else simplify(g * (later.var * found.relative))

    def summed(self, name: str, term: Expr) -> Expr:
        """The sum of a term over the keys, from the adjoint pass."""
        term = simplify(term if "kv" in term.axes else term * Full(1.0, LOGIT.axes))
        if term not in self.states:
            self.states[term] = RowState(self.fresh(name), 0.0)
        return self.states[term].var

    def kept(self, reduction: Reduction, g: Expr) -> Expr:
        """g as the gradient reads it: from the adjoint pass where it needs one; of an extremum, one key's share."""
        if reduction.kind != "sum":
            hits = self.summed(f"keys_at_{reduction.name}", where(self.reaches(reduction), 1.0, 0.0))
            g = g / hits
        if not touches(g, {s.var for s in self.states.values()}):
            return g
        name = self.fresh(f"through_{reduction.name}")
        self.values.append((name, g))
        return saved_var(name)

    def reaches(self, reduction: Reduction) -> Expr:
        """Whether a key's term is the extremum, as far as rounding can tell."""
        r = reduction.var
        margin = call(Op.ABS, r) * NEARLY
        term = reduction.term if "q" in reduction.term.axes else reduction.term + Full(0.0, LOGIT.axes)
        return term >= r - margin if reduction.kind == "max" else term <= r + margin

    # -- what reaches the score and the parameters

    def inner(self, adjoint: dict[Reduction, Expr]) -> tuple[Expr, Reduction | None]:
        """dP + g / h where a reduction sums a itself: whatever moves a moves both by the same derivative."""
        same = next((r for r in adjoint if r.kind == "sum" and r.term is self.form.local), None)
        if same is None:
            return D_PROBS, None
        further = tidy(adjoint[same] / self.form.factor.expr)
        if len(postorder(further)) > len(postorder(adjoint[same])):  # h has not gone
            return D_PROBS, None
        return simplify(D_PROBS + further), same

    def gradient(
        self, wrt: Expr, adjoint: dict[Reduction, Expr], inner: Expr, same: Reduction | None
    ) -> Expr:
        """d(loss)/d(wrt) through one key."""
        total = self.weights_slope(wrt, inner)
        for reduction, g in adjoint.items():
            if reduction is not same:
                total = sum_of(total, self.per_key(reduction, g, wrt))
        return simplify(total)

    def weights_slope(self, wrt: Expr, seed: Expr) -> Expr:
        """seed * dw/d(wrt), through a."""
        by_exponent = exponent_slope(self.form.local, wrt)
        if by_exponent is not None:
            return simplify(PROBS * seed * by_exponent) if not is_zero(by_exponent) else _ZERO
        step = derivative(self.form.local, wrt)
        if is_zero(step):
            return _ZERO
        step = substitute(step, {self.weights: PROBS})
        return simplify(seed * step if is_one(self.scale) else seed * self.scale * step)

    def per_key(self, reduction: Reduction, g: Expr, wrt: Expr) -> Expr:
        """g * d(reduction)/d(wrt) through one key."""
        step = derivative(reduction.term, wrt)
        if is_zero(step):
            return _ZERO
        if reduction.kind == "sum":
            return simplify(g * step)
        return where(self.reaches(reduction), simplify(g * step), 0.0)

    def parameters(self) -> list[Load]:
        """Reads of floating tensors."""
        roots = (self.weights, *(r.term for r in self.form.reductions), *(e for _, e in self.outputs))
        found = {load: None for root in roots for load in loads(root) if load.dtype is DType.FLOAT}
        return list(found)

    def parameter(
        self, load: Load, adjoint: dict[Reduction, Expr], inner: Expr, same: Reduction | None
    ) -> RuleParameter:
        """What reaches a read by the row, where its slope is the row's, and by the pairs otherwise."""
        row: Expr = _ZERO
        terms = [self.form.local, *(r.term for r in adjoint)]
        relative = [slope(e, load).relative for e in terms]
        by_row = all(x is not None for x in relative) and all(r.kind == "sum" for r in adjoint)
        if by_row:
            seeds = [DELTA, *(g * r.var for r, g in adjoint.items())]
            for seed, x in zip(seeds, relative, strict=True):
                row = row if x is None or is_zero(x) else sum_of(row, simplify(seed * x))
        pair = _ZERO if by_row else self.gradient(load, adjoint, inner, same)
        through_h = slope(self.form.factor.expr, load).relative
        if through_h is not None and not is_zero(through_h):
            row = sum_of(row, simplify(DELTA * through_h))
        for name, value in self.outputs:
            step = derivative(value, load)
            row = row if is_zero(step) else sum_of(row, simplify(d_saved_var(name) * step))
        if not self.form.reductions and not is_zero(
            row
        ):  # delta is the pairs' sum, and no row value tells empty rows
            pair, row = sum_of(pair, simplify(substitute(row, {DELTA: PROBS * D_PROBS}))), _ZERO
        return RuleParameter(load, None if is_zero(pair) else pair, None if is_zero(row) else tidy(row))


def is_one(e: Expr) -> bool:
    return isinstance(e, Const) and e.value == 1

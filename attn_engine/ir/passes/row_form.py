"""A row function in order: its reductions, the weight as a product, and in how many passes over the keys it can be had.

    reductions  r_1 .. r_n:  r_k = max, min or sum over the keys of e_k(s; r_1 .. r_k-1)
    weight      w = a(s; r) * h(r)

A row value r may still move while e (or a) is being summed, and be found in the same pass, where e(s; r') / e(s; r)
does not depend on the score s: the sum so far is multiplied by that ratio. Otherwise r needs a pass of its own before.
The reductions are a graph; its longest path counts the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from attn_engine.ir.expr import Call, Const, Expr, Full, Reduce, Var, call, postorder, substitute, variables
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.factors import Product, exponential_ratio, factors, is_exponential, split, touches
from attn_engine.ir.passes.simplify import sum_of
from attn_engine.ir.passes.symbolic import agree, expanded, ratio_free_of_score, tidy
from attn_engine.ir.printer import format_expr
from attn_engine.ir.program import LOGIT, saved_var


class NotDerivable(Exception):
    """Why a rule cannot be derived."""


class NotOrdered(NotDerivable):
    """A maximum or minimum of something that is itself made from a reduction."""

    def __init__(self, reduction: Reduce) -> None:
        super().__init__(f"{format_expr(reduction)} depends on another reduction")
        self.reduction = reduction


@dataclass(frozen=True, slots=True)
class Reduction:
    """r = max, min or sum (`kind`) over the keys of `term`; earlier reductions' variables stand for their values."""

    name: str
    kind: str
    term: Expr

    @property
    def var(self) -> Var:
        return saved_var(self.name)


@dataclass(frozen=True, slots=True)
class RowForm:
    """reductions in an order in which each follows those it reads; w = local * factor; outputs in their variables.

    layers: the pass that finds each reduction, from 0. last: the pass that sums the weighted values. reasons: why it is
    not 0, in a user's words. known: what each `Reduce` of the user's expressions has become.
    """

    reductions: tuple[Reduction, ...]
    local: Expr
    factor: Product
    outputs: tuple[tuple[str, Expr], ...]
    layers: tuple[int, ...]
    last: int
    reasons: tuple[str, ...]
    known: dict[Expr, Expr] = field(default_factory=dict[Expr, Expr], compare=False, repr=False)

    @property
    def variables(self) -> tuple[Var, ...]:
        return tuple(r.var for r in self.reductions)

    def within_extrema(self, roots: Sequence[Expr]) -> dict[Expr, Expr]:
        """s - max(s) -> min(s - max(s), 0), wherever it occurs in `roots`; likewise for minima.

        A score that is computed again is rounded differently: by 1 at scores of 1e7, so that exp(s - max) could be
        anything up to infinity.
        """
        bound: dict[tuple[Expr, ...], str] = {
            (r.term, r.var): r.kind for r in self.reductions if r.kind != "sum"
        }
        found: dict[Expr, Expr] = {}
        for node in postorder(*roots):
            if isinstance(node, Call) and node.op is Op.SUB and len(node.args) == 2:
                kind = bound.get(node.args)
                if kind is not None:
                    found[node] = call(Op.MIN if kind == "max" else Op.MAX, node, 0.0)
        return found

    def layer_of(self, reduction: Reduction) -> int:
        return self.layers[self.reductions.index(reduction)]


def row_form(
    weights: Expr,
    outputs: Sequence[tuple[str, Expr]],
    name_of: Callable[[Reduce], str],
    *,
    separate: bool = False,
    words: Sequence[tuple[Expr, str]] = (),
) -> RowForm:
    """The row form of weights (q, kv) and row outputs (q), which hold `Reduce` nodes.

    separate: give every row value that others read a pass of its own, whatever its ratios are. words: the user's
    names of values on the way, for `reasons`. Raises NotDerivable.
    """
    plain = _form(weights, outputs, _Reductions(name_of, separate, expand=False), words)
    if plain.last == 0 or separate:
        return plain
    opened = _form(weights, outputs, _Reductions(name_of, separate, expand=True), words)
    return opened if opened.last < plain.last else plain


def _form(
    weights: Expr, outputs: Sequence[tuple[str, Expr]], found: _Reductions, words: Sequence[tuple[Expr, str]]
) -> RowForm:
    for node in postorder(weights, *(e for _, e in outputs)):
        if isinstance(node, Reduce):
            found.add(node)
    whole = substitute(weights, found.known)
    local, factor = split(whole, lambda f: "kv" not in f.axes)
    if "kv" not in local.axes:
        local = local * Full(1.0, LOGIT.axes)
    rows = tuple((name, substitute(e, found.known)) for name, e in outputs)
    named = {substitute(e, found.known): Var(name, e.dtype, e.axes) for e, name in words if e.axes == ("q",)}
    layers, last, reasons = _layers(found, local, {e: v for e, v in named.items() if not isinstance(e, Var)})
    return RowForm(tuple(found.items), local, factor, rows, layers, last, reasons, found.known)


class _Reductions:
    """The reductions met so far."""

    def __init__(self, name_of: Callable[[Reduce], str], separate: bool, expand: bool) -> None:
        self.items: list[Reduction] = []
        self.known: dict[Expr, Expr] = {}
        self.separate = separate
        self._expand = expand
        self._name_of = name_of

    @property
    def variables(self) -> set[Expr]:
        return {r.var for r in self.items}

    def add(self, node: Reduce) -> None:
        term = substitute(node.x, self.known)
        if node.kind == "sum":
            self.known[node] = self._sum(node, term)
        elif touches(term, self.variables):
            raise NotOrdered(node)
        else:
            self.known[node] = self._reduction(node, term)

    def _reduction(self, node: Reduce, term: Expr) -> Var:
        known = next((r for r in self.items if r.kind == node.kind and r.term is term), None)
        if known is None:
            known = Reduction(self._name_of(node), node.kind, term)
            self.items.append(known)
        return known.var

    def _sum(self, node: Reduce, term: Expr) -> Expr:
        """h * sum(a) for a term a * h; of several such terms where that saves a pass.

        Only weighted sums are taken apart, those with an exponential: a variance would lose its digits.
        """
        a, h = self._split(term)
        parts = [(a, h)]
        if self._expand and self._moving(a) and any(is_exponential(f) for f in factors(a).above):
            terms = [split(t, lambda f: "kv" not in f.axes) for t in expanded(term)]
            terms = [(a if "kv" in a.axes else Full(1.0, LOGIT.axes), h) for a, h in terms]
            if len(terms) > 1 and not any(self._moving(t) for t, _ in terms):
                parts = terms
        total: Expr = Const(0.0)
        for a, h in parts:
            row = self._reduction(node, a)
            total = sum_of(total, row if h == Product(()) else Product((row, *h.above), h.below).expr)
        return tidy(total) if len(parts) > 1 else total

    def _split(self, term: Expr) -> tuple[Expr, Product]:
        variables = self.variables
        a, h = split(term, lambda f: "kv" not in f.axes and touches(f, variables))
        return (a, h) if "kv" in a.axes else (term, Product(()))

    def _moving(self, a: Expr) -> list[Reduction]:
        """The reductions that must be final before `a` is summed."""
        return [
            r for r in self.items if touches(a, {r.var}) and (self.separate or ratio(a, (r.var,)) is None)
        ]


def new_value(var: Expr) -> Var:
    """The variable of a row value after the next tile."""
    assert isinstance(var, Var)
    return Var(f"new_{var.name}", DType.FLOAT, ("q",))


def ratio(e: Expr, moved: Sequence[Expr]) -> Expr | None:
    """e(new) / e(old) when these row values move to `new_value` of theirs; None where it depends on the score.

    sympy decides, numbers at random points guard it; the form is the exponential's own where it has one.
    """
    step: dict[Expr, Expr] = {v: new_value(v) for v in moved}
    proved = ratio_free_of_score(e, step)
    if proved is None:
        return None
    visible = exponential_ratio(e, step)
    return visible if visible is not None and agree(visible, proved) else proved


def _layers(
    found: _Reductions, local: Expr, words: dict[Expr, Var]
) -> tuple[tuple[int, ...], int, tuple[str, ...]]:
    """The pass of each reduction and of the weights: the longest path; an edge counts 1 where a value must be final."""
    import networkx

    make: Any = networkx.DiGraph
    graph = make()
    weights = "weights"
    for i, reduction in enumerate(found.items):
        graph.add_node(i)
        for j, earlier in enumerate(found.items[:i]):
            if touches(reduction.term, {earlier.var}):
                graph.add_edge(j, i, final=_must_be_final(found, reduction.term, earlier))
    graph.add_node(weights)
    for j, earlier in enumerate(found.items):
        graph.add_edge(
            j, weights, final=touches(local, {earlier.var}) and _must_be_final(found, local, earlier)
        )
    layer: dict[object, int] = {}
    order: Any = networkx.topological_sort(graph)
    for node in order:
        before = (layer[j] + graph.edges[j, node]["final"] for j in graph.predecessors(node))
        layer[node] = max(before, default=0)
    reasons: list[str] = []
    for node in (*range(len(found.items)), weights):
        before = cast("list[int]", [j for j in graph.predecessors(node) if graph.edges[j, node]["final"]])
        finals = [found.items[j] for j in before]
        if finals:
            reader = weights if isinstance(node, str) else found.items[node]
            reasons.append(_reason(finals, reader, local, words))
    return tuple(layer[i] for i in range(len(found.items))), max(layer.values()), tuple(reasons)


def _must_be_final(found: _Reductions, e: Expr, reduction: Reduction) -> bool:
    return found.separate or ratio(e, (reduction.var,)) is None


def _reason(finals: Sequence[Reduction], reader: Reduction | str, local: Expr, words: dict[Expr, Var]) -> str:
    """Why these values need a pass before, in the user's names where there are some."""
    told = substitute(local if isinstance(reader, str) else reader.term, dict(words))
    needed: set[Expr] = {r.var for r in finals}
    named = {var for meaning, var in words.items() if touches(meaning, needed)}
    values = " and ".join(v.name for v in variables(told) if v in needed | named)
    what = "the weight" if isinstance(reader, str) else f"the {reader.kind} {reader.name}, of"
    return f"{what} {format_expr(told)} needs {values} of the whole row: a change would scale each score differently"

"""How two partial results of one query row, over disjoint keys, become one: derived from the normaliser's update.

For the states a and b of the two parts (spec of a rule: `OnlineRule`):

    a maximum:  max(a, b)
    a sum:      what the update makes of a when it meets b's maxima and adds nothing, plus the same of b
    output:     out * left_scale + part_out * right_scale: out_scale from each part's states to the merged ones

`derive_merge` tries the result on random rows before anyone may use it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Expr, Reduce, Var, call, postorder, substitute, where
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.passes.rule_analysis import in_dependency_order, tile_extremum
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.passes.try_rule import Row, fold, placeholders
from attn_engine.ir.program import OUT, OnlineRule, RowState

_TRIALS = 8
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class MergeRule:
    """The merged states, one per state of the rule, and the factors of the two un-normalised outputs.

    Everything is in terms of the rule's state variables (the left part) and `part_var` of each state (the right part).
    `names` names the values on the way.
    """

    states: tuple[Expr, ...]
    left_scale: Expr
    right_scale: Expr
    names: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class NotMergeable:
    """Why two parts of a row cannot be merged: such a row is computed in one piece."""

    reason: str


def part_var(state: RowState) -> Var:
    """The variable of a state's value in the right part."""
    return Var(f"part_{state.name}", DType.FLOAT, ("q",))


@lru_cache(maxsize=256)
def derive_merge(rule: OnlineRule) -> MergeRule | NotMergeable:
    """The rule's merge, or why it has none.

    Softmax: new_row_max = max(row_max, part_row_max), and row_sum * exp(row_max - new_row_max) + the same of the part.
    """
    if rule.earlier:
        return NotMergeable(
            f"{rule.name} needs {len(rule.earlier) + 1} passes over the keys, each with all keys of the row"
        )
    merge = _Derivation(rule).merge()
    try:
        problem = _problem(rule, merge)
    except (ArithmeticError, ValueError) as error:
        problem = f"its update cannot be evaluated on random rows ({error})"
    return merge if problem is None else NotMergeable(problem)


class _Derivation:
    def __init__(self, rule: OnlineRule) -> None:
        self.rule = rule
        self.pairs = in_dependency_order(rule)
        self.merged: dict[RowState, Expr] = {}
        self.met: dict[Expr, Expr] = {}  # a state's new value -> what a factor reads in its place
        self.names: dict[Expr, str] = {}

    def merge(self) -> MergeRule:
        for state, new in self.pairs:
            self.merged[state] = self.of_state(state, new)
            self.met[new] = self.merged[state]
            if isinstance(self.merged[state], Var):
                continue
            self.names[self.merged[state]] = f"new_{state.name}"
            if math.isinf(state.initial):
                # Two parts without a visible key leave the initial value: 0 instead keeps inf - inf away from NaN.
                merged = self.merged[state]
                self.met[new] = where(merged.equals(state.initial), 0.0, merged)
                self.names[self.met[new]] = f"safe_{state.name}"
        left = self.seen_from(self.rule.out_scale, self.left, self.right)
        right = self.seen_from(self.rule.out_scale, self.right, self.left)
        self.names |= {e: name for e, name in ((left, "rescale"), (right, "part_rescale")) if e.axes}
        return MergeRule(tuple(self.merged[s] for s in self.rule.states), left, right, self.names)

    @property
    def left(self) -> dict[Expr, Expr]:
        return {s.var: s.var for s in self.rule.states}

    @property
    def right(self) -> dict[Expr, Expr]:
        return {s.var: part_var(s) for s in self.rule.states}

    def of_state(self, state: RowState, new: Expr) -> Expr:
        if isinstance(found := tile_extremum(state, new), Reduce):
            return call(Op(found.kind), state.var, part_var(state))
        others = {n: self.merged[s] for s, n in self.pairs if s in self.merged}
        value = substitute(new, others)
        if not any(isinstance(n, Reduce) or n is state.var for n in postorder(value)):
            return value  # it follows from the other states
        return simplify(
            self.seen_from(new, self.left, self.right) + self.seen_from(new, self.right, self.left)
        )

    def seen_from(self, e: Expr, own: dict[Expr, Expr], other: dict[Expr, Expr]) -> Expr:
        """e of one part's states, where the tile is the other part: its maxima are known, its sums are left out."""
        replacements: dict[Expr, Expr] = {**own, **self.met}
        for state, new in self.pairs:
            found = tile_extremum(state, new)
            if found is not None:
                replacements[found] = other[state.var]
        for node in postorder(e):
            if isinstance(node, Reduce) and node.kind == "sum":
                replacements[node] = Const(0.0)
        return simplify(substitute(e, replacements))


# -- trying it


def _problem(rule: OnlineRule, merge: MergeRule) -> str | None:
    """What goes wrong when random rows are cut and merged; None where nothing does."""
    source = random.Random(7)
    roots = (rule.weights, rule.out_scale, *rule.new_states)
    for _ in range(_TRIALS):
        others = placeholders(source, roots, [s.var for s in rule.states])
        left, right = _random_tiles(source), _random_tiles(source)
        whole = fold(rule, left + right, others)
        a, b, empty = (fold(rule, tiles, others) for tiles in (left, right, []))
        for x, y, expected, what in (
            (a, b, whole, "two parts of a row"),
            (b, a, whole, "the same two parts in the other order"),
            (a, empty, a, "a part and no key"),
            (empty, a, a, "no key and a part"),
            (empty, empty, empty, "no key twice"),
        ):
            difference = _difference(rule, merged(rule, merge, x, y), expected)
            if difference is not None:
                return f"merging {what} does not give the row: {difference}"
    return None


def _random_tiles(source: random.Random) -> list[list[tuple[float, float]]]:
    """One to three tiles of (score, value) pairs."""
    return [
        [(source.uniform(-3, 3), source.uniform(-2, 2)) for _ in range(source.randrange(1, 5))]
        for _ in range(source.randrange(1, 4))
    ]


def merged(rule: OnlineRule, merge: MergeRule, a: Row, b: Row) -> Row:
    """Two parts of a row as one, in numbers."""
    known = {**a.known, **a.states, **{part_var(s): b.states[s.var] for s in rule.states}}
    states: dict[Expr, Number] = {
        s.var: evaluate(e, known) for s, e in zip(rule.states, merge.states, strict=True)
    }
    out = a.out * evaluate(merge.left_scale, known) + b.out * evaluate(merge.right_scale, known)
    return Row(states, out, a.known)


def _difference(rule: OnlineRule, got: Row, want: Row) -> str | None:
    pairs = [(f"row value {s.name!r}", got.states[s.var], want.states[s.var]) for s in rule.states]
    for name, x, y in [*pairs, (OUT.name, got.out, want.out)]:
        if x != y and not abs(x - y) <= _TOLERANCE * (1 + abs(x) + abs(y)):
            return f"{name} is {x:.6g} instead of {y:.6g}"
    return None

"""Rules tried on random rows, in plain Python numbers: tiles, passes, merging and gradients, one score at a time.

Values have one dimension. The row is given as (score, value) pairs, one list a tile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Expr, Load, Reduce, Var, postorder
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.program import (
    BATCH,
    D_PROBS,
    DELTA,
    HEAD,
    KV_IDX,
    LOGIT,
    OUT,
    PROBS,
    Q_IDX,
    OnlineRule,
    RowPass,
    RowState,
    d_saved_var,
    saved_var,
)

Keys = Sequence[tuple[float, float]]
Values = Mapping[Expr, Number]
_REDUCTION = {"max": max, "min": min, "sum": sum}
_TOLERANCE = 1e-9
_STEP = 1e-5
_SLOPE_TOLERANCE = 2e-5


@dataclass(frozen=True, slots=True)
class Row:
    """A row after some tiles: its states, its un-normalised output and the values of the passes before."""

    states: dict[Expr, Number]
    out: Number
    known: dict[Expr, Number]


def placeholders(
    source: random.Random, roots: Iterable[Expr], without: Iterable[Expr] = ()
) -> dict[Expr, Number]:
    """Random values for what a rule reads besides the scores: positions, runtime numbers, elements of tensors."""
    skipped = {LOGIT, OUT, PROBS, D_PROBS, DELTA, KV_IDX, *without}
    found = [n for n in postorder(*roots) if isinstance(n, Load | Var) and n not in skipped]
    positions = {BATCH: 1, HEAD: 2, Q_IDX: 3}
    return {
        n: positions[n]
        if n in positions
        else source.randrange(1, 9)
        if n.dtype is DType.INT
        else source.uniform(0.2, 1.2)
        for n in found
    }


def forward_roots(rule: OnlineRule) -> list[Expr]:
    """Every expression of the forward pass."""
    passes = [e for p in rule.earlier for e in (*p.new_states, *(x for _, x in p.values))]
    return [*passes, rule.weights, rule.out_scale, *rule.new_states, rule.output, *(e for _, e in rule.saved)]


def made_by(rule: OnlineRule) -> list[Expr]:
    """The variables that a rule's own passes give values to."""
    states = [s.var for p in (*rule.earlier, *rule.adjoints) for s in p.states]
    values = [saved_var(name) for p in (*rule.earlier, *rule.adjoints) for name, _ in p.values]
    gradients = [d_saved_var(name) for name, _ in rule.saved]
    return [*states, *values, *(s.var for s in rule.states), *rule.saved_vars, *gradients]


def fold(rule: OnlineRule, tiles: Sequence[Keys], others: Values) -> Row:
    """The rule's own passes and update, tile after tile."""
    known: dict[Expr, Number] = dict(others)
    for step in rule.earlier:
        known |= _pass(step, tiles, known)
    row = Row({s.var: s.initial for s in rule.states}, 0.0, known)
    roots = (rule.weights, rule.out_scale, *rule.new_states)
    for tile in tiles:
        before = {**known, **row.states, LOGIT: tile[0][0]}
        reduced = with_reductions(roots, before, [{LOGIT: s} for s, _ in tile])
        out = row.out * evaluate(rule.out_scale, reduced) if row.out else 0.0
        out += sum(evaluate(rule.weights, {**reduced, LOGIT: s}) * v for s, v in tile)
        row = Row(_stepped(rule.states, rule.new_states, reduced), out, known)
    return row


def _pass(step: RowPass, tiles: Sequence[Keys], known: Values) -> dict[Expr, Number]:
    states: dict[Expr, Number] = {s.var: s.initial for s in step.states}
    for tile in tiles:
        before = {**known, **states, LOGIT: tile[0][0]}
        reduced = with_reductions(step.new_states, before, [{LOGIT: s} for s, _ in tile])
        states = _stepped(step.states, step.new_states, reduced)
    return {saved_var(name): evaluate(e, {**known, **states}) for name, e in step.values}


def _stepped(states: Sequence[RowState], new: Sequence[Expr], known: Values) -> dict[Expr, Number]:
    return {s.var: evaluate(e, known) for s, e in zip(states, new, strict=True)}


def with_reductions(
    roots: Sequence[Expr], known: Values, keys: Sequence[Mapping[Expr, Number]]
) -> dict[Expr, Number]:
    """`known`, and the values of the reductions in `roots` over the keys, each of which gives its own variables."""
    found: dict[Expr, Number] = dict(known)
    for node in postorder(*roots):
        if isinstance(node, Reduce):
            found[node] = _REDUCTION[node.kind]([evaluate(node.x, {**found, **key}) for key in keys])
    return found


def finished(rule: OnlineRule, row: Row) -> tuple[Number, dict[str, Number]]:
    """The output and the saved row values."""
    known = {**row.known, **row.states, OUT: row.out}
    return evaluate(rule.output, known), {name: evaluate(e, known) for name, e in rule.saved}


def gradients_of(
    rule: OnlineRule, keys: Keys, others: Values, d_out: float, d_saved: Mapping[str, float]
) -> tuple[list[Number], dict[Load, Number]]:
    """d(loss)/d(score) of every key, and d(loss)/d(read) of the rule's parameters, by its backward expressions."""
    output, saved = finished(rule, fold(rule, [keys], others))
    known: dict[Expr, Number] = {**others, DELTA: d_out * output}
    known |= {saved_var(n): x for n, x in saved.items()}
    known |= {d_saved_var(n): d_saved.get(n, 0.0) for n, _ in rule.saved}
    pairs: list[dict[Expr, Number]] = [{LOGIT: s, D_PROBS: d_out * v} for s, v in keys]
    pairs = [{**p, PROBS: evaluate(rule.recompute, {**known, **p})} for p in pairs]
    for step in rule.adjoints:
        start: dict[Expr, Number] = {s.var: s.initial for s in step.states}
        reduced = with_reductions(step.new_states, {**known, **start, **pairs[0]}, pairs)
        states = _stepped(step.states, step.new_states, reduced)
        known |= {saved_var(n): evaluate(e, {**known, **states}) for n, e in step.values}
    scores = [evaluate(rule.gradient, {**known, **p}) for p in pairs]
    reads: dict[Load, Number] = {}
    for parameter in rule.parameters:
        total: Number = 0.0 if parameter.per_row is None else evaluate(parameter.per_row, known)
        if parameter.per_pair is not None:
            total += sum(evaluate(parameter.per_pair, {**known, **p}) for p in pairs)
        reads[parameter.load] = total
    return scores, reads


# -- what may be wrong with a rule


def problem_of(rule: OnlineRule, _: object = None) -> str | None:
    """What goes wrong when random rows are computed tile by tile and differentiated; None where nothing does."""
    source = random.Random(11)
    try:
        for low in (-2.5, 0.2, -2.5):
            keys = [(source.uniform(low, 2.5), source.uniform(-2, 2)) for _ in range(5)]
            others = placeholders(source, forward_roots(rule), made_by(rule))
            found = _tiles_differ(rule, keys, others) or _gradient_differs(rule, keys, others, source)
            if found is not None:
                return found
    except (ArithmeticError, ValueError) as error:
        return f"it cannot be evaluated on random rows ({error})"
    return None


def _tiles_differ(rule: OnlineRule, keys: Keys, others: Values) -> str | None:
    want, rows = finished(rule, fold(rule, [keys], others))
    for tiles in ([keys[:2], keys[2:]], [[key] for key in keys]):
        got, got_rows = finished(rule, fold(rule, tiles, others))
        for what, x, y in [("output", got, want), *((repr(n), got_rows[n], rows[n]) for n in rows)]:
            if math.isfinite(y) and not abs(x - y) <= _TOLERANCE * (1 + abs(x) + abs(y)):
                return f"{what} is {x:.6g} in {len(tiles)} tiles and {y:.6g} in one"
    return None


def _gradient_differs(rule: OnlineRule, keys: Keys, others: Values, source: random.Random) -> str | None:
    used = set(postorder(rule.gradient, *(e for p in rule.adjoints for _, e in p.values)))
    seeds = {n: source.uniform(-1, 1) for n, _ in rule.saved if d_saved_var(n) in used}
    weight = source.uniform(0.5, 1.5)

    def loss(keys: Keys, others: Values) -> float:
        output, rows = finished(rule, fold(rule, [keys], others))
        return weight * output + sum(seeds[n] * rows[n] for n in seeds)

    if not math.isfinite(loss(keys, others)):
        return None
    scores, reads = gradients_of(rule, keys, others, weight, seeds)
    for j, ((s, v), got) in enumerate(zip(keys, scores, strict=True)):
        above, below = ([*keys[:j], (s + d, v), *keys[j + 1 :]] for d in (_STEP, -_STEP))
        want = (loss(above, others) - loss(below, others)) / (2 * _STEP)
        if not abs(got - want) <= _SLOPE_TOLERANCE * (1 + abs(got) + abs(want)):
            return f"the derived gradient of a score is {got:.6g}, but differences give {want:.6g}"
    for load, got in reads.items():
        above, below = ({**others, load: others[load] + d} for d in (_STEP, -_STEP))
        want = (loss(keys, above) - loss(keys, below)) / (2 * _STEP)
        if not abs(got - want) <= _SLOPE_TOLERANCE * (1 + abs(got) + abs(want)):
            return f"the derived gradient of {load.tensor} is {got:.6g}, but differences give {want:.6g}"
    return None

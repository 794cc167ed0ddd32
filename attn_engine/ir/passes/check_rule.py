"""What a user's methods say against what is derived from online_fwd: forward, backward, combine, and any tiles."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.passes.derive_rule import Given, complete_rule
from attn_engine.ir.passes.row_form import NotDerivable
from attn_engine.ir.passes.try_rule import (
    Keys,
    Values,
    finished,
    fold,
    forward_roots,
    gradients_of,
    made_by,
    placeholders,
    with_reductions,
)
from attn_engine.ir.program import LOGIT, OnlineRule, saved_var

LIMIT = 1e-6
_ROWS = 4


@dataclass(frozen=True, slots=True)
class MethodReport:
    """The largest difference between what a method gives and what follows from the others, relative to 1 + its size."""

    method: str
    error: float
    against: str

    @property
    def ok(self) -> bool:
        """Within LIMIT; NaN is not."""
        return self.error <= LIMIT

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{self.method}: differs from {self.against} by {self.error:.2e}  {verdict}"


def check_methods(
    rule: OnlineRule, given: Collection[str], combine: Expr | None, taken: frozenset[str] = frozenset()
) -> tuple[MethodReport, ...]:
    """A report for online_fwd and for each method in `given`, on random rows.

    combine: the factors of the parts' outputs, in terms of the saved rows, whose axis "kv" numbers the parts.
    """
    source = random.Random(5)
    rows = [[(source.uniform(-2.5, 2.5), source.uniform(-2, 2)) for _ in range(7)] for _ in range(_ROWS)]
    others = placeholders(source, forward_roots(rule), made_by(rule))
    reports = [
        MethodReport("online_fwd", _worst(_tiles(rule, r, others) for r in rows), "itself in smaller tiles")
    ]
    if combine is not None and "combine" in given:
        error = _worst(_combined(rule, combine, r, others) for r in rows)
        reports.append(MethodReport("combine", error, "the row computed in one part"))
    try:
        derived = complete_rule(rule, Given(None, None), taken)
    except NotDerivable:
        return tuple(reports)  # nothing to compare with
    if "forward" in given:
        error = _worst(_weights(rule, derived, r, others) for r in rows)
        reports.append(MethodReport("forward", error, "the weights of online_fwd and its epilogue"))
    if "backward" in given:
        error = _worst(_gradients(rule, derived, r, others) for r in rows)
        reports.append(MethodReport("backward", error, "the derived gradient"))
    return tuple(reports)


Pairs = Sequence[tuple[Number, Number]]


def _worst(trials: Iterable[Pairs]) -> float:
    worst = 0.0
    for pairs in trials:
        for got, want in pairs:
            error = 0.0 if got == want else abs(got - want) / (1 + abs(want))
            if not error <= worst:  # also NaN
                worst = error
    return worst


def _tiles(rule: OnlineRule, keys: Keys, others: Values) -> Pairs:
    want, rows = finished(rule, fold(rule, [keys], others))
    found: list[tuple[Number, Number]] = []
    for tiles in ([keys[:3], keys[3:]], [[key] for key in keys]):
        got, got_rows = finished(rule, fold(rule, tiles, others))
        found += [(got, want), *((got_rows[n], rows[n]) for n in rows)]
    return found


def _weights(rule: OnlineRule, derived: OnlineRule, keys: Keys, others: Values) -> Pairs:
    def weights(r: OnlineRule) -> list[Number]:
        _, saved = finished(r, fold(r, [keys], others))
        known = {**others, **{saved_var(n): x for n, x in saved.items()}}
        return [evaluate(r.recompute, {**known, LOGIT: s}) for s, _ in keys]

    return list(zip(weights(rule), weights(derived), strict=True))


def _gradients(rule: OnlineRule, derived: OnlineRule, keys: Keys, others: Values) -> Pairs:
    got, _ = gradients_of(rule, keys, others, 0.8, {})
    want, _ = gradients_of(derived, keys, others, 0.8, {})
    return list(zip(got, want, strict=True))


def _combined(rule: OnlineRule, combine: Expr, keys: Keys, others: Values) -> Pairs:
    """The parts' finished outputs, weighted by `combine`, against the output of the whole row."""
    want, _ = finished(rule, fold(rule, [keys], others))
    parts = [finished(rule, fold(rule, [part], others)) for part in (keys[:1], keys[1:5], keys[5:])]
    points = [{part_rows(name): x for name, x in saved.items()} for _, saved in parts]
    known = with_reductions([combine], others, points)
    factors = [evaluate(combine, {**known, **point}) for point in points]
    return [(sum(f * o for f, (o, _) in zip(factors, parts, strict=True)), want)]


def part_rows(name: str) -> Expr:
    """The variable of a saved row value in `combine`: one for each part."""
    return Var(f"{name}_of_parts", DType.FLOAT, ("q", "kv"))

"""Scores of one (q, kv) pair of tiles, forward and backward: the part that every attention kernel shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from attn_engine.codegen.lower.emit import LOG2_E, Emitter, Names, base_two
from attn_engine.codegen.lower.values import INSIDE, KEY, QUERY, SCALE, SCALE_LOG2
from attn_engine.ir.expr import Call, Const, Dot, Expr, Load, Var, loads, postorder, substitute
from attn_engine.ir.kernel_words import KERNEL_WORDS
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import LOGIT, SCORE, Attention, OnlineRule, ScalarFn, d_saved_var
from attn_engine.ir.tile import Let, Stmt

# How a step masks its tile: not, everywhere, under a condition on the tile, or only beyond the ends of the axes.
ENDS: Final = "ends"


@dataclass(frozen=True, slots=True)
class InParts:
    """A tile of which only some parts are there (bool): masked everywhere, and by that."""

    there: Expr


Masked = bool | Expr | Literal["ends"] | InParts


def reserved_names(program: Attention) -> Names:
    """Names taken in every kernel of the program: the shared ones, its tensors, its numbers and its row values."""
    taken = set(KERNEL_WORDS) | {c.name for c in program.captures} | {s.name for s in program.scalars}
    passes = (*program.rule.earlier, *program.rule.adjoints)
    taken |= {name for p in passes for name, _ in p.values}
    for state in (*program.rule.states, *(s for p in passes for s in p.states)):
        taken |= {state.name, f"part_{state.name}", f"partial_{state.name}"}
    for name, _ in program.rule.saved:
        taken |= {name, d_saved_var(name).name}
    return Names(taken)


def hoisted(
    program: Attention, names: Names, loop: str, rule_roots: Sequence[Expr] = ()
) -> tuple[list[Stmt], dict[Expr, Expr]]:
    """Captured values that do not change along the loop axis, and quotients of query positions, before the loop.

    rule_roots: expressions of the row rule that the loop computes.
    """
    lets: list[Stmt] = []
    known: dict[Expr, Expr] = {}

    def before(node: Expr, wanted: str, fn: ScalarFn | OnlineRule) -> None:
        let = Let(
            names.fresh(fn.names.get(node) or wanted), substitute(node, known), fn.sources.get(node, "")
        )
        lets.append(let)
        known[node] = let.var

    for fn in program.functions:
        for node in quotients(fn.result) if loop == "kv" else []:
            if node not in known:
                before(node, "remainder" if isinstance(node, Call) and node.op is Op.MOD else "quotient", fn)
        for load in loads(fn.result):
            if loop in load.axes or load in known or any(loads(i) for i in load.indices):
                continue
            before(load, f"{load.tensor}_{'row' if load.axes else 'value'}", fn)
    for load in dict.fromkeys(x for root in rule_roots for x in loads(root)):
        if loop not in load.axes and load not in known and not any(loads(i) for i in load.indices):
            before(load, f"{load.tensor}_{'row' if load.axes else 'value'}", program.rule)
    return lets, known


def quotients(root: Expr) -> list[Expr]:
    """Integer divisions of query positions: slow, and the same for every key."""
    divisions = (Op.FLOORDIV, Op.MOD)
    return [
        e
        for e in postorder(root)
        if isinstance(e, Call) and e.op in divisions and e.axes == ("q",) and not loads(e)
    ]


def score_lets(program: Attention, emitter: Emitter) -> Expr:
    """score = query . key * scale, then the user's score_mod; returns what the row rule reads as LOGIT."""
    emitter.let(SCORE.name, Dot(QUERY, KEY) * (1.0 if scale_is_folded(program) else SCALE))
    if program.score is None:
        emitter.bind(LOGIT, logit_of(program, SCORE))
        return SCORE
    fn = program.score
    logit = emitter.value(fn.result, fn.names, fn.sources)
    if not isinstance(logit, Var):
        logit = emitter.let(LOGIT.name, logit, fn.sources.get(fn.result, ""))
    emitter.bind(fn.result, logit)
    emitter.bind(LOGIT, logit_of(program, logit))
    return logit


def scale_is_folded(program: Attention) -> bool:
    """Whether `score` is the bare product, and its scale a part of the factor that makes powers of two of it."""
    return program.rule.powers_of_two and program.score is None


def scale_lets(program: Attention) -> list[Stmt]:
    """That factor, before the loops."""
    return [Let(SCALE_LOG2.name, SCALE * LOG2_E)] if scale_is_folded(program) else []


def logit_of(program: Attention, logit: Expr) -> Expr:
    """What the row rule reads as LOGIT, of the variable that `score_lets` returns."""
    if not program.rule.powers_of_two:
        return logit
    return logit * (SCALE_LOG2 if scale_is_folded(program) else LOG2_E)


@dataclass(frozen=True, slots=True)
class Visibility:
    """The Lets that make `visible` (bool), and the variable; it spans the axes that the mask depends on."""

    lets: tuple[Stmt, ...]
    var: Var


def visibility(
    program: Attention, names: Names, known: dict[Expr, Expr], axes: Iterable[str], masked: Masked = True
) -> Visibility:
    """The user's mask and the ends of the given axes; the ends alone where that is all that is masked."""
    emitter = Emitter(names, known, base_two)
    inside: Expr = Const(True)
    for axis in axes:
        inside = simplify(inside & INSIDE[axis])
    if program.mask is not None and masked is not ENDS:
        fn = program.mask
        inside = simplify(emitter.value(fn.result, fn.names, fn.sources) & inside)
    if isinstance(masked, InParts):
        inside = simplify(masked.there & inside)
    var = emitter.let("visible", inside)
    return Visibility(tuple(emitter.lets), var)


def captured_loads(program: Attention, tensor: str) -> list[Load]:
    """Every place where score_mod reads `tensor`."""
    return [] if program.score is None else [x for x in loads(program.score.result) if x.tensor == tensor]

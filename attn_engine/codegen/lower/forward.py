"""Forward: one q tile per program, passes over the kv tiles in sight, the row rule's online update in the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from attn_engine.codegen.lower.emit import Emitter, Names, base_two, factor_outside, rounded
from attn_engine.codegen.lower.listed import list_params
from attn_engine.codegen.lower.ranges import masking
from attn_engine.codegen.lower.score import (
    Masked,
    Visibility,
    hoisted,
    logit_of,
    reserved_names,
    scale_lets,
    score_lets,
    visibility,
)
from attn_engine.codegen.lower.tile_classes import TileTests, tile_tests
from attn_engine.codegen.lower.values import (
    GROUP_OF_HEADS,
    Q_ROW,
    SCALE,
    SPLITS,
    VALUE,
    captured_params,
    indices,
    load_tile,
    rows,
    saved_param,
    scalar,
    wide,
)
from attn_engine.codegen.lower.visited import Visited, phases_of
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import REDUCE_IDENTITY, Const, Dot, Expr, Full, Reduce, Var, postorder, where
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.mask_range import MaskPlan, plan_mask
from attn_engine.ir.passes.rule_analysis import (
    in_dependency_order,
    output_of_empty_row,
    pass_as_rule,
    saved_of_empty_row,
    values_of_empty_row,
    vanishes_when_masked,
)
from attn_engine.ir.program import (
    BATCH,
    HEAD,
    LOGIT,
    OUT,
    Q_IDX,
    Attention,
    OnlineRule,
    Pooled,
    RowPass,
    RowState,
    saved_var,
)
from attn_engine.ir.tile import If, Kernel, Let, Loop, Param, Section, Stmt, StoreTile

ORDER_Q = ("q", "kv", "d", "dv")  # tiles are [q, kv] here


def lower_forward(program: Attention, schedule: Schedule) -> Kernel:
    """O and the saved row values of one q tile."""
    names = reserved_names(program)
    keys = pass_over_keys(program, schedule, names)
    outputs = (wide(program, "O", output=True), *saved_outputs(program))
    return forward_kernel(program, schedule, "forward", outputs, keys, epilogue(program, names))


@dataclass(frozen=True, slots=True)
class Pass:
    """The statements of a pass over the keys, and what it asks of each tile."""

    body: tuple[Stmt, ...]
    tests: TileTests | None
    seen: Visited
    known: dict[Expr, Expr]  # what was computed before the loops


def forward_kernel(
    program: Attention,
    schedule: Schedule,
    name: str,
    outputs: tuple[Param, ...],
    keys: Pass,
    end: list[Stmt],
) -> Kernel:
    """One q tile per program; where there are splits, one of them. `end` follows the pass over the keys."""
    tests = keys.tests
    inputs = (*captured_params(program), *(tests.params if tests else ()), *list_params(program, keys.body))
    split = any("splits" in p.shape for p in outputs)
    return Kernel(
        name=name,
        params=(*(wide(program, t) for t in "QKV"), *inputs, *outputs),
        scalars=(SCALE, *program.scalars, *([SPLITS] if split else [])),
        grid=("q", "head", "batch", *(["split"] if split else [])),
        order=ORDER_Q,
        tile=tuple_of_tiles(program, {"q": schedule.block_q, "kv": schedule.block_kv}),
        body=(*keys.body, *end),
        header=(f"{program.name}: {name}",),
        heavy_last=not split and later_rows_see_more(mask_plan(program)),
        sections=schedule.sections and not split and later_rows_see_more(mask_plan(program)),
        lanes=schedule.lanes,
        tables=tests.tables if tests else (),
    )


def pass_over_keys(
    program: Attention,
    schedule: Schedule,
    names: Names,
    *,
    one_split: bool = False,
    pooled: tuple[Pooled, ...] = (),
) -> Pass:
    """The un-normalised output and the row state of one q tile, over the keys it sees or over one share of them.

    pooled: what is stored of each tile's logits; their blocks are the tiles.
    """
    tiles = {"q": schedule.block_q, "kv": schedule.block_kv}
    tests = tile_tests(program, names, "kv", tiles)
    seen = phases_of(program, "kv", tiles, schedule.edges, tests, one_split=one_split)
    before, known = hoisted(program, names, "kv", forward_roots(program.rule))
    body: list[Stmt] = [
        Section("query tile of this program"),
        Let("kv_head", HEAD // GROUP_OF_HEADS),
        *scale_lets(program),
        Let("query", load_tile("Q")),
        *before,
    ]
    bounds = [Section("kv tiles this tile can see"), *seen.bounds]
    for i, p in enumerate(program.rule.earlier):
        body += [*row_pass(program, p, names, known, seen, f"pass_{i + 1}", bounds)]
        bounds = []
    body += [*empty_row_state(program.rule), *bounds]
    for run in seen.runs:
        loop = run.loop("kv", lambda masked: kv_step(program, names.copy(), known, masked, pooled=pooled))
        body += [Section(run.title), loop]
    return Pass(tuple(body), tests, seen, known)


def forward_roots(rule: OnlineRule) -> list[Expr]:
    """What the loops of the forward pass compute of a rule."""
    return [e for p in (*rule.earlier, rule) for e in p.new_states] + [rule.weights, rule.out_scale]


def empty_row_state(rule: OnlineRule) -> list[Stmt]:
    """A row that has met no key."""
    counted = ", maxima in powers of two" if rule.powers_of_two and rule.states else ""
    return [
        Section(f"row state of {rule.name}{counted}"),
        *(Let(s.name, Full(s.initial, ("q",))) for s in rule.states),
        Let(OUT.name, Full(0.0, OUT.axes)),
    ]


def row_pass(
    program: Attention,
    p: RowPass,
    names: Names,
    known: dict[Expr, Expr],
    seen: Visited,
    title: str,
    bounds: list[Stmt],
) -> list[Stmt]:
    """A pass over the keys before the one that makes the output, and the row values that it leaves."""
    rule = program.rule
    one = replace(program, rule=pass_as_rule(rule, p))
    body: list[Stmt] = [
        Section(f"{title.replace('_', ' ')}: {', '.join(name for name, _ in p.values)}"),
        *(Let(s.name, Full(s.initial, ("q",))) for s in p.states),
        *bounds,
    ]
    for run in seen.runs:
        loop = run.loop("kv", lambda masked: kv_step(one, names.copy(), known, masked, output=False))
        body += [Section(run.title), *titled([loop], title)]
    return [*body, *pass_values(rule, p, names, known, values_of_empty_row(rule))]


def pass_values(
    rule: OnlineRule,
    p: RowPass,
    names: Names,
    known: dict[Expr, Expr],
    empty: Mapping[Expr, Number] | None = None,
) -> list[Stmt]:
    """The row values after a pass; what has no value in a row without keys (a mean) reads as 0 there.

    empty: the values in such a row; None where it does not matter.
    """
    emitter = Emitter(names, known, base_two)
    for name, e in p.values:
        value = emitter.value(e, rule.names, rule.sources)
        if empty is not None and not math.isfinite(empty[saved_var(name)]):
            value = where(has_seen_nothing(p.states), 0.0, value)
        if not value.axes:
            value = value + Full(0.0, ("q",))
        emitter.bind(e, emitter.let(name, value, rule.sources.get(e, "")))
    return emitter.lets


def titled(body: list[Stmt], prefix: str) -> list[Stmt]:
    """The same statements, the names of loop bodies starting with `prefix`."""
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            title = f"{prefix}_{s.title}" if s.title else ""
            s = replace(s, body=tuple(titled([*s.body], prefix)), title=title)
        done.append(s)
    return done


def saved_outputs(program: Attention) -> tuple[Param, ...]:
    return tuple(rows(program, saved_param(name), output=True) for name, _ in program.rule.saved)


def mask_plan(program: Attention) -> MaskPlan:
    return plan_mask(program.mask.result if program.mask else None, "kv")


def tuple_of_tiles(program: Attention, tiles: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return (*tiles.items(), ("d", program.dim_qk), ("dv", program.dim_v))


def later_rows_see_more(plan: MaskPlan) -> bool:
    return plan.hull.hi is not None and plan.hull.lo is None


def kv_step(
    program: Attention,
    names: Names,
    known: dict[Expr, Expr],
    masked: Masked,
    *,
    output: bool = True,
    pooled: tuple[Pooled, ...] = (),
) -> list[Stmt]:
    """One kv tile: scores, the user's functions, the online update; `output`: it adds to the output.

    pooled: what is stored of the tile's logits; its block is the tile.
    """
    emitter = Emitter(names, known, base_two)
    emitter.lets += [Let("key", load_tile("K")), *([Let("value", load_tile("V"))] if output else [])]
    logit = score_lets(program, emitter)
    update = partial(online_update, program, names, known, output=output, pooled=pooled)
    seen = None if masked is False else visibility(program, names, known, ("kv",), masked)
    if seen is None:
        return [*emitter.lets, *update(logit, None)]
    if vanishes_when_masked(program.rule):
        hidden = hide_scores(emitter, logit, seen, masked)
        return [*emitter.lets, *update(hidden, None)]
    # A branch cannot leave `visible` behind it: this rule needs the mask in every tile.
    return [*emitter.lets, *seen.lets, *update(logit, seen.var)]


def hide_scores(emitter: Emitter, logit: Expr, seen: Visibility, masked: Masked) -> Var:
    """Scores of invisible pairs become -inf, under the tile's branch where there is one."""
    assert isinstance(logit, Var)
    name = logit.name if isinstance(masked, Expr) else f"masked_{logit.name}"  # a branch can only overwrite
    hidden = Let(name, where(seen.var, logit, -math.inf))
    emitter.lets += masking(masked, [*seen.lets, hidden])
    return hidden.var


def online_update(
    program: Attention,
    names: Names,
    known: dict[Expr, Expr],
    logit: Expr,
    visible: Expr | None,
    *,
    output: bool = True,
    pooled: tuple[Pooled, ...] = (),
) -> list[Stmt]:
    """The rule's step on one tile; `visible` where masking the score alone would not do; `pooled` as of `kv_step`."""
    rule = program.rule
    emitter = Emitter(names, {**known, LOGIT: logit_of(program, logit)}, adjuster(rule, visible))
    called = names_of_step(rule)
    stores = [_store_of_logits(emitter, p, rule) for p in pooled]
    new: dict[str, Expr] = {}
    for state, value in in_dependency_order(rule):
        if math.isinf(state.initial) and is_read_in_step(rule, value):
            new[state.name] = var = emitter.define(called[value], value, called, rule.sources)
            # Nothing visible yet leaves the infinity here; reading 0 instead keeps exp2(inf - inf) away from NaN.
            safe = emitter.let(names.fresh(f"safe_{state.name}"), where(var.equals(state.initial), 0.0, var))
            emitter.bind(value, safe)
    made = _scale_and_weights(rule, emitter, called, visible) if output else None
    for state, value in in_dependency_order(rule):
        if state.name not in new:
            new[state.name] = emitter.define(called[value], value, called, rule.sources)
    if made is not None:
        scale, weights = made
        emitter.let("out", OUT * scale + Dot(rounded(weights, "V"), VALUE))
    emitter.lets += [*stores, *(Let(name, value) for name, value in new.items())]
    return emitter.lets


def pool_place(block: int) -> tuple[Expr, ...]:
    """Where the pooled value of a row and a tile of `block` keys is stored."""
    return (BATCH, HEAD, scalar("kv_start") // block, Q_IDX)


def _store_of_logits(emitter: Emitter, p: Pooled, rule: OnlineRule) -> StoreTile:
    """The largest logit of each row of a tile, which the rule itself may go on with."""
    largest = emitter.define(f"tile_{p.name}", Reduce(p.kind, LOGIT, "kv"), rule.names, rule.sources)
    return StoreTile(p.name, pool_place(p.block), largest)


def _scale_and_weights(
    rule: OnlineRule, emitter: Emitter, called: dict[Expr, str], visible: Expr | None
) -> tuple[Expr, Expr]:
    """What the output so far is multiplied by, and the tile's weights."""
    scale: Expr = rule.out_scale
    if not isinstance(scale, Const):
        scale = emitter.define(called[scale], scale, called, rule.sources)
    weights = emitter.value(rule.weights, called, rule.sources)
    if not isinstance(weights, Var) or visible is not None:
        weights = emitter.let("probs", weights if visible is None else where(visible, weights, 0.0))
    emitter.bind(rule.weights, weights)
    return scale, weights


def is_read_in_step(rule: OnlineRule, new: Expr) -> bool:
    """Whether the weights, the output's factor or another state are made from this new value of a state."""
    others = (e for e in rule.new_states if e is not new)
    return new in postorder(rule.weights, rule.out_scale, *others)


def names_of_step(rule: OnlineRule) -> dict[Expr, str]:
    """The user's names for the values of a step, and ours for results that have none."""
    called = {e: name for e, name in rule.names.items() if e is not rule.weights}
    called.setdefault(rule.out_scale, "rescale")
    for state, value in zip(rule.states, rule.new_states, strict=True):
        if called.get(value, state.name) == state.name:
            called[value] = f"new_{state.name}"
    return called


def adjuster(rule: OnlineRule, visible: Expr | None) -> Callable[[Expr], Expr]:
    """Powers of two, and reductions over visible pairs only."""

    def adjust(e: Expr) -> Expr:
        if visible is not None and isinstance(e, Reduce):
            e = Reduce(e.kind, where(visible, e.x, REDUCE_IDENTITY[e.kind]), e.axis)
        return factor_outside(e) if rule.powers_of_two and isinstance(e, Reduce) else base_two(e)

    return adjust


def epilogue(program: Attention, names: Names) -> list[Stmt]:
    """Normalise, and store the output and the row values the backward pass needs."""
    rule = program.rule
    emitter = Emitter(names.without(saved_under_own_name(rule)))
    output = emitter.value(rule.output, rule.names, rule.sources)
    empty = row_is_empty(rule)
    needs_guard = not math.isfinite(output_of_empty_row(rule))
    lost = [name for name, value in saved_of_empty_row(rule).items() if math.isnan(value)]
    if needs_guard or lost:
        flag = emitter.let("row_is_empty", empty)
        if needs_guard:
            output = where(flag, 0.0, output)
    stores: list[Stmt] = [StoreTile("O", indices("O"), output)]
    for name, value in rule.saved:
        saved = emitter.value(value, rule.names, rule.sources)
        saved = (
            where(Var("row_is_empty", empty.dtype, empty.axes), -math.inf, saved) if name in lost else saved
        )
        stores.append(StoreTile(saved_param(name), Q_ROW, saved))
    return [Section("normalise and store"), *emitter.lets, *stores]


def saved_under_own_name(rule: OnlineRule) -> set[str]:
    """Names of row values that the user's epilogue calls so too: kept for them, and free once they are made."""
    states = {s.name for s in rule.states}
    return {name for name, value in rule.saved if rule.names.get(value) == name} - states


def row_is_empty(rule: OnlineRule) -> Expr:
    """A row that has seen no key, or only keys of score -inf, still has its initial states."""
    return has_seen_nothing((*rule.states, *(s for p in rule.earlier for s in p.states)))


def has_seen_nothing(states: Sequence[RowState]) -> Expr:
    """Whether a row's states are the initial ones."""
    maxima = [s for s in states if s.initial == -math.inf]
    empty: Expr = Const(True)
    for state in maxima[:1] or states:
        empty = empty & state.var.equals(state.initial)
    return empty

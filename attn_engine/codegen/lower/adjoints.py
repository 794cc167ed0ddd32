"""Passes over the keys before the gradient: one kernel that owns q tiles and leaves row values, as delta does.

Only rules whose weights depend on a reduction in more than a factor of the row need them. Each pass recomputes the
scores, reduces over the visible keys what the rule asks for, and its values are read by the passes after it and, from
memory, by the kernels of the gradients.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.backward import Sweep, backward_kernel, query_loads
from attn_engine.codegen.lower.emit import Emitter
from attn_engine.codegen.lower.forward import ORDER_Q, adjuster, pass_values, titled
from attn_engine.codegen.lower.row_values import adjoint_param, read_rows, row_bindings
from attn_engine.codegen.lower.score import Masked, reserved_names, score_lets, visibility
from attn_engine.codegen.lower.values import D_OUT, GROUP_OF_HEADS, Q_ROW, VALUE, load_tile, rows, tile
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import Dot, Full, postorder
from attn_engine.ir.passes.rule_analysis import in_dependency_order, pass_as_rule
from attn_engine.ir.program import D_PROBS, DELTA, HEAD, PROBS, Attention, RowPass, saved_var
from attn_engine.ir.tile import Kernel, Let, Section, Stmt, StoreTile


def lower_adjoints(program: Attention, schedule: Schedule) -> Kernel:
    """The values of every pass in `adjoints`, of one q tile."""
    rule, names = program.rule, reserved_names(program)
    tiles = {"q": schedule.d_query_launch.q, "kv": schedule.d_query_launch.kv}
    sweep = Sweep(program, schedule, names, "kv", tiles)
    roots = [e for p in rule.adjoints for e in (*p.new_states, *(value for _, value in p.values))]
    if PROBS in postorder(*roots):
        roots.append(rule.recompute)
    read = replace(read_rows(rule, roots), adjoints=())  # those are made here
    body: list[Stmt] = [
        Section("query tile of this program"),
        Let("kv_head", HEAD // GROUP_OF_HEADS),
        *query_loads(program, read),
        *sweep.before,
    ]
    for i, p in enumerate(rule.adjoints):
        body += _row_pass(sweep, p, f"pass_{i + 1}", first=i == 0)
    values = [name for p in rule.adjoints for name, _ in p.values]
    body += [Section("store"), *(StoreTile(adjoint_param(n), Q_ROW, saved_var(n)) for n in values)]
    outputs = tuple(rows(program, adjoint_param(name), output=True) for name in values)
    grid = ("q", "head", "batch")
    return backward_kernel(
        program, "adjoints", grid, ORDER_Q, tiles, outputs, body, tests=sweep.tests, read=read
    )


def _row_pass(sweep: Sweep, p: RowPass, title: str, *, first: bool) -> list[Stmt]:
    """The states of a pass, its loops over the keys, its values."""
    body: list[Stmt] = [
        Section(f"{title.replace('_', ' ')} before the gradient: {', '.join(name for name, _ in p.values)}"),
        *(Let(s.name, Full(s.initial, ("q",))) for s in p.states),
    ]
    if first:
        body += [Section("kv tiles this tile meets"), *sweep.phases.bounds]
    for run in sweep.phases.runs:
        loop = run.loop("kv", lambda masked: _step(sweep, p, masked))
        body += [Section(run.title), *titled([loop], title)]
    known = {**sweep.known, **row_bindings(sweep.program.rule)}
    return [*body, *pass_values(sweep.program.rule, p, sweep.names, known)]


def _step(sweep: Sweep, p: RowPass, masked: Masked) -> list[Stmt]:
    """One kv tile: weights and their gradients again, as far as they are read, and the states after it."""
    program, rule, names = sweep.program, sweep.program.rule, sweep.names.copy()
    seen = None if masked is False else visibility(program, names, sweep.known, ("kv",), masked)
    known = {**sweep.known, **row_bindings(rule), DELTA: tile("delta", "q")}
    emitter = Emitter(names, known, adjuster(program.rule, seen.var if seen else None))
    read = set(postorder(*p.new_states))
    emitter.lets += [Let("key", load_tile("K"))]
    score_lets(program, emitter)
    if PROBS in read:
        emitter.let(PROBS.name, emitter.value(rule.recompute, rule.names, rule.sources))
    if D_PROBS in read:
        emitter.lets += [Let("value", load_tile("V"))]
        emitter.let(D_PROBS.name, Dot(D_OUT, VALUE))
    emitter.lets += seen.lets if seen else ()
    new = {
        state.name: emitter.define(f"new_{state.name}", value, rule.names, rule.sources)
        for state, value in in_dependency_order(pass_as_rule(rule, p))
    }
    return [*emitter.lets, *(Let(name, value) for name, value in new.items())]

"""Forward with pooled weights: the largest or the sum of the final weights of every block of keys, per query row.

After the last pass over the keys the row values are final, so one more loop over the same tiles, each of which is a
block (or the runtime joins several), recomputes the weights and stores a number per row. Where only the largest are
wanted and weights rise with their logits, the loop that makes the output stores each tile's largest logit instead,
which it has anyway, and the runtime makes weights of these. Nothing of size S^2 is kept.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.emit import Emitter, Names, base_two
from attn_engine.codegen.lower.forward import (
    Pass,
    epilogue,
    forward_kernel,
    has_seen_nothing,
    pass_over_keys,
    pool_place,
    saved_outputs,
    titled,
)
from attn_engine.codegen.lower.score import Masked, reserved_names, score_lets, visibility
from attn_engine.codegen.lower.values import compute_storage, load_tile, wide
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import REDUCE_IDENTITY, Expr, Full, Reduce, Var, postorder, where
from attn_engine.ir.passes.monotone import weight_of_largest_logit
from attn_engine.ir.program import Attention, Pooled, saved_var
from attn_engine.ir.tile import Kernel, Let, Param, Section, Stmt, StoreTile

# A number per block and row; rows last, so that neighbouring rows are neighbours in memory.
POOLED_SHAPE = ("batches", "heads", "kv_blocks", "q_len")


def pooled_tile(program: Attention, schedule: Schedule) -> int:
    """Keys of a tile of a forward kernel with pooled weights: each block is one tile or several."""
    return min(schedule.block_kv, *(p.block for p in program.rule.pooled))


def keeps_logits(program: Attention) -> bool:
    """Whether the kernel leaves the largest logits of tiles, -inf without a key, of which the runtime makes weights."""
    rule = program.rule
    return (
        all(p.kind == "max" for p in rule.pooled)
        and program.sequences is None  # whose row values lie elsewhere
        and weight_of_largest_logit(rule) is not None
    )


def lower_pooled_forward(program: Attention, schedule: Schedule) -> Kernel:
    """O, the saved row values and the pooled weights of one q tile."""
    schedule = replace(schedule, block_kv=pooled_tile(program, schedule))
    names = reserved_names(program)
    early = keeps_logits(program)
    of_tiles = tuple(replace(p, block=schedule.block_kv) for p in program.rule.pooled)
    keys = pass_over_keys(program, schedule, names, pooled=of_tiles if early else ())
    storage = compute_storage(program)
    pools = [Param(p.name, storage, POOLED_SHAPE, True) for p in program.rule.pooled]
    outputs = (wide(program, "O", output=True), *saved_outputs(program), *pools)
    late = [] if early else _pooling(program, names, keys, schedule.block_kv)
    end = [*epilogue(program, names), *late]
    return forward_kernel(program, schedule, "forward", outputs, keys, end)


def _pooling(program: Attention, names: Names, keys: Pass, block: int) -> list[Stmt]:
    """The loop over the keys that pools their weights; blocks that it does not visit stay as they are."""
    before = Emitter(names, keys.known)
    final = {saved_var(n): e for n, e in _final_values(program, before).items()}
    body: list[Stmt] = [Section("pooled weights"), *before.lets]
    for run in keys.seen.runs:
        loop = run.loop("kv", lambda masked: _step(program, names.copy(), keys.known | final, masked, block))
        body += [Section(run.title), *titled([loop], "pooled")]
    return body


def _final_values(program: Attention, emitter: Emitter) -> dict[str, Expr]:
    """The saved row values that the weights read; 0 in rows that have seen nothing."""
    rule = program.rule
    read = set(postorder(rule.recompute))
    states = (*rule.states, *(s for p in rule.earlier for s in p.states))
    found: dict[str, Expr] = {}
    for name, e in rule.saved:
        if saved_var(name) in read:
            value = where(has_seen_nothing(states), 0.0, emitter.value(e, rule.names, rule.sources))
            found[name] = emitter.let(emitter.names.fresh(f"final_{name}"), value)
    return found


def _step(
    program: Attention, names: Names, known: dict[Expr, Expr], masked: Masked, block: int
) -> list[Stmt]:
    """One kv tile: its weights, and what is kept of them."""
    rule = program.rule
    emitter = Emitter(names, known, base_two)
    emitter.lets += [Let("key", load_tile("K"))]
    score_lets(program, emitter)
    weights = emitter.value(rule.recompute, rule.names, rule.sources)
    probs: Expr = emitter.let("probs", weights + Full(0.0, ("q", "kv")) if len(weights.axes) < 2 else weights)
    visible: Var | None = None
    if masked is not False:
        seen = visibility(program, names, known, ("kv",), masked)
        emitter.lets += seen.lets
        visible = seen.var
    stores = [StoreTile(p.name, pool_place(block), _pool(emitter, p, probs, visible)) for p in rule.pooled]
    return [*emitter.lets, *stores]


def _pool(emitter: Emitter, p: Pooled, probs: Expr, visible: Var | None) -> Expr:
    """The largest weight or the sum of the visible ones; -inf or 0 where there are none."""
    if visible is not None:
        probs = where(visible, probs, REDUCE_IDENTITY[p.kind])
    return emitter.let(emitter.names.fresh(f"tile_{p.name}"), Reduce(p.kind, probs, "kv"))

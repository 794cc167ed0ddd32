"""Gradients of pooled sums: what a loss gives to the sum of a block's weights, it gives to each of its weights.

A pooled sum is an output whose v is 1 at the keys of its block, so with g its gradient

    dP_j = <dO, v_j> + g_block(j)        delta = sum_j dP_j w_j = <dO, O> + sum over blocks of g * pooled sum
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.ir.expr import Expr, Load, postorder, substitute
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.passes.row_gradients import backward_roots, only_row_gradients
from attn_engine.ir.program import (
    BATCH,
    D_PROBS,
    DELTA,
    HEAD,
    KV_IDX,
    Q_IDX,
    Attention,
    Captured,
    OnlineRule,
    RowPass,
    RuleParameter,
)

D_POOLED_SUM = "d_pooled_sum"  # (B, H, Sq, blocks)
POOLED_DELTA = "pooled_delta"  # (B, H, Sq): the sum over the blocks of d_pooled_sum * pooled_sum


def backward_program(program: Attention, used: tuple[str, ...]) -> Attention:
    """The program of the backward pass: only the row outputs in `used` have gradients of their own."""
    rule = only_row_gradients(program.rule, used)
    sums = next((p for p in program.rule.pooled if p.kind == "sum" and p.name in used), None)
    if sums is None:
        return replace(program, rule=rule)
    whole = Storage.FLOAT64 if program.element is Storage.FLOAT64 else Storage.FLOAT32
    return replace(program, rule=_with_pooled_sums(rule, sums.block, whole))


def _with_pooled_sums(rule: OnlineRule, block: int, storage: Storage) -> OnlineRule:
    more = Load(D_POOLED_SUM, DType.FLOAT, (BATCH, HEAD, Q_IDX, KV_IDX // block))
    delta = Load(POOLED_DELTA, DType.FLOAT, (BATCH, HEAD, Q_IDX))
    known: dict[Expr, Expr] = {D_PROBS: D_PROBS + more, DELTA: DELTA + delta}

    def moved(e: Expr) -> Expr:
        return substitute(e, known)

    def maybe(e: Expr | None) -> Expr | None:
        return None if e is None else moved(e)

    rule = replace(
        rule,
        gradient=moved(rule.gradient),
        adjoints=tuple(
            RowPass(p.states, tuple(map(moved, p.new_states)), tuple((n, moved(e)) for n, e in p.values))
            for p in rule.adjoints
        ),
        parameters=tuple(RuleParameter(p.load, maybe(p.per_pair), maybe(p.per_row)) for p in rule.parameters),
        names={**rule.names, **{moved(e): name for e, name in rule.names.items()}},
        sources={**rule.sources, **{moved(e): text for e, text in rule.sources.items()}},
    )
    read = set(postorder(*backward_roots(rule)))
    tensors = [Captured(load.tensor, storage, len(load.indices)) for load in (more, delta) if load in read]
    return replace(rule, captures=(*rule.captures, *tensors))

"""The oracle: a program evaluated densely with torch, differentiable by torch autograd.

Nothing here knows about tiles. The online rule sees the whole row of keys as one tile, starting from its initial
states, which by definition of an online rule gives the row function itself.

Pairs that the mask hides never reach score_mod at all, and rows without a visible key are computed on a stand-in row
and then overwritten, so whatever a function does there (log of a negative number, 0/0), no value and no gradient of
a hidden pair can be anything but exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.codegen.lower.scaled import SCALES
from attn_engine.ir.expr import Expr, Var, substitute, where
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import (
    BATCH,
    HEAD,
    KV_IDX,
    LOGIT,
    OUT,
    Q_IDX,
    SCORE,
    Attention,
    OnlineRule,
    RowState,
    ScalarFn,
    Sequences,
    saved_var,
)
from attn_engine.runtime.block_lists import dense_lists
from attn_engine.runtime.dense import evaluate_all, evaluate_dense
from attn_engine.runtime.paged import key_rows
from attn_engine.runtime.pools import dense_pools
from attn_engine.runtime.scaled import dequantised
from attn_engine.runtime.sequence_rows import PaddedRows
from attn_engine.runtime.sequences import tables_in

Environment = dict[Var, Tensor | Number]


def reference(
    program: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    dtype: torch.dtype = torch.float64,
    visible: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """o (B, H, Sq, Dv) and the saved rows, each (B, H, Sq), all computed in and returned as `dtype`.

    Packed sequences have rows (H, T), and pooled weights (n, H, rows of the longest, blocks).

    q: (B, H, Sq, D), k: (B, Hkv, Skv, D), v: (B, Hkv, Skv, Dv), H a multiple of Hkv, any lengths (0 too).
    visible: pairs that the call leaves, bool (B, H, Sq, Skv), of the longest sequences where it has some; None: all.
    tensors: the captured tensors by name. scalars: "scale" and the captured numbers by name.
    Differentiable with respect to q, k, v and every floating captured tensor; O(Sq * Skv) memory.
    """
    if program.cache is not None:
        k, v = (dequantised(x, tensors[name], dtype) for name, x in zip(SCALES, (k, v), strict=True))
    if program.sequences is not None:
        return _of_sequences(program, program.sequences, (q, k, v), tensors, scalars, dtype, visible)
    inside = None if visible is None else visible[..., None, None]
    return _of_batch(program, q, k, v, tensors, scalars, dtype, inside)


def _of_sequences(
    program: Attention,
    sequences: Sequences,
    inputs: tuple[Tensor, Tensor, Tensor],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    dtype: torch.dtype,
    visible: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sequence as a batch of the longest length, what lies beyond its end hidden."""
    tables, q = tables_in(tensors), inputs[0]
    of_q = PaddedRows(sequences, tables, "q", q.device)
    of_kv = key_rows(sequences, tables, tensors, q.device)
    padded = of_q.padded(inputs[0]), of_kv.padded(inputs[1]), of_kv.padded(inputs[2])
    inside = (of_q.valid[:, None, :, None] & of_kv.valid[:, None, None, :])[..., None, None]
    inside = inside if visible is None else inside & visible[..., None, None]
    o, rows = _of_batch(program, *padded, tensors, scalars, dtype, inside)
    empty = saved_of_empty_row(program.rule)
    found = dict(rows)
    for name, value in empty.items():
        fill = -math.inf if math.isnan(value) else value
        found[name] = of_q.restored(rows[name], tuple(q.shape[:3]), fill)
        found[name] = found[name].squeeze(0) if sequences.packed else found[name]
    return of_q.restored(o, (*q.shape[:3], o.shape[3])), found


def _of_batch(
    program: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    dtype: torch.dtype,
    inside: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference` of equal lengths; inside: pairs that are there at all, broadcasting to the scores."""
    sizes: Environment = {
        Var("batches", DType.INT): q.shape[0],
        Var("heads", DType.INT): q.shape[1],
        Var("kv_heads", DType.INT): k.shape[1],
        Var("q_len", DType.INT): q.shape[2],
        Var("kv_len", DType.INT): k.shape[2],
    }
    nothing_to_see = k.shape[2] == 0
    query, key, value = (_as_heads(x, q.shape[1], dtype) for x in (q, k, v))
    if nothing_to_see:  # one key that nobody sees: the same code then serves an empty sequence
        key, value = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (key, value))
    score = (query @ key.transpose(2, 3) * scalars["scale"])[..., None, None]
    environment: Environment = {
        **sizes,
        **_positions(score),
        Var("scale", DType.FLOAT): scalars["scale"],
        **{var: scalars[var.name] for var in program.scalars},
    }
    visible = _visible(program.mask, environment, tensors, score, nothing_to_see)
    if program.listed is not None and not nothing_to_see:
        partial, full = dense_lists(program.listed, tensors, score.shape[1], (q.shape[2], k.shape[2]))
        visible = (visible & partial[..., None, None]) | full[..., None, None]
    if inside is not None and not nothing_to_see:
        visible = visible & inside
    logit = _logits(program.score, environment, tensors, score, visible)
    o, rows = _row_function(program.rule, environment, tensors, logit, visible, value)
    if program.rule.pooled:
        every_key = torch.eye(key.shape[2], dtype=dtype, device=q.device).expand(*key.shape[:2], -1, -1)
        weights, _ = _row_function(program.rule, environment, tensors, logit, visible, every_key)
        rows |= dense_pools(program.rule, weights, visible[..., 0, 0])
    return o, rows


def _as_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, its heads repeated for grouped queries."""
    x = x.to(dtype)
    return x if x.shape[1] in (heads, 0) else x.repeat_interleave(heads // x.shape[1], dim=1)


def _positions(score: Tensor) -> Environment:
    def along(dimension: int) -> Tensor:
        shape = [1] * 6
        shape[dimension] = -1
        return torch.arange(score.shape[dimension], device=score.device).view(shape)

    return {BATCH: along(0), HEAD: along(1), Q_IDX: along(2), KV_IDX: along(3)}


def _visible(
    mask: ScalarFn | None,
    environment: Environment,
    tensors: Mapping[str, Tensor],
    score: Tensor,
    nothing: bool,
) -> Tensor:
    """Which pairs count: bool, of the full shape of the scores."""
    if nothing:
        return torch.zeros_like(score, dtype=torch.bool)
    if mask is None:
        return torch.ones_like(score, dtype=torch.bool)
    with torch.no_grad():
        return evaluate_dense(mask.result, environment, tensors, score.dtype).expand(score.shape)


def _logits(
    function: ScalarFn | None,
    environment: Environment,
    tensors: Mapping[str, Tensor],
    score: Tensor,
    visible: Tensor,
) -> Tensor:
    """score_mod(score) at the visible pairs, 0 (with no gradient) at the others."""
    if function is None:
        return torch.where(visible, score, 0.0)
    if bool(visible.all()):
        result = evaluate_dense(function.result, {**environment, SCORE: score}, tensors, score.dtype)
        return result.expand(score.shape)
    batch, head, query, key, _, _ = visible.nonzero(as_tuple=True)
    pairs: Environment = {
        **environment,
        SCORE: score[visible],
        BATCH: batch,
        HEAD: head,
        Q_IDX: query,
        KV_IDX: key,
    }
    result = evaluate_dense(function.result, pairs, tensors, score.dtype)
    return torch.zeros_like(score).masked_scatter(visible, result.expand(batch.shape))


def _row_function(
    rule: OnlineRule,
    environment: Environment,
    tensors: Mapping[str, Tensor],
    logit: Tensor,
    visible: Tensor,
    value: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rule on whole rows, then its epilogue; dead rows give o = 0 and the epilogue of the initial states."""
    initial: Environment = {state.var: state.initial for state in rule.states}
    safe = guarded_values(rule.states, rule.new_states)
    weights, new_states = substitute(rule.weights, dict(safe)), guarded(rule.new_states, safe)
    epilogue = (rule.output, *(expr for _, expr in rule.saved))
    value = value[:, :, None, :, None, :]

    def run(logit: Tensor, visible: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        before = _earlier_values(rule, environment, tensors, logit, visible)
        rows = {**environment, **initial, **before, LOGIT: logit}
        w, *states = evaluate_all((weights, *new_states), rows, tensors, logit.dtype, visible)
        w = torch.where(visible, w, 0.0)[..., 0, 0]
        out = (w @ value[:, :, 0, :, 0, :])[:, :, :, None, None, :]
        final: Environment = {state.var: x for state, x in zip(rule.states, states, strict=True)}
        known = {**environment, **before, **final, OUT: out}
        return states, evaluate_all(epilogue, known, tensors, logit.dtype)

    dead = ~visible.any(3, keepdim=True)
    with torch.no_grad():
        states, results = run(_with_stand_in(logit, visible), visible)
        dead = dead | _dead_by_value(rule, states, results[0])
        at_start = evaluate_all(
            epilogue,
            _at_start(rule, environment, tensors, torch.zeros_like(results[0])),
            tensors,
            logit.dtype,
        )
    alive = visible & ~dead
    _, (output, *saved) = run(_with_stand_in(logit, alive), alive | dead)
    shape = (*logit.shape[:3], value.shape[-1])
    o = torch.where(dead, 0.0, output).reshape(shape)
    rows = {
        name: torch.where(dead, start.nan_to_num(-math.inf, math.inf, -math.inf), x)
        .expand(*logit.shape[:3], 1, 1, 1)
        .reshape(logit.shape[:3])
        for (name, _), x, start in zip(rule.saved, saved, at_start[1:], strict=True)
    }
    return o, rows


def _with_stand_in(logit: Tensor, visible: Tensor) -> Tensor:
    """Hidden pairs read as the largest visible logit of their row, a value at which the rule is defined anyway."""
    highest = torch.where(visible, logit.detach(), -math.inf).amax(3, keepdim=True)
    return torch.where(visible, logit, torch.where(visible.any(3, keepdim=True), highest, 1.0))


def _dead_by_value(rule: OnlineRule, states: list[Tensor], output: Tensor) -> Tensor:
    """Rows whose visible keys changed no state (all scores -inf), where that leaves the rule undefined."""
    if not rule.states:
        return torch.zeros((), dtype=torch.bool, device=output.device)
    unchanged = torch.ones((), dtype=torch.bool, device=output.device)
    for state, x in zip(rule.states, states, strict=True):
        unchanged = unchanged & (x == state.initial)
    if any(math.isinf(state.initial) for state in rule.states):
        return unchanged
    return unchanged & ~torch.isfinite(output).all(5, keepdim=True)


def _earlier_values(
    rule: OnlineRule, environment: Environment, tensors: Mapping[str, Tensor], logit: Tensor, visible: Tensor
) -> Environment:
    """The values of the passes before the online update, each over whole rows."""
    known: Environment = {}
    for step in rule.earlier:
        new = guarded(step.new_states, guarded_values(step.states, step.new_states))
        initial: Environment = {s.var: s.initial for s in step.states}
        rows = {**environment, **known, **initial, LOGIT: logit}
        states = evaluate_all(new, rows, tensors, logit.dtype, visible)
        final: Environment = {s.var: x for s, x in zip(step.states, states, strict=True)}
        values = evaluate_all(
            tuple(e for _, e in step.values), {**environment, **known, **final}, tensors, logit.dtype
        )
        known |= {saved_var(name): x for (name, _), x in zip(step.values, values, strict=True)}
    return known


def _at_start(
    rule: OnlineRule, environment: Environment, tensors: Mapping[str, Tensor], out: Tensor
) -> Environment:
    """What the epilogue reads in a row that has met no key."""
    known: Environment = {**environment, **{s.var: s.initial for s in rule.states}, OUT: out}
    for step in rule.earlier:
        known |= {s.var: s.initial for s in step.states}
        values = evaluate_all(tuple(e for _, e in step.values), known, tensors, out.dtype)
        known |= {saved_var(name): x for (name, _), x in zip(step.values, values, strict=True)}
    return known


def guarded_values(states: tuple[RowState, ...], new_states: tuple[Expr, ...]) -> dict[Expr, Expr]:
    """What to read in place of a running extremum that has seen nothing yet: 0.

    A max that is still -inf would give -inf - -inf; as 0 it gives exp(-inf - 0) = 0. The state itself keeps -inf.
    """
    return {
        new: where(new.equals(state.initial), 0.0, new)
        for state, new in zip(states, new_states, strict=True)
        if math.isinf(state.initial)
    }


def guarded(new_states: tuple[Expr, ...], safe: Mapping[Expr, Expr]) -> tuple[Expr, ...]:
    """New states that read each other guarded."""
    return tuple(
        substitute(new, {node: s for node, s in safe.items() if node is not new}) for new in new_states
    )

"""The definition of a linear attention: its recurrence, token by token, in torch.

Differentiable by torch autograd, independently of the lowered gradient. O(tokens) steps: slow, and right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.ir.linear import WEIGHT_SUM, LinearProgram, Rank
from attn_engine.runtime.decay_faults import check_decays
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.token_rows import TokenRows


def token_recurrence(
    program: LinearProgram, inputs: LinearInputs, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, Dv) and the final states (N, H, D, state columns), computed in and returned as `dtype`."""
    columns = program.state_columns
    start = inputs.start(columns, dtype)
    shape = (*inputs.v.shape[:3], program.dim_v)
    parts: list[tuple[tuple[slice, slice], Tensor]] = []
    states: list[Tensor] = []
    for sequences, batches, first, length in inputs.sequences.groups():
        tokens = torch.arange(first, first + length)
        o, state = _sequence(program, inputs, batches, tokens, start[sequences], dtype)
        parts.append(((batches, slice(first, first + length)), o))
        states.append(state)
    out = torch.zeros(shape, dtype=dtype, device=inputs.q.device)
    for (batches, tokens), o in parts:
        index = torch.arange(tokens.start, tokens.stop, device=out.device)
        out = out.index_copy(2, index, o) if batches.stop == shape[0] else out
    return out, torch.cat(states) if states else start


def _sequence(
    program: LinearProgram,
    inputs: LinearInputs,
    batches: slice,
    tokens: Tensor,
    state: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not len(tokens):
        return state.new_zeros(*state.shape[:2], 0, program.dim_v), state
    order = tokens.flip(0) if program.reverse else tokens
    rows = TokenRows(program, inputs, batches, order, dtype)
    qd, qv = ("q", "d"), ("q", "dv")
    query, write, value = rows.values(((program.query, qd), (program.write, qd), (program.value, qv)))
    if program.divisor is not None:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    erase = None if program.erase is None else rows.values(((program.erase, qd),))[0]
    bonus = None if program.bonus is None else rows.values(((program.bonus, qd),))[0]
    decay = _decay(program, rows)
    if decay is not None:
        check_decays(decay, batches, order)
    found: list[Tensor] = []
    for t in range(len(order)):
        before = state
        if decay is not None:
            state = state * decay[:, :, t].exp()[..., None]
        new = value[:, :, t]
        if erase is not None:
            new = new - (erase[:, :, t, :, None] * state).sum(2)
        state = state + write[:, :, t, :, None] * new[:, :, None, :]
        o = (query[:, :, t, :, None] * (before if program.exclusive else state)).sum(2)
        if bonus is not None:
            o = o + (query[:, :, t] * bonus[:, :, t]).sum(-1, keepdim=True) * new
        found.append(o)
    o = torch.stack(found, 2)
    if program.divisor is not None:
        rows.give(WEIGHT_SUM, o[..., -1])
        (divisor,) = rows.values(((program.divisor, ("q",)),))
        o = o[..., :-1] / divisor[..., None]
    return o.flip(2) if program.reverse else o, state


def _decay(program: LinearProgram, rows: TokenRows) -> Tensor | None:
    """(batch, head, token, 1 or D)."""
    if program.decay is None:
        return None
    if program.rank is Rank.VECTOR:
        return rows.values(((program.decay, ("q", "d")),))[0]
    return rows.values(((program.decay, ("q",)),))[0][..., None]

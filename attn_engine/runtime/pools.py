"""Where pooled weights go, and blocks of several tiles made of theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.codegen.lower.pooled import keeps_logits, pooled_tile
from attn_engine.codegen.lower.values import saved_param
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import REDUCE_IDENTITY, Var
from attn_engine.ir.passes.monotone import weight_of_largest_logit
from attn_engine.ir.passes.pooled_gradient import D_POOLED_SUM, POOLED_DELTA
from attn_engine.ir.program import LOGIT, Attention, OnlineRule, saved_var
from attn_engine.runtime.dense import evaluate_dense

_AT_ONCE = 1 << 16  # logits that are turned into weights at a time: they stay in a cache


def empty_pools(
    program: Attention,
    schedule: Schedule,
    sizes: Mapping[str, int],
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """(B, H, tiles of keys, Sq) by name, filled for the tiles that no row sees: those are never visited."""
    if not program.rule.pooled:
        return {}
    tiles = -(-sizes["kv_len"] // pooled_tile(program, schedule))
    shape = (sizes["batches"], sizes["heads"], tiles, sizes["q_len"])
    return {
        p.name: torch.full(shape, REDUCE_IDENTITY[p.kind], dtype=compute, device=device)
        for p in program.rule.pooled
    }


def dense_pools(rule: OnlineRule, weights: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """The same by name from all the weights (B, H, Sq, Skv)."""
    found: dict[str, Tensor] = {}
    for p in rule.pooled:
        kept = torch.where(visible, weights, REDUCE_IDENTITY[p.kind])
        join = torch.amax if p.kind == "max" else torch.sum
        x = torch.stack([join(part, dim=3) for part in kept.split(p.block, dim=3)], 3)
        found[p.name] = torch.where(x == -math.inf, 0.0, x)
    return found


def joined_pools(
    program: Attention, schedule: Schedule, pools: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> list[Tensor]:
    """(B, H, Sq, blocks) of each, in the rule's order; saved: the row values (B, H, Sq) by the kernels' names."""
    found: list[Tensor] = []
    for p in program.rule.pooled:
        tiles, several = pools[p.name], p.block // pooled_tile(program, schedule)
        if several > 1:
            parts = tiles.split(several, dim=2)
            join = torch.amax if p.kind == "max" else torch.sum
            shape = (*tiles.shape[:2], len(parts), tiles.shape[3])
            joined = tiles.new_empty(shape)
            for i, part in enumerate(parts):
                joined[:, :, i] = join(part, dim=2)
            tiles = joined
        if keeps_logits(program):
            _make_weights(program.rule, tiles, saved)
        elif p.kind == "max":
            tiles.masked_fill_(tiles == -math.inf, 0.0)  # no key
        found.append(tiles.transpose(2, 3))
    return found


def _make_weights(rule: OnlineRule, logits: Tensor, saved: Mapping[str, Tensor]) -> None:
    """Turn the largest logits (B, H, blocks, Sq) into their weights, in place. Some at a time."""
    weight = weight_of_largest_logit(rule)
    assert weight is not None
    if not logits.numel():
        return
    heads = logits.flatten(0, 1)
    rows: dict[Var, Tensor] = {}
    for name, _ in rule.saved:
        x = saved[saved_param(name)]
        # 0 in rows that have seen nothing, as in a kernel: -inf - -inf would not be a number.
        rows[saved_var(name)] = x.masked_fill(x == -math.inf, 0.0).flatten(0, 1)[:, None]
    rows_at_once = max(1, _AT_ONCE // heads.shape[2])
    heads_at_once = max(1, rows_at_once // heads.shape[1])
    for i in range(0, heads.shape[0], heads_at_once):
        own = {name: x[i : i + heads_at_once] for name, x in rows.items()}
        for part in heads[i : i + heads_at_once].split(rows_at_once, dim=1):
            part.copy_(evaluate_dense(weight, {LOGIT: part, **own}, {}, part.dtype))


def pooled_gradients(
    names: Sequence[str], rows: Sequence[Tensor], moved: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the backward kernels read of the gradient of pooled sums, which is taken out of `moved`; {} without one.

    rows: the row outputs, called `names`.
    """
    given = moved.pop("pooled_sum", None)
    if given is None:
        return {}
    sums = rows[names.index("pooled_sum")]
    return {D_POOLED_SUM: given, POOLED_DELTA: (given * sums).sum(3)}

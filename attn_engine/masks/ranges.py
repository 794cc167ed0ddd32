"""Ranges of key blocks per query block, and what they say about every block: skip, ask, or take whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr
from attn_engine.ir.passes.block_ranges import Both, Either, Formula, Gate, Threshold, leaves
from attn_engine.masks.values import Blocks

# From block `first` up to, not including, block `end`: integers, (batch, head, q blocks) or 1 along each of these.
Range = tuple[Tensor, Tensor]
MOST_RANGES = 6


def find_ranges(formulas: Sequence[Formula], blocks: Blocks) -> list[list[Range]] | None:
    """Where each condition on a pair of blocks holds, as a union of ranges; None where one is not one of a few."""
    roots = tuple(dict.fromkeys(e for formula in formulas for e in leaves(formula)))
    values = dict(zip(roots, blocks.evaluate(roots), strict=True))
    if any(x.is_floating_point() and bool(x.isnan().any()) for x in values.values()):
        return None
    found = [_ranges(formula, values, blocks.count["kv"]) for formula in formulas]
    known = [ranges for ranges in found if ranges is not None]
    return known if len(known) == len(found) else None


def _ranges(formula: Formula, values: Mapping[Expr, Tensor], n: int) -> list[Range] | None:
    match formula:
        case Gate(condition):
            holds = values[condition][..., 0]
            return [(torch.zeros_like(holds, dtype=torch.int64), torch.where(holds, n, 0))]
        case Threshold():
            return _bound(formula, values[formula.q][..., 0], values[formula.kv][:, :, 0], n)
        case Both(parts) | Either(parts):
            found = [_ranges(part, values, n) for part in parts]
            known = [ranges for ranges in found if ranges is not None]
            if len(known) < len(found):
                return None
            union = isinstance(formula, Either)
            joined = [r for ranges in known for r in ranges] if union else _meet(known)
            return joined if len(joined) <= MOST_RANGES else None


def _meet(factors: list[list[Range]]) -> list[Range]:
    """Every range of the one with every range of the other."""
    met = factors[0]
    for ranges in factors[1:]:
        met = [(torch.maximum(a, c), torch.minimum(b, d)) for a, b in met for c, d in ranges]
    return met


def _bound(threshold: Threshold, q: Tensor, kv: Tensor, n: int) -> list[Range] | None:
    """The range of one comparison; None where the keys' side neither always rises nor always falls.

    q: (batch, head, q blocks), kv: (batch, head, n) or (..., 1) where it is the same for all.
    """
    kv = kv.expand(*kv.shape[:2], n)
    rises = bool((kv[..., 1:] >= kv[..., :-1]).all())
    if not rises and not bool((kv[..., 1:] <= kv[..., :-1]).all()):
        return None
    ordered = kv if rises else kv.flip(-1)
    # How many of the ordered values lie below q; with those equal to q where these do not belong to the larger ones.
    below = _searched(ordered, q, with_equal=threshold.strict is threshold.kv_larger)
    zero = torch.zeros((), dtype=torch.int64, device=below.device)
    if threshold.kv_larger:
        return [(below, zero + n)] if rises else [(zero, n - below)]
    return [(zero, below)] if rises else [(n - below, zero + n)]


def _searched(ordered: Tensor, q: Tensor, *, with_equal: bool) -> Tensor:
    if ordered.shape[:2] == (1, 1):
        return torch.searchsorted(ordered[0, 0].contiguous(), q.contiguous(), right=with_equal)
    shape = torch.broadcast_shapes(ordered.shape[:2], q.shape[:2])
    q = q.expand(*shape, q.shape[-1]).contiguous()
    return torch.searchsorted(ordered.expand(*shape, ordered.shape[-1]).contiguous(), q, right=with_equal)

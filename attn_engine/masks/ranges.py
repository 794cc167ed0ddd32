"""Ranges of key blocks per query block: where a condition on a pair of blocks holds.

What is counted in blocks is counted by numpy on the CPU, wherever the mask's tensors are: there is little of it, and
a numpy call costs a third of a torch call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attn_engine.ir.expr import Expr
from attn_engine.ir.passes.block_ranges import Both, Either, Formula, Gate, Threshold, leaves
from attn_engine.masks.values import Blocks

Array = np.ndarray[Any, Any]
# From block `first` up to, not including, block `end`: ints, (batch, head, q blocks) or 1 along each of these.
Range = tuple[Array | int, Array | int]
MOST_RANGES = 6


def find_ranges(formulas: Sequence[Formula], blocks: Blocks) -> list[list[Range]] | None:
    """Where each condition on a pair of blocks holds, as a union of ranges; None where one is not one of a few."""
    roots = tuple(dict.fromkeys(e for formula in formulas for e in leaves(formula)))
    values = {e: x.cpu().numpy() for e, x in zip(roots, blocks.evaluate(roots), strict=True)}
    if any(x.dtype.kind == "f" and np.isnan(x).any() for x in values.values()):
        return None
    found = [_ranges(formula, values, blocks.count["kv"]) for formula in formulas]
    known = [ranges for ranges in found if ranges is not None]
    return known if len(known) == len(found) else None


def _ranges(formula: Formula, values: Mapping[Expr, Array], n: int) -> list[Range] | None:
    match formula:
        case Gate(condition):
            return [(0, np.where(values[condition][..., 0], n, 0))]
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
        met = [(np.maximum(a, c), np.minimum(b, d)) for a, b in met for c, d in ranges]
    return met


def _bound(threshold: Threshold, q: Array, kv: Array, n: int) -> list[Range] | None:
    """The range of one comparison; None where the keys' side neither always rises nor always falls.

    q: (batch, head, q blocks), kv: (batch, head, n) or (..., 1) where it is the same for all.
    """
    if kv.shape[-1] != n:
        kv = np.broadcast_to(kv, (*kv.shape[:2], n))
    rises = bool((kv[..., 1:] >= kv[..., :-1]).all())
    if not rises and not bool((kv[..., 1:] <= kv[..., :-1]).all()):
        return None
    ordered = kv if rises else kv[..., ::-1]
    # How many of the ordered values lie below q; with those equal to q where these do not belong to the larger ones.
    below = _searched(ordered, q, "right" if threshold.strict is threshold.kv_larger else "left")
    if threshold.kv_larger:
        return [(below, n)] if rises else [(0, n - below)]
    return [(0, below)] if rises else [(n - below, n)]


def _searched(ordered: Array, q: Array, side: Any) -> Array:
    if ordered.shape[:2] == (1, 1):
        return np.searchsorted(ordered[0, 0], q, side)
    shape = np.broadcast_shapes(ordered.shape[:2], q.shape[:2])
    q = np.broadcast_to(q, (*shape, q.shape[-1]))
    ordered = np.broadcast_to(ordered, (*shape, ordered.shape[-1]))
    found = np.empty(q.shape, dtype=np.int64)
    for at in np.ndindex(*shape):
        found[at] = np.searchsorted(ordered[at], q[at], side)
    return found

"""Selections written from their formulas in plain torch and float64, and what a result may differ from them by."""

from __future__ import annotations

import torch
from torch import Tensor

F32 = torch.float32


def scores(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, T, S) products of q (B, T, H, D) and k (B, S, Hkv, D), heads of a group sharing keys."""
    group = q.shape[2] // max(k.shape[2], 1)
    keys = k.double().repeat_interleave(group, 2)
    return torch.einsum("bthd,bshd->bhts", q.double(), keys)


def summed(score: Tensor, visible: Tensor, kv_heads: int) -> Tensor:
    """Importances (B, G, T, S): sums over the heads of a group of what is visible, -inf where no head sees anything."""
    b, h, t, s = score.shape
    visible = visible.expand(score.shape)
    total = torch.where(visible, score, 0.0).view(b, kv_heads, h // kv_heads, t, s).sum(2)
    return total.masked_fill(~visible.reshape(b, kv_heads, h // kv_heads, t, s).any(2), -torch.inf)


def shared_segments(windows: int, length: int, stride: int, block: int) -> Tensor:
    """W (windows, blocks): how many segments of `stride` tokens a window and a block share, by their intervals."""
    blocks = -(-(windows * stride + length - 1) // block)
    start = torch.arange(windows)[:, None] * stride
    first = torch.arange(blocks)[None] * block
    shared = torch.minimum(start + length, first + block) - torch.maximum(start, first)
    return shared.clamp(min=0) / stride


def pooled(importance: Tensor, length: int, stride: int, block: int) -> Tensor:
    """Importances of windows as those of blocks; -inf where a block has no window in sight."""
    weights = shared_segments(importance.shape[-1], length, stride, block).double()
    there = importance > -torch.inf
    total = torch.where(there, importance, 0.0) @ weights
    return total.masked_fill(there.double() @ weights == 0, -torch.inf)


def chosen(importance: Tensor, topk: int, forced: Tensor | None = None) -> Tensor:
    """The candidates that are taken, by a loop over rows: (..., topk), ascending, -1 behind; ties to the lowest."""
    flat = importance.reshape(-1, importance.shape[-1]).tolist()
    first = [[]] * len(flat)
    if forced is not None:
        rows = forced.expand(importance.shape).reshape(-1, importance.shape[-1])
        first = [row.nonzero().flatten().tolist() for row in rows]
    result = []
    for row, own in zip(flat, first, strict=True):
        own = own[:topk]
        others = [j for j in range(len(row)) if j not in own and row[j] > -torch.inf]
        others.sort(key=lambda j: (-row[j], j))
        taken = sorted(own + others[: topk - len(own)])
        result.append(taken + [-1] * (topk - len(taken)))
    return torch.tensor(result, dtype=torch.int32).view(*importance.shape[:-1], topk)


def check_by_margin(indices: Tensor, importance: Tensor, bound: float) -> int:
    """Sets are equal where the gap behind rank k is above the bound; elsewhere what was taken is as good. Returns how
    many rows had to be equal. indices, importance: (B, G, T, ...)."""
    topk = indices.shape[-1]
    exact = 0
    rows = zip(indices.reshape(-1, topk), importance.reshape(-1, importance.shape[-1]), strict=True)
    for row, values in rows:
        candidates = int((values > -torch.inf).sum())
        taken = row[row >= 0].long()
        assert len(taken) == len(set(taken.tolist())) == min(topk, candidates)
        assert (row[len(taken) :] == -1).all() and (taken.diff() > 0).all()
        best = values.sort(descending=True, stable=True)
        want = best.indices[: len(taken)].sort().values
        if len(taken) == candidates or best.values[topk - 1] - best.values[topk] > bound:
            assert torch.equal(taken, want)
            exact += 1
        else:
            assert (values[taken].sort(descending=True).values - best.values[:topk]).abs().max() <= bound
    return exact


def whole_numbers(*shape: int, dtype: torch.dtype = F32, most: int = 2) -> Tensor:
    """Small whole numbers: sums of their products are exact in every type, and equal ones are frequent."""
    return torch.randint(-most, most + 1, shape).to(dtype)

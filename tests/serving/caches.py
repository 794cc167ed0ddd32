"""Keys and values in pages in no order, everything around them poisoned; and dense attention in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")
UNUSED = (-1, -7, 2147480000)


@dataclass(frozen=True, eq=False)
class Cache:
    """The same keys and values in pages (pages, rows, heads, dim) and in a batch (sequences, capacity, heads, dim)."""

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    k_rows: Tensor
    v_rows: Tensor


def filled(
    lengths: Sequence[int],
    page: int,
    heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    spare: int = 3,
) -> Cache:
    """Pages are shuffled; unused ones, unused slots and what lies beyond a length hold NaN, unused entries anything."""
    n, most = len(lengths), max(lengths, default=0)
    width = -(-most // page) + 2
    pages = sum(-(-x // page) for x in lengths) + spare
    order = torch.randperm(pages).tolist()
    table = torch.tensor(UNUSED)[torch.randint(0, len(UNUSED), (n, width))].to(torch.int32)
    rows = [torch.full((n, most, heads, d), NAN, dtype=dtype) for d in dims]
    paged = [torch.full((pages, page, heads, d), NAN, dtype=dtype) for d in dims]
    for b, length in enumerate(lengths):
        for x in rows:
            x[b, :length] = torch.randn(length, *x.shape[2:]).to(dtype)
        for j in range(-(-length // page)):
            table[b, j] = order.pop()
            for x, cache in zip(rows, paged, strict=True):
                part = x[b, j * page : min(length, (j + 1) * page)]
                cache[table[b, j], : len(part)] = part
    (k, v), (k_rows, v_rows) = paged, rows
    return Cache(k, v, table, torch.tensor(lengths, dtype=torch.int32), k_rows, v_rows)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, S, H, Dv) and lse (B, H, S) in float64, sequence by sequence; offset: query i sees keys to offset + i."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=torch.float64)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for b, length in enumerate(lengths.tolist()):
        keys, values = (x[b, :length].double().repeat_interleave(group, 1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[b].double(), keys) * scale
        if offset is not None:
            seen = torch.arange(length) <= torch.arange(q.shape[1])[:, None] + int(offset[b])
            score = score.masked_fill(~seen, -torch.inf)
        lse[b] = torch.logsumexp(score, 2)
        weights = torch.exp(score - torch.where(lse[b].isinf(), 0.0, lse[b])[..., None])
        out[b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out, lse

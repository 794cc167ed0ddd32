"""What SeerAttention's functions compute, in float64 from the formulas of its paper: nothing here knows the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16
LENGTHS = [70, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 40]


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(
    heads: int,
    kv_heads: int,
    dims: tuple[int, int] = (32, 32),
    lengths: Sequence[int] = tuple(LENGTHS),
    dtype: torch.dtype = torch.float32,
    deviation: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    q, k, v = (deviation * torch.randn(sum(lengths), h, d) for h, d in shapes)
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


def kept(mask: Tensor, b: int, heads: int, length: int, block: int, rows: int) -> Tensor:
    """(heads, length, length): keep of one sequence; a mask of fewer heads serves the heads of a group."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    of_heads = [mask[b, h // (heads // mask.shape[1])][i // rows, j // block] for h in range(heads)]
    return torch.stack(of_heads) & (j <= i)


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(length, heads, Dv) and (heads, length) of one sequence; keep: (heads, queries, keys)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = torch.einsum("qhd,khd->hqk", q, k) * scale
    score = torch.where(keep, score, -torch.inf)
    weights = torch.where(keep.any(-1, keepdim=True), score.softmax(-1), 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v), score.logsumexp(-1)


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    *,
    rows: int,
    lengths: Sequence[int] = tuple(LENGTHS),
    block: int = BLOCK,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(T, heads, Dv) and (heads, T): every sequence by itself. rows: queries of a row of the mask."""
    parts = zip(*(x.to(dtype).split(list(lengths)) for x in (q, k, v)), strict=True)
    outs: list[Tensor] = []
    logs: list[Tensor] = []
    for b, (one, keys, values) in enumerate(parts):
        keep = kept(mask, b, q.shape[1], one.shape[0], block, rows)
        out, log = attention(one, keys, values, keep, scale)
        outs.append(out)
        logs.append(log)
    return torch.cat(outs), torch.cat(logs, 1)


def largest_weights(q: Tensor, k: Tensor, scale: float, block: int) -> Tensor:
    """R of one sequence: (heads, length, blocks)."""
    length = q.shape[0]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    past = torch.ones(length, length, dtype=torch.bool).tril()
    weights = torch.where(past, torch.where(past, score, -torch.inf).softmax(-1), 0.0)
    return torch.stack([x.amax(-1) for x in weights.split(block, -1)], -1) if length else weights


def by_blocks(rows: Tensor, block: int, blocks: int) -> Tensor:
    """A over its sums, (heads, blocks, blocks), of R (heads, length, its blocks)."""
    pooled = torch.zeros(rows.shape[0], blocks, blocks, dtype=torch.float64)
    for m, part in enumerate(rows.split(block, 1) if rows.shape[1] else ()):
        pooled[:, m, : rows.shape[2]] = part.amax(1)
    return pooled / (pooled.sum(-1, keepdim=True) + 1e-6)

"""Sparse and packed attentions that are measured on a GPU: what their pairs are, and what a call of ours brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

PATTERNS = ("packed", "blocks 10 %", "local-stride 16", "hash 16")
BLOCK, DENSITY, LOCAL, STRIDE, BUCKETS = 64, 0.1, 16, 16, 16


@dataclass(frozen=True, slots=True)
class Sparse:
    """mask_mod: of all pairs, for peers. ours: of the calls of ours, which bring `options` instead of the rest of it.

    lengths: of packed sequences, of which a call is one batch.
    """

    mask_mod: Callable[..., Any]
    ours: Callable[..., Any] | None
    options: dict[str, Any]
    lengths: tuple[int, ...] = ()


def skewed(length: int) -> tuple[int, ...]:
    """Lengths of sequences: each half of what is left, down to a block."""
    found: list[int] = []
    while length > BLOCK:
        found.append(length // 2)
        length -= length // 2
    return (*found, length)


@cache
def tables(pattern: str, length: int, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """What the masks look into, on the CPU."""
    generator, n = torch.Generator().manual_seed(0), -(-length // BLOCK)
    if pattern == "packed":
        ends = torch.tensor(skewed(length)).cumsum(0)
        return {"sequence": torch.bucketize(torch.arange(length), ends, right=True).int()}
    if pattern == "hash 16":
        buckets = torch.randint(BUCKETS, (heads, length), generator=generator)
        ordered, index = buckets.sort(dim=1, stable=True)
        return {"bucket": ordered.int(), "at": index.int()}
    a, c = torch.arange(n)[:, None], torch.arange(n)
    if pattern == "local-stride 16":
        shift = torch.arange(heads)[:, None, None]
        return {"blocks": (a - c < LOCAL) | ((c + shift) % STRIDE == 0)}
    return {"blocks": (torch.rand(kv_heads, n, n, generator=generator) < DENSITY) | (a == c)}


def pairs(pattern: str, length: int, heads: int, kv_heads: int) -> float:
    """How many pairs of a query and a key are visible, per batch and head."""
    found = tables(pattern, length, heads, kv_heads)
    if pattern == "packed":
        return sum(n * (n + 1) / 2 for n in skewed(length))
    if pattern == "hash 16":
        counts = torch.stack([torch.bincount(x) for x in found["bucket"]]).double()
        return float((counts * (counts + 1) / 2).sum() / heads)
    whole = torch.full((found["blocks"].shape[1],), float(BLOCK))
    whole[-1] = length - BLOCK * (len(whole) - 1)
    blocks = found["blocks"].float().tril(-1)
    return float(blocks.mean(0).mv(whole).dot(whole) + (whole * (whole + 1) / 2).sum())


def sparse(pattern: str, length: int, heads: int, kv_heads: int, device: str) -> Sparse:
    found = {name: x.to(device) for name, x in tables(pattern, length, heads, kv_heads).items()}

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    if pattern == "packed":
        sequence = found["sequence"]
        ends = torch.tensor([0, *skewed(length)], device=device).cumsum(0).int()

        def in_sequence(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (sequence[q_idx] == sequence[kv_idx]) & (kv_idx <= q_idx)

        return Sparse(in_sequence, causal, {"cu_len_q": ends}, skewed(length))
    if pattern == "hash 16":
        bucket, at = found["bucket"], found["at"]

        def in_bucket(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (bucket[h, q_idx] == bucket[h, kv_idx]) & (at[h, kv_idx] <= at[h, q_idx])

        return Sparse(in_bucket, None, {})
    blocks = found["blocks"]
    group = heads // blocks.shape[0]

    def in_block(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return blocks[h // group, q_idx // BLOCK, kv_idx // BLOCK] & (kv_idx <= q_idx)

    def local_stride(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_block, kv_block = q_idx // BLOCK, kv_idx // BLOCK
        kept = (q_block - kv_block < LOCAL) | ((kv_block + h) % STRIDE == 0)
        return kept & (kv_idx <= q_idx)

    if pattern == "local-stride 16":
        return Sparse(in_block, local_stride, {})
    return Sparse(in_block, causal, {"block_sparse_mask": blocks[None], "block_size": (BLOCK, BLOCK)})

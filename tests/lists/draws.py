"""Random block lists, and the dense pattern that they mean, made without the package's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.masks.lists import BlockLists, Csr, Side

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Drawn:
    """Lists, and bool (Bm, Hm, Sq, Skv) of the pairs in partial and in full blocks."""

    lists: BlockLists
    partial: Tensor
    full: Tensor

    def visible(self, heads: int, mask: Mask | None) -> Tensor:
        """Which pairs count: bool (Bm, H, Sq, Skv)."""
        partial, full = (x.repeat_interleave(heads // x.shape[1], 1) for x in (self.partial, self.full))
        if mask is not None:
            b, h, q, kv = (
                torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
                for d, n in enumerate(partial.shape)
            )
            partial = partial & mask(b, h, q, kv)
        return partial | full


def csr(blocks: Tensor) -> Csr:
    """bool (Bm, Hm, rows, columns) as lists."""
    counts = blocks.sum(-1)
    ends = counts.flatten().cumsum(0)
    starts = torch.zeros(*blocks.shape[:2], blocks.shape[2] + 1, dtype=torch.int32)
    starts[..., 1:] = ends.view(counts.shape)
    starts[..., 0] = (ends.view(counts.shape) - counts)[..., 0]
    return Csr(starts, blocks.nonzero()[:, 3].to(torch.int32))


def lists_from(kinds: Tensor, block_q: int, block_kv: int, q_len: int, kv_len: int) -> Drawn:
    """kinds: (Bm, Hm, q blocks, kv blocks), 0 for hidden, 1 for partial, 2 for full."""
    kinds = kinds.clone()
    for axis, (size, length) in ((2, (block_q, q_len)), (3, (block_kv, kv_len))):
        if length % size:  # no block that sticks out is full
            last = kinds.select(axis, -1)
            last.clamp_(max=1)
    partial, full = kinds == 1, kinds == 2
    by_q = Side(csr(partial), csr(full))
    by_kv = Side(csr(partial.transpose(2, 3)), csr(full.transpose(2, 3)))

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)[:, :, :q_len, :kv_len]

    return Drawn(BlockLists(block_q, block_kv, q_len, kv_len, by_q, by_kv), spread(partial), spread(full))


def draw(
    seed: int,
    blocks: tuple[int, int],
    lengths: tuple[int, int],
    batches: int = 1,
    heads: int = 1,
    density: tuple[float, float] = (0.3, 0.3),
) -> Drawn:
    """Blocks partial and full with these probabilities; the first q block and the last kv block meet nothing."""
    rows, columns = (-(-n // size) for n, size in zip(lengths, blocks, strict=True))
    chance = torch.rand(batches, heads, rows, columns, generator=torch.Generator().manual_seed(seed))
    partial, full = density
    kinds = (chance < partial + full).int() + (chance < full).int()
    if rows > 2 and columns > 2:
        kinds[0, 0, 0], kinds[0, 0, :, -1] = 0, 0
        kinds[..., 1, 1] = 2
        kinds[..., -1, 0] = 2
    return lists_from(kinds, *blocks, *lengths)

"""Block lists: the contract between a mask that was analysed ahead of a call and the kernels that walk over it.

Queries and keys are cut into blocks of `block_q` and `block_kv` positions; the last block of an axis may be short. A
list names, for every block of one side, the blocks of the other side that it meets, full and partial ones apart.

    a pair is visible  iff  its block is in `full`, or its block is in `partial` and mask_mod holds for the pair

A block in no list holds no visible pair. No block is in both lists. A block that sticks out beyond the end of an axis
is never in `full` (as in torch), so a full block needs no test of its positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Csr:
    """Rows of block numbers, one row per (batch, head, block of this side).

    starts: int32 (Bm, Hm, blocks + 1), contiguous: row r of (b, h) is indices[starts[b, h, r] : starts[b, h, r + 1]].
    The offsets are absolute: they count from the beginning of `indices` for every batch and head.
    indices: int32 (n,), ascending within a row. Bm and Hm are 1 where the mask is the same for every batch or head.
    """

    starts: Tensor
    indices: Tensor

    def row(self, batch: int, head: int, block: int) -> Tensor:
        """The blocks of the other side in one row; a mask that does not depend on batch or head ignores them."""
        b, h = (i if n > 1 else 0 for i, n in zip((batch, head), self.starts.shape[:2], strict=True))
        first, end = self.starts[b, h, block : block + 2].tolist()
        return self.indices[first:end]

    def counts(self) -> Tensor:
        """How many blocks each row holds: int32 (Bm, Hm, blocks)."""
        return self.starts.diff(dim=-1)

    def to(self, device: torch.device | str) -> Csr:
        return Csr(self.starts.to(device), self.indices.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What the blocks of one axis meet on the other: partly visible blocks and wholly visible ones."""

    partial: Csr
    full: Csr

    def to(self, device: torch.device | str) -> Side:
        return Side(self.partial.to(device), self.full.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """Both sides of one mask: forward and dQ walk over `by_q`, dK and dV over `by_kv`. Both hold the same blocks.

    block_q, block_kv: positions per block. q_len, kv_len: the lengths that the mask was made for.
    """

    block_q: int
    block_kv: int
    q_len: int
    kv_len: int
    by_q: Side
    by_kv: Side

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    @property
    def shape(self) -> tuple[int, int]:
        """(Bm, Hm): 1 where the mask is the same for every batch or head."""
        batch, heads, _ = self.by_q.full.starts.shape
        return batch, heads

    def to(self, device: torch.device | str) -> BlockLists:
        by_q, by_kv = self.by_q.to(device), self.by_kv.to(device)
        return BlockLists(self.block_q, self.block_kv, self.q_len, self.kv_len, by_q, by_kv)

"""What a drawing shows of one batch and head: shares per cell, and how much work each row of blocks is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_engine.masks.classes import Listed
from attn_engine.masks.lists import Csr
from attn_engine.masks.mistakes import WrongBlockMask

if TYPE_CHECKING:
    from attn_engine.masks.block_mask import BlockMask

EMPTY, PARTIAL, FULL = range(3)


@dataclass(frozen=True, slots=True)
class Picture:
    """One batch and head in at most so many cells.

    cells: the class of each cell, rows of EMPTY, PARTIAL or FULL; a cell of several blocks has a class only where all
    of them have it, else it is PARTIAL. listed: the share of its blocks that are listed. work: for each row of cells,
    the share of the row that is computed.
    """

    title: str
    cells: list[list[int]]
    listed: list[list[float]]
    work: list[float]
    blocks: tuple[int, int]
    full: int
    partial: int

    @property
    def skipped(self) -> float:
        """The share of blocks that nothing is computed for."""
        return 1 - (self.full + self.partial) / (self.blocks[0] * self.blocks[1])

    @property
    def caption(self) -> str:
        q, kv = self.blocks
        return (
            f"{q} x {kv} blocks: {self.full} full, {self.partial} partial, "
            f"{q * kv - self.full - self.partial} empty; {self.skipped:.1%} skipped"
        )


def picture(mask: BlockMask, batch: int, head: int, most: tuple[int, int]) -> Picture:
    """`most`: rows and columns of cells at most. Raises WrongBlockMask for a batch or head that is not there."""
    for name, i, n in (("batch", batch, mask.shape[0]), ("head", head, mask.shape[1])):
        if not -n <= i < n:
            instead = "Give the batch and the head to be drawn."
            raise WrongBlockMask(argument=name, got=i, expected=f"one of {n}", instead=instead)
    lists = mask.lists()
    blocks = lists.q_blocks, lists.kv_blocks
    step = tuple(-(-n // m) for n, m in zip(blocks, most, strict=True))
    batch, head = batch % mask.shape[0], head % mask.shape[1]
    full, partial = (_group(x, batch, head) for x in (lists.by_q.full, lists.by_q.partial))
    sizes = torch.outer(*(_cell_sizes(n, s) for n, s in zip(blocks, step, strict=True)))
    full_share, partial_share = (_cells(x, step, blocks) / sizes for x in (full, partial))
    classes = torch.full(sizes.shape, PARTIAL)
    classes[full_share == 1] = FULL
    classes[full_share + partial_share == 0] = EMPTY
    listed = full_share + partial_share
    work = (listed * sizes).sum(1) / sizes.sum(1)
    title = f"{getattr(mask.mask_mod, '__name__', 'mask')}, Q_LEN {lists.q_len}, KV_LEN {lists.kv_len}"
    counts = len(full.columns), len(partial.columns)
    return Picture(title, classes.tolist(), listed.tolist(), work.tolist(), blocks, *counts)


def _group(csr: Csr, batch: int, head: int) -> Listed:
    """The rows of one batch and head."""
    own_batch, own_heads, _ = csr.starts.shape
    starts = csr.starts[batch % own_batch, head % own_heads].cpu()
    return Listed(starts.diff().to(torch.int64), csr.indices[int(starts[0]) : int(starts[-1])].cpu())


def _cells(listed: Listed, step: tuple[int, ...], blocks: tuple[int, int]) -> Tensor:
    """How many of the listed blocks lie in each cell."""
    rows, columns = (-(-n // s) for n, s in zip(blocks, step, strict=True))
    cell = listed.rows.to(torch.int64) // step[0] * columns + listed.columns.to(torch.int64) // step[1]
    return torch.bincount(cell, minlength=rows * columns).reshape(rows, columns).to(torch.float64)


def _cell_sizes(blocks: int, step: int) -> Tensor:
    """How many blocks each cell spans along one axis; the last one may be short."""
    return (
        torch.arange(0, blocks, step)
        .add(step)
        .clamp(max=blocks)
        .diff(prepend=torch.zeros(1, dtype=torch.int64))
        .to(torch.float64)
    )

"""dQ of a backward pass in one kernel: each split of the keys adds to a part of its own, summed in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.ops import Number

# Numbers that the parts of a launch may take up, where dQ and the captured gradients are smaller.
ROOM = 2**23


@dataclass(frozen=True, slots=True, eq=False)
class QueryParts:
    """What the launches of the kernel need for dQ.

    shared: axes over which each program instance runs. Every split then has a part for each of their batches and heads:
    they are taken in pieces, so that all parts of a launch hold at most `room` numbers, or one batch's one kv head.
    """

    dq: Tensor
    splits: int
    group: int  # query heads per kv head
    shared: tuple[str, ...]
    compute: torch.dtype
    room: int

    def pieces(self, tensors: dict[str, Tensor], scale: Number) -> Iterator[dict[str, int]]:
        """The further numbers of each launch, for which `tensors` gets dQ_parts; fills dq, which is scale times their
        sum."""
        parts: Tensor | None = None
        for batches, kv_heads in self._ranges():
            heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
            piece = self.dq[batches, heads]
            if parts is None or parts.shape[1:] != piece.shape or self._in_place:
                parts = self._parts_of(piece)
            else:
                parts.zero_()
            tensors["dQ_parts"] = parts
            yield {
                "batch_begin": batches.start,
                "batch_end": batches.stop,
                "kv_head_begin": kv_heads.start,
                "kv_head_end": kv_heads.stop,
            }
            _sum_parts(piece, parts, scale)

    @property
    def _in_place(self) -> bool:
        """Whether the kernel adds to dq itself."""
        return self.splits == 1 and self.dq.dtype is self.compute

    def _ranges(self) -> Iterator[tuple[slice, slice]]:
        batches, heads, rows, dim = self.dq.shape
        kv_heads = heads // self.group
        batches_at_once, heads_at_once = batches, kv_heads
        of_head = max(1, self.splits * self.group * rows * dim)
        if "kv_head" in self.shared and not self._in_place:
            others = 1 if "batch" in self.shared else batches
            heads_at_once = min(kv_heads, self.room // (of_head * others))
        if "batch" in self.shared and not self._in_place:
            batches_at_once = min(batches, self.room // (of_head * kv_heads))
        for batch in range(0, batches, max(1, batches_at_once)):
            for head in range(0, kv_heads, max(1, heads_at_once)):
                yield (
                    slice(batch, min(batches, batch + max(1, batches_at_once))),
                    slice(head, min(kv_heads, head + max(1, heads_at_once))),
                )

    def _parts_of(self, dq: Tensor) -> Tensor:
        """(splits, B, H, Sq, D) zeros: dq itself where it can hold the sum, else slices in dq's order of dimensions."""
        if self._in_place:
            return dq.zero_().unsqueeze(0)
        order = sorted(range(4), key=lambda i: (-dq.stride(i), i))
        shape = (self.splits, *(dq.shape[i] for i in order))
        base = torch.zeros(shape, dtype=self.compute, device=dq.device)
        back = [order.index(i) + 1 for i in range(4)]
        return base.permute(0, *back)


def _sum_parts(dq: Tensor, parts: Tensor, scale: Number) -> None:
    """dq = scale times the sum of `parts`, added one after the other and without further memory."""
    splits = parts.shape[0]
    if splits == 1 and parts.dtype is dq.dtype:  # the kernel added to dq itself
        dq.mul_(scale)
        return
    total = parts[0]
    for i in range(1, splits):
        total += parts[i]
    dq.copy_(total.mul_(scale))

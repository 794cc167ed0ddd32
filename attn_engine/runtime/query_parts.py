"""dQ of a backward pass in one kernel: each split of the keys adds to a part of its own, summed in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.runtime.dq_parts import parts_of, sum_parts

# Numbers that the parts of a launch may take up, where dQ and the captured gradients are smaller.
ROOM = 2**23


@dataclass(frozen=True, slots=True, eq=False)
class QueryParts:
    """What the launches of the kernel need for dQ.

    sequences: how many share the rows of dq; they are all taken at once. None: each has a batch of its own.
    shared: axes over which each program instance runs. Every split then has a part for each of their batches and heads:
    they are taken in pieces, so that all parts of a launch hold at most `room` numbers, or one batch's one kv head.
    """

    dq: Tensor
    splits: int
    group: int  # query heads per kv head
    shared: tuple[str, ...]
    compute: torch.dtype
    room: int
    sequences: int | None = None

    def pieces(self, tensors: dict[str, Tensor], scale: Number) -> Iterator[dict[str, int]]:
        """The further numbers of each launch, for which `tensors` gets dQ_parts; fills dq, which is scale times their
        sum."""
        parts: Tensor | None = None
        for batches, kv_heads in self._ranges():
            heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
            piece = self.dq[batches, heads]
            if parts is None or parts.shape[1:] != piece.shape or self._in_place:
                parts = parts_of(piece, self.splits, self.compute)
            else:
                parts.zero_()
            tensors["dQ_parts"] = parts
            yield {
                "batch_begin": batches.start,
                "batch_end": batches.stop if self.sequences is None else self.sequences,
                "kv_head_begin": kv_heads.start,
                "kv_head_end": kv_heads.stop,
            }
            sum_parts(piece, parts, scale)

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

"""Lists of the blocks that a call gives, for both loops: a few torch operations, none of them per sequence or head.

A block of the lists holds one or several units (`runtime/block_sparse.py`) of each axis. Where some of its pairs of
units are visible and others are not, a bit for each is kept beside its entry: bit
`q_unit * kv_units + kv_unit` of the block.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_engine.codegen.lower.given_blocks import BITS
from attn_engine.codegen.lower.listed import blocks_param, seen_param, starts_param

Tensors = dict[str, Tensor]
LOOPS = ("kv", "q")


@dataclass(frozen=True, slots=True)
class UnitTable:
    """visible: bool (1 or batches, 1 or heads, units of queries, units of keys); batches, heads: of the lists."""

    visible: Tensor
    batches: int
    heads: int

    def cut(self, q_units: int, kv_units: int) -> CutTable:
        """In blocks of so many units."""
        if q_units == kv_units == 1:
            return CutTable(self, self.visible, None, None)
        b, h, rows, columns = self.visible.shape
        more = (0, -columns % kv_units, 0, -rows % q_units)
        shape = (b, h, -(-rows // q_units), q_units, -(-columns // kv_units), kv_units)
        # What lies beyond the end is no reason to look at bits.
        known = F.pad(self.visible, more, value=True).view(shape)
        some = F.pad(self.visible, more).view(shape).any(5).any(3) if any(more) else known.any(5).any(3)
        return CutTable(self, some, known.all(5).all(3), known)

    def unions(self, smallest: int, most: int) -> tuple[list[int], list[int]]:
        """How many units of queries share a list, twice as many each time, and how many entries lists then have."""
        sizes, unions = [smallest], [self.cut(smallest, 1).some]
        while 2 * sizes[-1] <= most and unions[-1].shape[2] > 1:
            unions.append(_by_pairs(unions[-1]))
            sizes.append(2 * sizes[-1])
        return sizes, torch.stack([x.sum() for x in unions]).tolist()


def _by_pairs(union: Tensor) -> Tensor:
    """The unions of neighbouring rows of blocks."""
    even = F.pad(union, (0, 0, 0, union.shape[2] % 2))
    return even[:, :, ::2] | even[:, :, 1::2]


@dataclass(frozen=True, slots=True)
class CutTable:
    """Which blocks are visible in part or as a whole, and their units; None where every block is one unit."""

    of: UnitTable
    some: Tensor
    every: Tensor | None
    units: Tensor | None

    def tensors(self, loops: Collection[str] = LOOPS) -> Tensors:
        """The lists of these loops, "kv" of the forward pass and "q" of the backward pass, by the kernels' names."""
        found: Tensors = {}
        full = self.some if self.every is None else self.some & self.every
        for loop, turned in (("kv", False), ("q", True)):
            if loop not in loops:
                continue
            if self.units is not None:
                partial = self.some & ~full
                found |= self._lists(loop, "partial", partial, turned)
                found[seen_param(loop)] = self._words(partial, turned)
            found |= self._lists(loop, "full", full, turned)
        return found

    def _lists(self, loop: str, kind: str, visible: Tensor, turned: bool) -> Tensors:
        """Where the list of each block begins, absolute, and the blocks of all lists; int32."""
        visible = visible.transpose(2, 3) if turned else visible
        entries = visible.nonzero()[:, 3].to(torch.int32)
        starts = starts_of(visible.sum(-1), self.of.batches, self.of.heads)
        return {starts_param(loop, kind): starts, blocks_param(loop, kind): entries}

    def _words(self, partial: Tensor, turned: bool) -> Tensor:
        """The bits of every entry of the list of partial blocks, in words of 32: int32 (entries * words)."""
        assert self.units is not None
        units = self.units.transpose(3, 4)  # (..., blocks of q, blocks of kv, units of q, units of kv)
        if turned:
            units, partial = units.transpose(2, 3), partial.transpose(2, 3)
        return words_of(units[partial].flatten(1))


def starts_of(counts: Tensor, batches: int, heads: int) -> Tensor:
    """Where each list begins and the last one ends, from their lengths (1 or batches, 1 or heads, lists)."""
    b, h, lists = counts.shape
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view(b, h, lists)
    first = ends[..., :1] - counts[..., :1] if lists else ends.new_zeros(b, h, 1)
    return torch.cat((first, ends), -1).to(torch.int32).expand(batches, heads, lists + 1)


def words_of(bits: Tensor) -> Tensor:
    """bool (entries, bits) in words of 32, from the lowest bit on: int32 (entries * words)."""
    entries, count = bits.shape
    words = torch.zeros(entries, -(-count // BITS), dtype=torch.int32, device=bits.device)
    for i in range(count):
        place = i % BITS
        one = 1 << place if place < BITS - 1 else -(1 << place)  # the highest bit is the sign
        words[:, i // BITS] += bits[:, i] * torch.tensor(one, dtype=torch.int32)
    return words.flatten()

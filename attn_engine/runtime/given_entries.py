"""Lists of blocks that a call gives as indices: sorted once for each loop, with no table of all that may be chosen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.codegen.lower.listed import blocks_param, seen_param, starts_param
from attn_engine.runtime.given_lists import LOOPS, Tensors, starts_of, words_of


@dataclass(frozen=True, slots=True)
class ChosenUnits:
    """chosen: int64 (1 or batches, 1 or heads, units of queries, most), numbers of units of keys, `kv_units` for none;
    batches, heads: of the lists."""

    chosen: Tensor
    kv_units: int
    batches: int
    heads: int

    def cut(self, q_units: int, kv_units: int) -> CutEntries:
        """In blocks of so many units."""
        b, h, rows, _ = self.chosen.shape
        row_blocks, columns = -(-rows // q_units), -(-self.kv_units // kv_units)
        device = self.chosen.device
        row = torch.arange(rows, device=device)[:, None]
        of_head = torch.arange(b * h, device=device).view(b, h, 1, 1) * row_blocks
        there = self.chosen < self.kv_units
        keys = ((of_head + row // q_units) * columns + self.chosen // kv_units)[there]
        entries, which = torch.unique(keys, return_inverse=True)
        seen = None
        if q_units * kv_units > 1:
            bits = (row % q_units * kv_units + self.chosen % kv_units)[there]
            seen = torch.zeros(len(entries), q_units * kv_units, dtype=torch.bool, device=device)
            seen[which, bits] = True
        return CutEntries(self, (b, h, row_blocks, columns), (q_units, kv_units), entries, seen)

    def unions(self, smallest: int, most: int) -> tuple[list[int], list[int]]:
        """How many units of queries share a list, twice as many each time, and how many entries lists then have."""
        cut = self.cut(smallest, 1)
        (_, _, row_blocks, columns), entries, sizes = cut.shape, cut.entries, [smallest]
        counts = [len(entries)]
        while 2 * sizes[-1] <= most and row_blocks > 1:
            row, column = entries // max(columns, 1), entries % max(columns, 1)
            pairs = -(-row_blocks // 2)
            row = row // row_blocks * pairs + row % row_blocks // 2
            entries, row_blocks = torch.unique(row * columns + column), pairs
            sizes.append(2 * sizes[-1])
            counts.append(len(entries))
        return sizes, counts


@dataclass(frozen=True, slots=True)
class CutEntries:
    """entries: (list, block of keys) as one number, ascending; shape: batches, heads, blocks of queries and of keys.
    seen: bool (entries, units of a block); None where every block is one unit."""

    of: ChosenUnits
    shape: tuple[int, int, int, int]
    units: tuple[int, int]
    entries: Tensor
    seen: Tensor | None

    def tensors(self, loops: Collection[str] = LOOPS) -> Tensors:
        """The lists of these loops, "kv" of the forward pass and "q" of the backward pass, by the kernels' names."""
        _, _, rows, columns = self.shape
        row, column = self.entries // max(columns, 1), self.entries % max(columns, 1)
        rows = max(rows, 1)
        known = None if self.seen is None else self._known(row % rows, column)
        found: Tensors = {}
        for loop in loops:
            keys, by, across = self.entries, None, columns
            if loop == "q":
                other = (row // rows * columns + column) * rows + row % rows
                by, across = other.argsort(), rows
                keys = other[by]
            if known is not None:
                seen = known if by is None else known[by]
                whole = seen.all(1)
                found |= self._lists(loop, "partial", keys[~whole], across)
                found[seen_param(loop)] = words_of(seen[~whole])
                keys = keys[whole]
            found |= self._lists(loop, "full", keys, across)
        return found

    def _known(self, row: Tensor, column: Tensor) -> Tensor:
        """The units that are seen, and those beyond the end, which are no reason to look at bits."""
        assert self.seen is not None
        q_units, kv_units = self.units
        device = row.device
        q = row[:, None] * q_units + torch.arange(q_units, device=device)
        kv = column[:, None] * kv_units + torch.arange(kv_units, device=device)
        inside = (q < self.of.chosen.shape[2])[:, :, None] & (kv < self.of.kv_units)[:, None, :]
        return self.seen | ~inside.flatten(1)

    def _lists(self, loop: str, kind: str, keys: Tensor, across: int) -> Tensors:
        b, h, rows, columns = self.shape
        lists = rows if loop == "kv" else columns
        counts = torch.bincount(keys // max(across, 1), minlength=b * h * lists)
        starts = starts_of(counts.view(b, h, lists), self.of.batches, self.of.heads)
        return {
            starts_param(loop, kind): starts,
            blocks_param(loop, kind): (keys % max(across, 1)).to(torch.int32),
        }

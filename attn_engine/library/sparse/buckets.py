"""Rows that see only rows of their own kind, as packed sequences: the rows of one bucket, or the kept ones of one head.

Rows are counted with heads before positions, (b H + h) N + n, so that those of one head lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.library.sparse.compaction import Moves, kept_rows, permuted

# Rows of a sequence, on average: shorter ones cost more than a mask over all rows in sorted order.
FEWEST_ROWS = 16
# The same: up to there forward tiles of 32 rows are faster than those of 64, by 8 % at 128 and at 512 rows.
SHORT = 1024
# Positions are a table with as many columns as the longest sequence has rows: how many times the rows it may have.
MOST_PADDING = 8


@dataclass(frozen=True, slots=True)
class Side:
    """The rows of q, or of k and v. moves: from (B, N, H, .) into sequences. order: their numbers, (T,), those of kept
    rows. cu_len: cumulative lengths of the sequences, int64 (n + 1,)."""

    moves: Moves
    order: Tensor
    cu_len: Tensor
    length: int

    @property
    def longest(self) -> int:
        return int(self.cu_len.diff().max()) if len(self.cu_len) > 1 else 0

    def positions(self, columns: int) -> Tensor:
        """Where the rows of each sequence were along N: int32 (n, columns), 0 past a sequence's end."""
        count, rows = len(self.cu_len) - 1, len(self.order)
        starts = torch.arange(count, device=self.order.device) * columns - self.cu_len[:-1]
        lengths = self.cu_len.clamp(max=rows).diff()
        places = starts.repeat_interleave(lengths, output_size=rows)
        places += torch.arange(rows, device=self.order.device)
        table = torch.zeros(count * columns, dtype=torch.int32, device=self.order.device)
        table[places] = (self.order % max(self.length, 1)).int()
        return table.view(count, columns)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both sides, sequence by sequence. alike: they have the same rows, in the same order."""

    q: Side
    k: Side
    alike: bool

    @property
    def columns(self) -> int:
        """Of the tables of positions: a power of two, so that few engines serve all lengths."""
        return 1 << max(self.q.longest - 1, self.k.longest - 1, 0).bit_length()

    @property
    def short(self) -> bool:
        """Whether sequences are so short that their last tile, filled in part, counts."""
        return max(len(self.q.order), len(self.k.order)) < SHORT * (len(self.q.cu_len) - 1)

    @property
    def worth_it(self) -> bool:
        """Whether sequences cost less than a mask over all the rows."""
        rows, count = max(len(self.q.order), len(self.k.order)), len(self.q.cu_len) - 1
        return rows >= FEWEST_ROWS * count and (self.alike or count * self.columns <= MOST_PADDING * rows)


@torch.no_grad()
def by_bucket(q_buckets: Tensor, k_buckets: Tensor) -> Pairs:
    """A sequence for each bucket of each head: its queries and its keys, in the order that they have along N.

    q_buckets (B, Nq, H), k_buckets (B, Nk, H): int32, at most 2e9 apart.
    """
    alike = q_buckets is k_buckets or torch.equal(q_buckets, k_buckets)
    given = (q_buckets,) if alike else (q_buckets, k_buckets)
    ends = [torch.aminmax(x) for x in given if x.numel()]
    low = min((int(x.min) for x in ends), default=0)
    span = max((int(x.max) for x in ends), default=0) - low + 1
    found = [torch.sort(_numbered(x, low, span), stable=True) for x in given]
    if alike:
        counts = torch.unique_consecutive(found[0].values, return_counts=True)[1]
        lengths = [_cumulative(counts)]
    else:
        buckets = torch.cat([torch.unique_consecutive(x.values) for x in found]).unique()
        lengths = [_cumulative(torch.searchsorted(x.values, buckets, right=True), summed=True) for x in found]
    sides = [
        Side(permuted(x.indices, tuple(of.shape)), x.indices, cu_len, of.shape[1])
        for x, of, cu_len in zip(found, given, lengths, strict=True)
    ]
    return Pairs(sides[0], sides[-1], alike)


@torch.no_grad()
def by_keep(q_keep: Tensor, k_keep: Tensor) -> Pairs:
    """A sequence for the kept rows of each head, q_keep (B, Nq, H) and k_keep (B, Nk, H); two more for the slot of the
    rows that are not: a query without keys, whose output is 0, and a key without queries, whose gradient is."""
    alike = q_keep is k_keep or torch.equal(q_keep, k_keep)
    q = _kept(q_keep, before=0)
    k = _kept(k_keep, before=1)
    return Pairs(q, k, alike)


def _kept(keep: Tensor, before: int) -> Side:
    moves, order = kept_rows(keep)
    ends = _cumulative((keep != 0).sum(1).flatten())
    spare = torch.full((2,), len(moves.there), device=keep.device)
    spare[:before] = len(order)
    return Side(moves, order, torch.cat((ends, spare)), keep.shape[1])


def _numbered(buckets: Tensor, low: int, span: int) -> Tensor:
    """One number for a head's bucket, ascending from head to head. A flat sort of integers is a radix sort."""
    batches, length, heads = buckets.shape
    dtype = torch.int32 if batches * heads * span < 2**31 else torch.int64
    first = torch.arange(batches * heads, dtype=dtype, device=buckets.device)[:, None] * span
    own = buckets.transpose(1, 2).reshape(batches * heads, length) - low
    return (own + first).flatten()


def _cumulative(counts: Tensor, *, summed: bool = False) -> Tensor:
    ends = counts if summed else counts.cumsum(0)
    return torch.cat((ends.new_zeros(1), ends))

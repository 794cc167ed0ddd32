"""Rows that see only rows of their own kind, as packed sequences: the rows of one bucket, or the kept ones of one head.

Rows are counted with heads before positions, (b H + h) N + n, so that those of one head lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_engine.library.sparse.compaction import (
    Moves,
    heads_first_positions,
    heads_first_rows,
    kept_numbers,
    moves_of,
)

# Rows of a sequence, on average: shorter ones cost more than a mask over all rows in sorted order.
FEWEST_ROWS = 16
# The same: up to there forward tiles of 32 rows are faster than those of 64, by 8 % at 128 and at 512 rows.
SHORT = 1024
# Positions are a table with as many columns as the longest sequence has rows: how many times the rows it may have.
MOST_PADDING = 8


@dataclass(frozen=True)
class Side:
    """The rows of q, or of k and v.

    order: the numbers of those that sequences have, one after the other, (T,). ends: cumulative lengths of the
    sequences, int64 (n + 1,). shape: (B, N, H). dropped_before: None where sequences have all rows; else how many of
    two more sequences end before the slot of the rows that no sequence has.
    """

    order: Tensor
    ends: Tensor
    shape: tuple[int, int, int]
    dropped_before: int | None = None

    @cached_property
    def moves(self) -> Moves:
        """From (B, N, H, .) into the sequences of `cu_len`."""
        batches, length, heads = self.shape
        return moves_of(
            self.rows(heads_first=False), batches * length * heads, spare=self.dropped_before is not None
        )

    @cached_property
    def cu_len(self) -> Tensor:
        """The cumulative lengths of what is moved: with the two sequences for dropped rows."""
        if self.dropped_before is None:
            return self.ends
        spare = torch.full((2,), len(self.moves.there), device=self.ends.device)
        spare[: self.dropped_before] = len(self.order)
        return torch.cat((self.ends, spare))

    @cached_property
    def longest(self) -> int:
        return int(self.ends.diff().max()) if len(self.ends) > 1 else 0

    def rows(self, *, heads_first: bool) -> Tensor:
        """int32 (T,): where those rows are in a tensor that lies as (B, N, H, .), or as (B, H, N, .)."""
        if heads_first:
            return self.order.int()
        return heads_first_rows(*self.shape, self.order.device).index_select(0, self.order)

    def positions(self, columns: int, *, moved: bool) -> Tensor:
        """Where the rows of each sequence were along N: int32 (n, columns), 0 past a sequence's end. n is that of
        `cu_len` where rows are moved, else that of `ends`."""
        count, rows = len(self.ends) - 1, len(self.order)
        device = self.order.device
        starts = torch.arange(count, device=device) * columns - self.ends[:-1]
        places = starts.repeat_interleave(self.ends.diff(), output_size=rows)
        places += torch.arange(rows, device=device)
        more = 2 if moved and self.dropped_before is not None else 0
        table = torch.zeros((count + more) * columns, dtype=torch.int32, device=device)
        found = heads_first_positions(*self.shape, device).index_select(0, self.order)
        return table.scatter_(0, places, found).view(count + more, columns)


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
        return max(len(self.q.order), len(self.k.order)) < SHORT * (len(self.q.ends) - 1)

    @property
    def worth_it(self) -> bool:
        """Whether sequences cost less than a mask over all the rows."""
        rows, count = max(len(self.q.order), len(self.k.order)), len(self.q.ends) - 1
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
        Side(x.indices, ends, (of.shape[0], of.shape[1], of.shape[2]))
        for x, of, ends in zip(found, given, lengths, strict=True)
    ]
    return Pairs(sides[0], sides[-1], alike)


@torch.no_grad()
def by_keep(q_keep: Tensor, k_keep: Tensor) -> Pairs:
    """A sequence for the kept rows of each head, q_keep (B, Nq, H) and k_keep (B, Nk, H).

    Where rows are moved there are two more for the slot of those that are not kept: a query without keys, whose output
    is 0, and a key without queries, whose gradient is.
    """
    alike = q_keep is k_keep or torch.equal(q_keep, k_keep)
    q = _kept(q_keep, before=0)
    k = _kept(k_keep, before=1)
    return Pairs(q, k, alike)


def _kept(keep: Tensor, before: int) -> Side:
    ends = _cumulative((keep != 0).sum(1).flatten())
    return Side(kept_numbers(keep), ends, (keep.shape[0], keep.shape[1], keep.shape[2]), before)


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

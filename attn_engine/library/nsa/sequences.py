"""Where the tokens of a call lie: in a batch, packed one sequence after the other, or in caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine.library.arguments import integers
from attn_engine.library.nsa.sizes import Compression, refuse

CuSeqlens = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The queries of a sequence are its last tokens.

    k_len: rows of k in a batch; where it is packed, all rows. cumulative: of packed queries and of packed keys,
    integers (sequences + 1,). lengths: integers (batch,), how many rows of a cache are filled; counts: how many
    queries there are of each, where not all. offset: the position of the first query of every sequence; None where
    all begin at 0.
    rows: where compressed rows lie, cumulative or as lengths; None where it follows from the tokens. block_table: of
    caches in pages, int32 (batch, pages of a sequence); those of compressed rows have the same places.
    """

    k_len: int
    cumulative: tuple[Tensor, Tensor] | None = None
    lengths: Tensor | None = None
    counts: Tensor | None = None
    offset: Tensor | None = None
    rows: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cumulative is not None

    def of_tokens(self) -> dict[str, Any]:
        """What an engine's call says of keys that are tokens."""
        if self.cumulative is not None:
            return {"cu_len_q": self.cumulative[0], "cu_len_kv": self.cumulative[1]}
        return self._of_caches(self.lengths)

    def of_blocks(self, compression: Compression) -> dict[str, Any]:
        """What an engine's call says of keys that are compressed rows."""
        if self.cumulative is not None:
            return {"cu_len_q": self.cumulative[0], "cu_len_kv": self.rows_cumulative(compression)}
        if self.rows is None and self.lengths is not None:
            return self._of_caches(compression.complete_each(self.lengths))
        return self._of_caches(self.rows)

    def _of_caches(self, lengths: Tensor | None) -> dict[str, Any]:
        named = {"len_q": self.counts, "len_kv": lengths, "block_table": self.block_table}
        return {name: x for name, x in named.items() if x is not None}

    def rows_cumulative(self, compression: Compression) -> Tensor:
        """int32 (sequences + 1,) of packed compressed rows."""
        if self.rows is not None:
            return self.rows
        assert self.cumulative is not None
        return summed(compression.complete_each(self.cumulative[1].diff()))

    def blocks(self, compression: Compression) -> int:
        """Compressed rows: of each in a batch, of all where they are packed."""
        if self.cumulative is None:
            return compression.complete(self.k_len)
        return int(self.rows_cumulative(compression)[-1])

    def block_positions(self, compression: Compression, device: torch.device) -> Tensor:
        """The first token of every compressed block in its sequence, int64 (blocks,)."""
        if self.cumulative is None:
            return torch.arange(self.blocks(compression), device=device) * compression.stride
        counts = self.rows_cumulative(compression).diff().long()
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        return (torch.arange(len(before), device=device) - before) * compression.stride

    def by_sequence(self, x: Tensor) -> Tensor:
        """(batch, heads, TQ, n) of x (batch, TQ, heads, n) or packed (rows, heads, n), as lists of blocks are given;
        what lies behind the end of a sequence is anything."""
        if self.cumulative is None or not len(x):
            return (
                x.transpose(-3, -2) if self.cumulative is None else x.new_zeros(0, x.shape[1], 0, x.shape[2])
            )
        starts, lengths = self.cumulative[0][:-1].long(), self.cumulative[0].diff()
        rows = starts[:, None] + torch.arange(int(lengths.max()), device=x.device)
        return x[rows.clamp(max=len(x) - 1)].transpose(1, 2)


def summed(counts: Tensor) -> Tensor:
    """Cumulative from 0 on, int32 (sequences + 1,)."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)


def sequences_of(q: Tensor, k_len: int, cu_seqlens: CuSeqlens) -> Sequences:
    """The places of q (batch, TQ, heads, D) and k_len keys, or, with cu_seqlens, of packed (rows, heads, D).

    Raises WrongArgument.
    """
    if cu_seqlens is None:
        return _of_batch(q, k_len)
    of_q, of_k = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    for x, rows in ((of_q, len(q)), (of_k, k_len)):
        integers("cu_seqlens", x, (1,))
        _check_cumulative(x, rows)
    if of_q.shape != of_k.shape:
        refuse("cu_seqlens", (len(of_q), len(of_k)), "of one length for q and k", "Give (cu_q, cu_k).")
    if of_q is of_k:
        return Sequences(k_len, (of_q, of_k))
    offset = (of_k.diff() - of_q.diff()).to(torch.int32)
    if bool((offset < 0).any()):
        refuse(
            "cu_seqlens", "more queries than keys", "a key for every query", "Queries are the last tokens."
        )
    return Sequences(k_len, (of_q, of_k), offset=offset)


def sequences_in_caches(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Sequences:
    """Of q (batch, TQ, heads, D), TQ or counts[b] queries: the last of the lengths[b] rows of k (batch, capacity,
    ...), or in pages (pages, rows of a page, ...).
    """
    offset = (lengths - (q.shape[1] if counts is None else counts)).to(torch.int32)
    return Sequences(k.shape[1], None, lengths, counts, offset, rows, block_table)


def _of_batch(q: Tensor, k_len: int) -> Sequences:
    late = k_len - q.shape[1]
    if late < 0:
        refuse("the length of q", q.shape[1], f"at most that of k, {k_len}", "Queries are the last tokens.")
    offset = torch.full((q.shape[0],), late, dtype=torch.int32, device=q.device)
    return Sequences(k_len, offset=offset if late else None)


def _check_cumulative(cu_seqlens: Tensor, rows: int) -> None:
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends != sorted(ends) or ends[-1] > rows:
        instead = "Give the sums of lengths from 0 on: [0, len_0, len_0 + len_1, ...]."
        refuse("cu_seqlens", ends, f"ascending from 0 to {rows} at most, the rows that there are", instead)

"""Lists of tokens as tensors of a call: which rows of K and V each query reads, a piece of the queries at a time.

A call brings int (batch, queries, kv heads or 1, longest list). An entry outside of the keys counts for nothing,
wherever it stands; an entry that stands there twice counts twice. Nothing here is larger than a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_engine.runtime.token_errors import refuse

# Numbers of K and V that are gathered at a time: 32 MB of float32. From the sizes alone, so that the same call is
# always cut alike.
PIECE = 2**23


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some queries of some kv heads: what they read.

    tokens: of the queries of all batches, one after the other. heads, kv_heads: query heads and kv heads.
    rows: int64 (n, longest), numbers of rows of K and V; places that are no entry read row 0. counts: int64 (n,).
    positions: int32 (n, longest), what the entries are for the user's functions. full: every list is that long.
    """

    tokens: slice
    heads: slice
    kv_heads: slice
    rows: Tensor
    counts: Tensor
    positions: Tensor
    full: bool

    @property
    def inside(self) -> Tensor:
        """bool (n, longest): which places are entries."""
        return torch.arange(self.rows.shape[1], device=self.rows.device) < self.counts[:, None]


@dataclass(frozen=True, eq=False)
class TokenLists:
    """What a call says about the keys of its queries.

    name, table_name: how the caller calls them. indices: (B, S, kv heads or 1, longest). limit: int64 (B, S), entries
    from there on count for nothing. counts: entries of each list that count, (B, S, kv heads or 1), or None.
    block_table: where the positions lie in a cache, or None. rows_of_batch: rows of K of a batch or of a page; 0:
    entries are rows themselves. all_rows: of all batches or pages.
    """

    name: str
    table_name: str
    indices: Tensor
    limit: Tensor
    counts: Tensor | None
    block_table: Tensor | None
    rows_of_batch: int
    all_rows: int
    heads: int
    kv_heads: int

    @property
    def queries(self) -> int:
        return self.indices.shape[0] * self.indices.shape[1]

    def pieces(self, numbers_of_row: int) -> Iterator[Piece]:
        """All queries of all heads; numbers_of_row: what is gathered for an entry and a kv head."""
        lists, group = self.indices.shape[2], self.heads // self.kv_heads
        kv_heads = self.kv_heads if lists == 1 else 1
        of_query = max(1, self.indices.shape[3] * numbers_of_row * kv_heads)
        step = max(1, PIECE // of_query)
        for i in range(lists):
            kv = slice(i * kv_heads, (i + 1) * kv_heads)
            heads = slice(kv.start * group, kv.stop * group)
            for first in range(0, self.queries, step):
                tokens = slice(first, min(first + step, self.queries))
                yield self._piece(tokens, heads, kv, i)

    def _piece(self, tokens: slice, heads: slice, kv_heads: slice, i: int) -> Piece:
        found = self.indices[:, :, i].reshape(-1, self.indices.shape[3])[tokens]
        if self.counts is None and self._all_inside(found):
            counts, valid, full = found.new_full((len(found),), found.shape[1], dtype=torch.int64), None, True
        else:
            found, valid, counts, full = self._entries_first(found, tokens, i)
        positions = found.to(torch.int64)
        rows = self._rows(positions, self.batches(tokens), valid)
        return Piece(tokens, heads, kv_heads, rows, counts, found.to(torch.int32), full)

    def _all_inside(self, found: Tensor) -> bool:
        low, high = found.aminmax()
        return int(low) >= 0 and int(high) < self._least_limit

    @cached_property
    def _least_limit(self) -> int:
        return int(self.limit.min())

    def _entries_first(self, found: Tensor, tokens: slice, i: int) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Lists (n, longest) with their entries in front and 0 behind; which places are entries, how many there are,
        and whether all lists are equally long."""
        valid = (found >= 0) & (found < self.limit.reshape(-1)[tokens][:, None])
        if self.counts is not None:
            of_list = self.counts[:, :, min(i, self.counts.shape[2] - 1)].reshape(-1)[tokens]
            valid &= torch.arange(found.shape[1], device=found.device) < of_list[:, None]
        counts = valid.sum(1)
        longest = int(counts.max())
        full = longest > 0 and bool((counts == longest).all())
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
            found, valid = found.gather(1, order), valid.gather(1, order)
        columns = slice(0, max(1, longest))
        return torch.where(valid, found, 0)[:, columns], valid[:, columns], counts, full

    def batches(self, tokens: slice) -> Tensor:
        """The batch of each of these queries, int64."""
        every = torch.arange(tokens.start, tokens.stop, device=self.indices.device)
        return every // max(1, self.indices.shape[1])

    def _rows(self, positions: Tensor, batch: Tensor, valid: Tensor | None) -> Tensor:
        """The rows of K at positions (n, longest); valid: which of them count, None: all."""
        if not self.rows_of_batch:
            return positions
        if self.block_table is None:
            return (
                positions if self.indices.shape[0] == 1 else positions + batch[:, None] * self.rows_of_batch
            )
        pages = self.block_table[batch].gather(1, positions // self.rows_of_batch).to(torch.int64)
        rows = pages * self.rows_of_batch + positions % self.rows_of_batch
        rows = rows if valid is None else torch.where(valid, rows, 0)
        low, high = rows.aminmax()
        if int(low) < 0 or int(high) >= self.all_rows:
            self._refuse_page(positions, batch, pages, (rows < 0) | (rows >= self.all_rows))
        return rows

    def _refuse_page(self, positions: Tensor, batch: Tensor, pages: Tensor, outside: Tensor) -> None:
        n, j = divmod(int(outside.flatten().to(torch.uint8).argmax()), positions.shape[1])
        b, page = int(batch[n]), int(positions[n, j]) // self.rows_of_batch
        expected = f"a page of the cache, 0 to {self.all_rows // self.rows_of_batch - 1}"
        instead = f"Token {int(positions[n, j])} of sequence {b} is in {self.name}, so its page is read."
        raise refuse(self.table_name, f"element [{b}, {page}]", int(pages[n, j]), expected, instead)

    def places(self, piece: Piece) -> Tensor:
        """int32 (n, 3): batch, position and first kv head of every query of a piece."""
        every = torch.arange(piece.tokens.start, piece.tokens.stop, device=self.indices.device)
        queries = max(1, self.indices.shape[1])
        first = torch.full_like(every, piece.kv_heads.start)
        return torch.stack((every // queries, every % queries, first), 1).to(torch.int32)

    def refuse_duplicates(self) -> None:
        """Raise WrongTokens for the first list that names a token twice."""
        for piece in self.pieces(1):
            places = torch.arange(piece.rows.shape[1], device=piece.rows.device)
            ordered = torch.where(piece.inside, piece.rows, -1 - places).sort(1).values
            twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
            if bool(twice.any()):
                b, s = divmod(piece.tokens.start + int(twice.to(torch.uint8).argmax()), self.indices.shape[1])
                what, instead = (
                    f"list [{b}, {s}]",
                    "Without the check each token counts as often as it is named.",
                )
                raise refuse(self.name, what, "one that names a token twice", "a set", instead)

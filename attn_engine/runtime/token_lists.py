"""Lists of tokens as tensors of a call: which rows of K and V each query reads, a piece of the queries at a time.

A call brings int (batch, queries, kv heads or 1, longest list). An entry outside of the keys counts for nothing,
wherever it stands; an entry that stands there twice counts twice. Nothing here is larger than a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, eq=False)
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
        batch = self.batches(tokens)
        valid = (found >= 0) & (found < self.limit.reshape(-1)[tokens][:, None])
        if self.counts is not None:
            of_list = self.counts[:, :, min(i, self.counts.shape[2] - 1)].reshape(-1)[tokens]
            valid &= torch.arange(found.shape[1], device=found.device) < of_list[:, None]
        counts = valid.sum(1)
        longest = int(counts.max())
        full = bool((counts == longest).all()) and longest > 0
        if not (full and longest == found.shape[1]):
            if bool((valid[:, 1:] & ~valid[:, :-1]).any()):  # bring entries to the front, in their order
                order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
                found, valid = found.gather(1, order), valid.gather(1, order)
            longest = max(1, longest)
            found = torch.where(valid, found, 0)[:, :longest]
        positions = found.to(torch.int64)
        return Piece(
            tokens, heads, kv_heads, self._rows(positions, batch, valid), counts, found.to(torch.int32), full
        )

    def batches(self, tokens: slice) -> Tensor:
        """The batch of each of these queries."""
        every = torch.arange(tokens.start, tokens.stop, device=self.indices.device)
        return every // max(1, self.indices.shape[1])

    def _rows(self, positions: Tensor, batch: Tensor, valid: Tensor) -> Tensor:
        if not self.rows_of_batch:
            return positions
        if self.block_table is None:
            return positions + batch[:, None] * self.rows_of_batch
        pages = self.block_table[batch].gather(1, positions // self.rows_of_batch).to(torch.int64)
        rows = pages * self.rows_of_batch + positions % self.rows_of_batch
        valid = valid[:, : rows.shape[1]]
        outside = valid & ((rows < 0) | (rows >= self.all_rows))
        if bool(outside.any()):
            n, j = divmod(int(outside.flatten().to(torch.uint8).argmax()), rows.shape[1])
            b, page = int(batch[n]), int(positions[n, j]) // self.rows_of_batch
            expected = f"a page of the cache, 0 to {self.all_rows // self.rows_of_batch - 1}"
            instead = f"Token {int(positions[n, j])} of sequence {b} is in {self.name}, so its page is read."
            raise refuse(self.table_name, f"element [{b}, {page}]", int(pages[n, j]), expected, instead)
        return torch.where(valid, rows, 0)

    def places(self, piece: Piece) -> Tensor:
        """int32 (n, 3): batch, position and first kv head of every query of a piece."""
        every = torch.arange(piece.tokens.start, piece.tokens.stop, device=self.indices.device)
        queries = max(1, self.indices.shape[1])
        first = torch.full_like(every, piece.kv_heads.start)
        return torch.stack((every // queries, every % queries, first), 1).to(torch.int32)

    def check_duplicates(self) -> None:
        """Raise WrongTokens for the first list that names a token twice."""
        for piece in self.pieces(1):
            rows = torch.where(piece.inside, piece.rows, -1 - torch.arange(piece.rows.shape[1]))
            ordered = rows.sort(1).values
            twice = ordered[:, 1:] == ordered[:, :-1]
            if bool(twice.any()):
                n = int(twice.any(1).to(torch.uint8).argmax())
                b, s = divmod(piece.tokens.start + n, self.indices.shape[1])
                head = piece.kv_heads.start if self.indices.shape[2] > 1 else 0
                instead = (
                    "Each token counts as often as it is named; leave check_duplicates out to allow that."
                )
                raise refuse(
                    self.name, f"list [{b}, {s}, {head}]", "one that names a token twice", "a set", instead
                )


class GatheredRows:
    """Rows of tensors (N, H, R, D), numbered n * R + r, brought side by side: their columns follow each other."""

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self._parts = parts
        self.columns = sum(x.shape[3] for x in parts)
        self._buffer: Tensor | None = None

    def read(self, piece: Piece) -> Tensor:
        """(n, kv heads, longest, columns) of a piece; overwritten by the next one."""
        n, longest = piece.rows.shape
        kv_heads = piece.kv_heads.stop - piece.kv_heads.start
        numbers = n * longest * kv_heads * self.columns
        first = self._parts[0]
        if self._buffer is None or self._buffer.numel() < numbers:
            self._buffer = first.new_empty(numbers)
        buffer = self._buffer[:numbers].view(n * longest, kv_heads, self.columns)
        column = 0
        for x in self._parts:
            self._read_part(
                x[:, piece.kv_heads], piece.rows.flatten(), buffer[..., column : column + x.shape[3]]
            )
            column += x.shape[3]
        return buffer.view(n, longest, kv_heads, self.columns).transpose(1, 2)

    @staticmethod
    def _read_part(x: Tensor, rows: Tensor, to: Tensor) -> None:
        batches, heads, count, dim = x.shape
        if batches * count == 0:
            to.zero_()
        elif 1 in (batches, count) or x.stride(0) == count * x.stride(2):
            row = x.stride(2) if count > 1 else x.stride(0)
            flat = x.as_strided((batches * count, heads, dim), (row, x.stride(1), x.stride(3)))
            if heads == 1:
                torch.index_select(flat[:, 0], 0, rows, out=to[:, 0])
            else:
                torch.index_select(flat, 0, rows, out=to)
        else:
            to.copy_(x.transpose(1, 2)[rows // count, rows % count])

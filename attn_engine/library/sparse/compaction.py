"""Rows of (batch, length, heads, dim) gathered into fewer, and put back: differentiable, one copy per row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t, h], h]: (B, T, H, D) of x (B, N, H, D). index: (B, T, H), no position twice in a head."""
    return _Take.apply(x, _rows(index, x.shape[1]))  # pyright: ignore[reportReturnType]


def order_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(index, counts): kept positions in increasing order and then the dropped ones, (B, N, H); how many are kept.

    What a stable descending sort of 0 and 1 along dimension 1 gives, without sorting.
    """
    kept = keep.bool()
    before = kept.cumsum(1)
    counts = before[:, -1] if keep.shape[1] else kept.sum(1)
    positions = torch.arange(keep.shape[1], device=keep.device)[None, :, None]
    place = torch.where(kept, before - 1, counts[:, None] + positions - before)
    index = torch.empty_like(place)
    index.scatter_(1, place, positions.expand_as(place))
    return index, counts


@dataclass(frozen=True, slots=True)
class Moves:
    """Rows of a flattened (B, N, H, .) tensor in another order.

    there: (T,), the row that each slot takes. back: (B N H,), the slot of each row. Rows that none takes share one last
    slot, which holds any row on the way there, and must hold zeros on the way back.
    """

    there: Tensor
    back: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """(T, D) of x (B, N, H, D)."""
        return _Moved.apply(x.reshape(-1, x.shape[-1]), self.there, self.back)  # pyright: ignore[reportReturnType]

    def restore(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, N, H, D) from (T, D); the first three of `shape` are B, N and H."""
        moved = _Moved.apply(rows, self.back, self.there)
        return moved.view(*shape[:3], rows.shape[-1])  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def kept_numbers(keep: Tensor) -> Tensor:
    """The rows where keep (B, N, H) is not 0, counted with heads before positions, in that order."""
    return keep.transpose(1, 2).flatten().nonzero().flatten()


def moves_of(rows: Tensor, count: int, *, spare: bool) -> Moves:
    """The rows that sequences have, int32, out of `count`, one after the other; spare: and one slot more, for the rows
    that none has."""
    rows = rows.long()
    if not spare:
        return Moves(rows, _inverse(rows, torch.empty_like(rows)))
    there = torch.cat((rows, rows.new_zeros(min(1, count))))
    return Moves(there, _inverse(rows, rows.new_full((count,), len(rows))))


def _inverse(rows: Tensor, into: Tensor) -> Tensor:
    into[rows] = torch.arange(len(rows), device=rows.device)
    return into


@lru_cache(maxsize=16)
def heads_first_rows(batches: int, length: int, heads: int, device: torch.device) -> Tensor:
    """Which row of a (B, N, H) tensor is the first, second, ... with heads before positions: int32 (B H N,)."""
    rows = torch.arange(batches * length * heads, dtype=torch.int32, device=device)
    return rows.view(batches, length, heads).transpose(1, 2).flatten()


@lru_cache(maxsize=16)
def heads_first_positions(batches: int, length: int, heads: int, device: torch.device) -> Tensor:
    """The position along N of each of them, int32."""
    return torch.arange(length, dtype=torch.int32, device=device).repeat(batches * heads)


def _rows(index: Tensor, length: int) -> Tensor:
    """Numbers of rows of a (B, length, H, .) tensor that lies in that order."""
    batches, _, heads = index.shape
    base = torch.arange(batches, device=index.device)[:, None, None] * (length * heads)
    return (base + index * heads + torch.arange(heads, device=index.device)).flatten()


def _taken(x: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).reshape(shape)


def _placed(x: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    made = x.new_zeros(shape)
    made.view(-1, shape[-1]).index_copy_(0, rows, x.reshape(-1, shape[-1]))
    return made


class _Take(torch.autograd.Function):
    """The gradient is put, not added: no row is taken twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        batches, _, heads, dim = x.shape
        return _taken(x, rows, (batches, rows.numel() // max(batches * heads, 1), heads, dim))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Put.apply(gradients[0], rows, ctx.shape[1]), None  # pyright: ignore[reportReturnType]


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _placed(x, rows, (x.shape[0], length, *x.shape[2:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Take.apply(gradients[0], rows), None, None  # pyright: ignore[reportReturnType]


class _Moved(torch.autograd.Function):
    """Gathered there; its gradient is gathered back (a gather costs less than half of what writing anywhere does)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Moved.apply(gradients[0].contiguous(), back, there), None, None  # pyright: ignore[reportReturnType]

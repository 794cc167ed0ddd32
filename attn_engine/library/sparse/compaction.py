"""Rows of (batch, length, heads, dim) gathered into fewer, and put back: differentiable, one copy per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t, h], h]: (B, T, H, D) of x (B, N, H, D). index: (B, T, H), no position twice in a head."""
    return _Take.apply(x, _rows(index, x.shape[1]))  # pyright: ignore[reportReturnType]


def put(x: Tensor, index: Tensor, length: int) -> Tensor:
    """The inverse: (B, length, H, D) with x[b, t, h] at position index[b, t, h] and zeros elsewhere."""
    return _Put.apply(x, _rows(index, length), length)  # pyright: ignore[reportReturnType]


def permute(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x[b, index[b, t, h], h] where index has every position once; its gradient is gathered too, by the inverse."""
    return _Permute.apply(x, _rows(index, x.shape[1]), _rows(inverse, x.shape[1]))  # pyright: ignore[reportReturnType]


def inverse_of(index: Tensor) -> Tensor:
    """Where each position went: the permutation that takes `permute` back."""
    positions = torch.arange(index.shape[1], device=index.device)[None, :, None]
    return torch.empty_like(index).scatter_(1, index, positions.expand_as(index))


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


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, inverse)
        return _taken(x, rows, tuple(x.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        rows, inverse = ctx.saved_tensors
        return _Permute.apply(gradients[0], inverse, rows), None, None  # pyright: ignore[reportReturnType]

"""phi: a block of l tokens becomes one key or one value (section 3.3.1, equation 7).

Every form takes blocks (..., l, heads, D) to rows (..., heads, D'), and adds its learnable position inside of the block
first, where it has one. Any other function of such blocks may be given as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attn_engine.library.nsa.sequences import Sequences
from attn_engine.library.nsa.sizes import Compression

Phi = Callable[[Tensor], Tensor]
Place = Callable[[Tensor, Tensor], Tensor]  # (rows, positions of their blocks) -> rows


def mean_pooling(blocks: Tensor) -> Tensor:
    """The mean of a block's tokens."""
    return blocks.mean(-3)


class WeightedPooling(nn.Module):
    """sum over i of weight[h, i] x[i]: a learnable weight for each head and place, 1 / l at first."""

    def __init__(self, heads: int, block: int, dim: int | None = None, *, position: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, block), 1.0 / block))
        self.position = _position(heads, block, dim, position)

    def forward(self, blocks: Tensor) -> Tensor:
        return torch.einsum("...lhd,hl->...hd", _placed(blocks, self.position), self.weight)


class LinearCompression(nn.Module):
    """The block's tokens side by side, times weight[h] (l * D, D')."""

    def __init__(
        self, heads: int, block: int, dim: int, dim_out: int | None = None, *, position: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(_drawn(heads, block * dim, dim if dim_out is None else dim_out))
        self.position = _position(heads, block, dim, position)

    def forward(self, blocks: Tensor) -> Tensor:
        return _product(_placed(blocks, self.position), self.weight)


class PerceptronCompression(nn.Module):
    """Two layers with a GELU between them: gelu([x_1 .. x_l] first[h]) second[h]."""

    def __init__(
        self,
        heads: int,
        block: int,
        dim: int,
        hidden: int,
        dim_out: int | None = None,
        *,
        position: bool = True,
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(_drawn(heads, block * dim, hidden))
        self.second = nn.Parameter(_drawn(heads, hidden, dim if dim_out is None else dim_out))
        self.position = _position(heads, block, dim, position)

    def forward(self, blocks: Tensor) -> Tensor:
        hidden = nn.functional.gelu(_product(_placed(blocks, self.position), self.first))
        return torch.einsum("...hm,hmo->...ho", hidden, self.second)


def blocks_of(x: Tensor, sequences: Sequences, compression: Compression) -> Tensor:
    """The complete blocks [i d, i d + l) of every sequence, one after the other.

    x: (batch, T, heads, D), or packed (rows, heads, D). Returns (batch, blocks, l, heads, D) or (blocks, l, heads, D).
    """
    block, stride = compression.block, compression.stride
    if sequences.cumulative is None:
        segments = x[:, : x.shape[1] // stride * stride].unflatten(1, (-1, stride))
        count = compression.complete(x.shape[1])
        return torch.cat([segments[:, m : m + count] for m in range(block // stride)], 2)
    starts, rows = sequences.cumulative[1].long(), sequences.rows_cumulative(compression)
    first = starts[:-1].repeat_interleave(rows.diff().long()) + sequences.block_positions(
        compression, x.device
    )
    return blocks_at(x, first, compression)


def blocks_at(x: Tensor, first: Tensor, compression: Compression) -> Tensor:
    """(blocks, l, heads, D): the l rows of x (rows, heads, D) from each of the rows `first` on.

    A stride at a time: no row stands twice in a gather, so that sums of gradients have one order.
    """
    block, stride = compression.block, compression.stride
    within = torch.arange(stride, device=x.device)
    parts = [first[:, None] + m + within for m in range(0, block, stride)]
    return torch.cat([x.index_select(0, p.flatten()).unflatten(0, p.shape) for p in parts], 1)


def compress(x: Tensor, phi: Phi, sequences: Sequences, compression: Compression) -> Tensor:
    """The rows that phi makes of the blocks of x: (batch, blocks, heads, D') or packed (blocks, heads, D')."""
    return phi(blocks_of(x, sequences, compression)).to(x.dtype)


def _position(heads: int, block: int, dim: int | None, wanted: bool) -> nn.Parameter | None:
    assert not wanted or dim is not None, "a position inside of the block has the dimension of the tokens"
    return nn.Parameter(0.02 * torch.randn(heads, block, dim or 0)) if wanted else None


def _placed(blocks: Tensor, position: Tensor | None) -> Tensor:
    return blocks if position is None else blocks + position.transpose(0, 1)


def _product(blocks: Tensor, weight: Tensor) -> Tensor:
    """[x_1 .. x_l] weight[h] for every head."""
    length, dim = blocks.shape[-3], blocks.shape[-1]
    return torch.einsum("...lhd,hldo->...ho", blocks, weight.unflatten(1, (length, dim)))


def _drawn(heads: int, inner: int, outer: int) -> Tensor:
    return torch.randn(heads, inner, outer) * inner**-0.5
